"""Diffusion training on a CPU: what masking and averaging do to time and accuracy, and speed against diffusers' DiT.

    python benchmarks/diffusion.py [what=ablation,speed] [steps=2400] [rounds=7] [size=nano] [batch=32]

`ablation` trains `nano_mixer` on drawn scenes of one object with each part of the tokens masked, and lets the judge of
`shapes` look at 32 prompts drawn with the averaged and with the last weights. All masks get the same number of steps.
`speed` takes turns at one training step (forward and backward, float32, one thread) of a network as large, with as many
tokens, as diffusers' `DiTTransformer2DModel`; a ratio is the median of the ratios of single turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.config import TrainConfig
from pipeline.distributed import Rank
from pipeline.encoders.base import autoencoder, text_encoder
from pipeline.metrics.shapes import matches
from pipeline.models.dit import SIZES, DiT, DiTConfig, kept_tokens
from pipeline.sources.shapes_scene import caption, fixed_prompts, render, sample_scene
from pipeline.stages.generate import load_painter, sample_images
from pipeline.storage import Folder
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.loop import train
from pipeline.training.tasks.diffuse import Diffuse, LatentInfo

MASKS = (0.0, 0.5, 0.75)
INFO = LatentInfo("embedded16", "embedded", 64, (16, 8, 8), (16, 64))


class Scenes:
    """Latents of ``count`` drawn scenes, as the precompute stage stores them."""

    def __init__(self, count: int) -> None:
        vae, text = autoencoder(INFO.autoencoder), text_encoder(INFO.text_encoder)
        images, states = [], []
        for start in range(0, count, 100):
            scenes = [sample_scene(0, index) for index in range(start, min(count, start + 100))]
            images.append(vae.encode(vae.preprocess([render(scene, 64) for scene in scenes], 64)).half().float())
            states.append(text.encode([caption(scene) for scene in scenes]).half().float())
        self._image, self._text = torch.cat(images), torch.cat(states)

    def __len__(self) -> int:
        return len(self._image)

    def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
        return {"image_latents": self._image[positions], "caption_latents": self._text[positions]}


def ablation(steps: int) -> None:
    data = Scenes(6000)
    prompts = fixed_prompts(32)
    print(f"{'masked':>6} {'seconds':>8} {'time':>6} {'averaged':>9} {'last':>6}   of {len(prompts)} prompts")
    whole = 0.0
    for mask in MASKS:
        config = TrainConfig(
            model="nano_mixer", mask_ratio=mask, steps=steps, batch_size=64, lr=0.0045, checkpoint_every=steps
        )
        with tempfile.TemporaryDirectory() as place, Folder.open(place) as folder:
            start = perf_counter()
            train(Diffuse(config, data, INFO), data, config, Rank(), folder)
            seconds = perf_counter() - start
            painter = load_painter(place)
            last = DiT(painter.model.config).eval()
            last.load_state_dict(open_checkpoint(place, parts=("model",)).tensors["model"])
        whole = whole or seconds
        right = [
            sum(map(matches, sample_images(one, prompts, 1000), prompts))
            for one in (painter, replace(painter, model=last))
        ]
        print(f"{mask:>6} {seconds:>8.0f} {seconds / whole:>6.2f} {right[0]:>9} {right[1]:>6}", flush=True)


def speed(size: str, rounds: int, batch: int) -> None:
    from diffusers import DiTTransformer2DModel

    shape = {**SIZES[size], "local": False, "mixer_dim": 0, "mixer_depth": 0, "experts": 0, "text": "vector"}
    config = DiTConfig(4, 32, 32, 16, 64, **shape)
    ours = DiT(config)
    theirs = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.dim // config.heads,
        in_channels=4,
        out_channels=4,
        num_layers=config.depth,
        sample_size=32,
        patch_size=2,
        norm_num_groups=1,
    )
    x, text = torch.randn(batch, 4, 32, 32), torch.randn(batch, 16, 64)
    t, classes = torch.rand(batch), torch.zeros(batch, dtype=torch.int64)
    kept = kept_tokens(config.tokens, 0.75)
    keep = torch.stack([torch.randperm(config.tokens)[:kept].sort().values for _ in range(batch)])
    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: ours(x, t, text),
        "ours, 0.75 masked": lambda: ours(x, t, text, None, keep),
        "diffusers": lambda: theirs(x, (1000 * t).long(), classes, return_dict=False)[0],
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, forward in contestants.items():
            start = perf_counter()
            forward().square().mean().backward()
            if number:  # the first turn warms up
                times[name].append(perf_counter() - start)
    for name, model in (("ours", ours), ("diffusers", theirs)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
    for name, seconds in times.items():
        ratio = median(peer / own for peer, own in zip(times["diffusers"], seconds, strict=True))
        print(f"{name:<18} {batch / median(seconds):>8.1f} images/s   {ratio:.2f} x diffusers")


def main(
    what: str = "ablation,speed", steps: str = "2400", rounds: str = "7", size: str = "nano", batch: str = "32"
) -> None:
    torch.set_num_threads(1)
    if "speed" in what:
        speed(size, int(rounds), int(batch))
    if "ablation" in what:
        ablation(int(steps))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
