"""Decoders of captions: what is cached, padded, batched or searched changes no text; ends and lengths are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import ConfigError
from pipeline.models.captioner import SIZES, Cache, Captioner, CaptionerConfig, captioner_config
from pipeline.models.text_generation import Decoding, Marks, write

VOCAB, PAD, BEGIN, END = 20, 0, 1, 2
MARKS = Marks(PAD, END, (PAD, BEGIN))
KINDS = ["learned", "rotary", "mamba"]


def model_of(kind: str, seed: int = 0) -> Captioner:
    """A small decoder with random weights, large enough that its texts differ, and end at some time."""
    torch.manual_seed(seed)
    decoder = "mamba" if kind == "mamba" else "transformer"
    positions = "rotary" if kind == "rotary" else "learned"
    config = CaptionerConfig(5, 6, VOCAB, 40, decoder, 32, 2, 4, dropout=0.1, positions=positions, d_state=8)
    model = Captioner(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
        model.embed.weight.normal_(std=0.5)
    return model.requires_grad_(False)


def pictures(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Captioner:
    torch.set_num_threads(1)
    return model_of(request.param)


PROMPTS = [[BEGIN], [BEGIN, 5, 6, 7], [BEGIN, 9], [BEGIN, 5, 6, 8], [BEGIN], [BEGIN, 3, 3, 3, 3, 3]]
WAYS = [
    Decoding(max_length=12),
    Decoding(max_length=12, min_length=6),
    Decoding(max_length=12, beams=3),
    Decoding(max_length=12, beams=4, length_penalty=0.3, min_length=3),
    Decoding(max_length=12, top_p=0.9, temperature=1.5),
]


def test_cached_logits_are_those_of_the_whole_text(model: Captioner) -> None:
    features = pictures(3)
    tokens = torch.randint(3, VOCAB, (6, 17), generator=torch.Generator().manual_seed(0))
    whole = model(features.repeat_interleave(2, 0), tokens)
    assert torch.allclose(model(features, tokens), whole, atol=1e-5)
    cache = model.begin(features, group=2, length=17)
    steps = [cache.step(tokens[:, :4]), *(cache.step(tokens[:, t : t + 1]) for t in range(4, 17))]
    assert torch.allclose(torch.stack(steps, 1), whole[:, 3:], atol=2e-5)


def test_cached_logits_in_bfloat16(model: Captioner) -> None:
    features = pictures(3)
    tokens = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    exact = model(features, tokens)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        cache = model.begin(features, length=9)
        steps = [cache.step(tokens[:, t : t + 1]).float() for t in range(9)]
    assert (torch.stack(steps, 1) - exact).norm() / exact.norm() < 0.03


def test_reordered_texts_go_on_from_their_own_past(model: Captioner) -> None:
    features = pictures(2)
    tokens = torch.randint(3, VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))
    index = torch.tensor([1, 1, 3, 2])
    cache = model.begin(features, group=2, length=7)
    cache.step(tokens)
    cache.reorder(index)
    following = torch.tensor([[4], [5], [6], [7]])
    expected = model(features.repeat_interleave(2, 0), torch.cat([tokens[index], following], 1))[:, -1]
    assert torch.allclose(cache.step(following), expected, atol=2e-5)


def test_padding_behind_a_text_changes_nothing_before_it(model: Captioner) -> None:
    tokens = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([tokens, torch.full((2, 9), PAD)], 1)
    assert torch.allclose(model(pictures(2), padded)[:, :8], model(pictures(2), tokens), atol=1e-5)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_texts_depend_on_neither_cache_nor_neighbours(model: Captioner, how: Decoding) -> None:
    features = pictures(6)
    keys = list("abcdef")
    texts = write(model, features, PROMPTS, MARKS, how, keys)
    assert len({tuple(text) for text in texts}) > 2
    assert texts == write(model, features, PROMPTS, MARKS, Decoding(**{**how.__dict__, "cached": False}), keys)
    alone = [write(model, features[i : i + 1], PROMPTS[i : i + 1], MARKS, how, keys[i : i + 1])[0] for i in range(6)]
    assert texts == alone
    for text in texts:
        assert how.min_length <= len(text) <= how.max_length
        assert not {PAD, BEGIN, END} & set(text)


def test_one_beam_is_greedy(model: Captioner) -> None:
    from pipeline.models import text_generation

    features = pictures(6)
    for minimum in (0, 5):
        how = Decoding(max_length=12, min_length=minimum)
        work = text_generation._Work(model, features, PROMPTS, MARKS, how, list("abcdef"))
        assert text_generation._beams(work) == write(model, features, PROMPTS, MARKS, how)


def test_beams_find_texts_that_are_at_least_as_likely(model: Captioner) -> None:
    features = pictures(6)

    def likelihood(text: list[int], row: int, how: Decoding) -> float:
        tokens = torch.tensor([[BEGIN, *text, END]])
        logits = model(features[row : row + 1], tokens[:, :-1])
        logits[..., [PAD, BEGIN]] = -torch.inf
        steps = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[0, :, 0]
        written = len(text) + (len(text) < how.max_length)
        return float(steps[:written].sum()) / written

    greedy, wide = Decoding(max_length=6, min_length=0), Decoding(max_length=6, min_length=0, beams=8)
    sums = [
        sum(likelihood(t, i, how) for i, t in enumerate(write(model, features, [[BEGIN]] * 6, MARKS, how)))
        for how in (greedy, wide)
    ]
    assert sums[1] >= sums[0]


def test_a_text_ends_where_the_model_says_so(model: Captioner) -> None:
    """A model that always prefers the end writes the shortest text that is allowed, one that never does the longest."""
    likes_end = [write_with_end(model, sign, how) for sign in (1, -1) for how in WAYS[:4]]
    assert [len(texts[0]) for texts in likes_end] == [1, 6, 1, 3, 12, 12, 12, 12]


def write_with_end(model: Captioner, sign: int, how: Decoding) -> list[list[int]]:
    class Biased(Captioner):
        def begin(self, *args: Any) -> Cache:
            cache = super().begin(*args)
            step = cache.step
            likes = torch.zeros(VOCAB).index_fill(0, torch.tensor(END), sign * 1e4)
            cache.step = lambda tokens: step(tokens) + likes  # type: ignore[method-assign]
            return cache

    model.__class__ = Biased
    texts = write(model, pictures(1), [[BEGIN]], MARKS, how)
    model.__class__ = Captioner
    return texts


def test_drawing_depends_on_seed_and_key(model: Captioner) -> None:
    features = pictures(1).repeat(4, 1, 1)
    how = Decoding(max_length=12, top_p=0.95, temperature=20.0)
    texts = write(model, features, [[BEGIN]] * 4, MARKS, how, ["a", "a", "b", "c"])
    assert texts[0] == texts[1] != texts[2] != texts[3]
    other = Decoding(max_length=12, top_p=0.95, temperature=20.0, seed=1)
    assert texts != write(model, features, [[BEGIN]] * 4, MARKS, other, ["a", "a", "b", "c"])
    sure = Decoding(max_length=12, top_p=1e-9)
    assert write(model, features, [[BEGIN]] * 4, MARKS, sure) == write(
        model, features, [[BEGIN]] * 4, MARKS, Decoding(max_length=12)
    )


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"beams": 0}, {"top_p": 1.5}, {"top_p": 0.5, "beams": 2}, {"temperature": 0}, {"min_length": 99}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Decoding(**wrong)
    with pytest.raises(ConfigError, match="max_length"):
        write(model_of("learned"), pictures(1), [[BEGIN]], MARKS, Decoding(max_length=40))
    with pytest.raises(ConfigError, match="model=huge"):
        captioner_config("huge", image_tokens=1, image_width=1, vocab=9, max_length=9)


def test_sizes_have_the_documented_number_of_parameters() -> None:
    for decoder, millions in (("transformer", (0.8, 4.2, 25, 113)), ("mamba", (0.33, 1.66, 9.7, 43.4))):
        for size, expected in zip(SIZES, millions, strict=True):
            config = captioner_config(size, image_tokens=1, image_width=1, vocab=1, max_length=1, decoder=decoder)
            with torch.device("meta"):
                blocks = Captioner(config).blocks
            count = sum(p.numel() for p in blocks.parameters()) / 1e6
            assert count == pytest.approx(expected, rel=0.07), (decoder, size)
