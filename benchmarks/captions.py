"""Tokens per second of text generation, with and without cache, and by transformers' generate at the same size; and the
time saved by precomputed features.

    python benchmarks/captions.py [batch=8] [tokens=48] [rounds=5] [part=all|generate|features]
                                  [beams=1,4] [threads=0]

The network has random weights, as the time does not depend on the generated text. Contestants take turns; a ratio is
the median of the ratios of single turns. Both sides have 6 blocks of width 512, 8 heads, a vocabulary of 8,000, and the
same features of 197 x 768; neither may end early.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.models.captioner import Captioner, captioner_config
from pipeline.models.text_generation import Decoding, Marks, write

VOCAB, WIDTH, PATCHES = 8000, 768, 197


def main() -> None:
    given = dict(argument.split("=") for argument in sys.argv[1:])
    batch, tokens, rounds = (int(given.get(k, d)) for k, d in (("batch", 8), ("tokens", 48), ("rounds", 5)))
    part = given.get("part", "all")
    if threads := int(given.get("threads", 0)):
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {batch} images of {PATCHES} features, {tokens} tokens")
    if part in ("all", "generate"):
        for beams in map(int, given.get("beams", "1,4").split(",")):
            generation(batch, tokens, rounds, beams)
    if part in ("all", "features"):
        features(batch, rounds)


def generation(batch: int, tokens: int, rounds: int, beams: int) -> None:
    images = torch.randn(batch, PATCHES, WIDTH)
    marks = Marks(0, 2, (0, 1))
    contestants = {"transformers": _transformers(images, tokens, beams)}
    for decoder in ("transformer", "mamba"):
        sizes = {"image_tokens": PATCHES, "image_width": WIDTH, "vocab": VOCAB, "max_length": tokens + 1}
        model = Captioner(captioner_config("small", decoder=decoder, **sizes)).eval()
        for cached in (True, False):
            if not cached and (beams > 1 or decoder == "mamba"):
                continue
            how = Decoding(beams=beams, min_length=tokens, max_length=tokens, cached=cached)
            contestants[decoder + ("" if cached else ", no cache")] = _writing(model, images, marks, how)
    times = _turns(contestants, rounds)
    for name, seconds in times.items():
        speed = batch * tokens / median(seconds)
        ratio = median(theirs / ours for theirs, ours in zip(times["transformers"], seconds, strict=True))
        print(f"beams={beams}  {name:22} {speed:8.0f} tokens/s   {ratio:5.2f} x transformers", flush=True)


def _writing(model: Captioner, images: torch.Tensor, marks: Marks, how: Decoding) -> Callable[[], object]:
    return lambda: write(model, images, [[1]] * len(images), marks, how)


def _transformers(images: torch.Tensor, tokens: int, beams: int) -> Callable[[], object]:
    """GPT-2 with cross-attention, in a VisionEncoderDecoder; the encoder's output is given, so that it is not timed."""
    from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel
    from transformers.modeling_outputs import BaseModelOutput

    encoder = ViTModel(ViTConfig(num_hidden_layers=1), add_pooling_layer=False)
    config = GPT2Config(VOCAB, 128, 512, 6, 8, add_cross_attention=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(config)).eval()
    settings = {"num_beams": beams, "do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    ids = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}

    def generate() -> object:
        states = BaseModelOutput(last_hidden_state=images)  # modified by generate(): with beams, it would grow
        return model.generate(encoder_outputs=states, use_cache=True, **settings, **ids)

    return generate


def features(batch: int, rounds: int) -> None:
    """A training step of the nano decoder, from stored features and with a ViT-B that runs in each step."""
    from transformers import ViTConfig, ViTModel

    encoder = ViTModel(ViTConfig(), add_pooling_layer=False).eval().requires_grad_(False)
    pixels, stored = torch.randn(batch, 3, 224, 224), torch.randn(batch, PATCHES, WIDTH)
    tokens = torch.randint(3, VOCAB, (batch, 24))
    sizes = {"image_tokens": PATCHES, "image_width": WIDTH, "vocab": VOCAB, "max_length": 32}
    model = Captioner(captioner_config("nano", **sizes))

    def step(seen: torch.Tensor) -> None:
        logits = model(seen, tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    def online() -> None:
        with torch.no_grad():
            seen = encoder(pixels).last_hidden_state
        step(seen)

    times = _turns({"online": online, "stored": lambda: step(stored)}, rounds)
    ratio = median(a / b for a, b in zip(times["online"], times["stored"], strict=True))
    print(f"training step: {batch / median(times['stored']):.0f} images/s from features, {ratio:.1f} x online")


def _turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, job in contestants.items():
            start = perf_counter()
            job()
            if number:  # the first round is a warm-up
                times[name].append(perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
