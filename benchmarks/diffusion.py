"""Diffusion training on a CPU: effects of masking and averaging on time and accuracy, and speed against diffusers.

    python benchmarks/diffusion.py [what=ablation,speed] [steps=2400] [rounds=7] [size=nano] [batch=32]
        [precision=float32] [compile=false] [threads=1]

`ablation` trains `nano_mixer` on drawn scenes of one object with each fraction of tokens masked, and judges images of
32 prompts, generated with the EMA weights and with the last weights, as for `shapes`. All masks get the same number of
steps.

`speed` alternates between whole training steps of networks with the same depth, width and number of tokens as
diffusers' `DiTTransformer2DModel` (classes) and `PixArtTransformer2DModel` (attention to a text). Ours: all that
`stage=train` does, including drawing noise and averaging weights. Theirs: noise, forward and backward pass, clipping,
AdamW, on the whole batch, and (`in parts`) on the parts that ours uses. `compile=true` compiles all. A ratio is the
median of the ratios of single turns; the peak, for MFU, is that of matrix products in the same turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.config.schema import TrainConfig
from pipeline.distributed import Rank
from pipeline.encoders.base import autoencoder, text_encoder
from pipeline.loading import Sampler
from pipeline.metrics.scene_accuracy import matches
from pipeline.models.dit import SIZES, DiT
from pipeline.sources.shapes_scene import caption, fixed_prompts, render, sample_scene
from pipeline.stages.generate import load_painter, sample_images
from pipeline.storage import Folder
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.ema import Ema
from pipeline.training.feed import Feed, part_size
from pipeline.training.loggers import flop_counter, forward_flops
from pipeline.training.loop import train
from pipeline.training.tasks.diffuse import Diffuse, LatentInfo

MASKS = (0.0, 0.5, 0.75)
INFO = LatentInfo("embedded16", "embedded", 64, (16, 8, 8), (16, 64))
PLAIN = LatentInfo("embedded", "embedded", 256, (4, 32, 32), (16, 64))


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

    def batch(self, positions: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, torch.Tensor]:
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


class Noise:
    """Random latents."""

    def __init__(self, count: int) -> None:
        self._image, self._text = torch.randn(count, *PLAIN.image_shape), torch.randn(count, *PLAIN.caption_shape)

    def __len__(self) -> int:
        return len(self._image)

    def batch(self, positions: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        return {"image_latents": self._image[positions], "caption_latents": self._text[positions]}


@dataclass
class Contestant:
    """``step``: trains on a batch; ``part``: images per forward pass; ``flops``: of one image's forward pass."""

    step: Callable[[], object]
    model: nn.Module
    part: int
    flops: float


def ours(config: TrainConfig, data: Noise, text: str) -> Contestant:
    """A step of :func:`pipeline.training.loop.train`."""
    shape = SIZES[config.model] | {"local": False, "mixer_dim": 0, "mixer_depth": 0, "experts": 0, "text": text}
    SIZES["plain"] = shape
    config = replace(config, model="plain")
    task = Diffuse(config, data, PLAIN)
    network = torch.compile(task.model) if config.compile else task.model
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=config.lr, fused=True)
    ema = Ema(task.model, config.ema_decay)
    feed = Feed(task, data, Sampler(len(data), config.batch_size, 0, 0, 1), 0, config.steps, config, Rank())

    def step() -> None:
        last = False
        while not last:
            part = next(feed)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                losses = task.losses(network, part.batch, part.keys)
            (losses.float().sum() / config.batch_size).backward()
            last = part.last
        nn.utils.clip_grad_norm_(task.model.parameters(), config.clip_norm)
        optimizer.step()
        ema.update(task.model)
        optimizer.zero_grad()

    return Contestant(step, task.model, part_size(task, config, Rank()), forward_flops(task.model, task.example()))


def theirs(config: TrainConfig, data: Noise, text: bool, part: int) -> Contestant:
    """A plain training step of diffusers' transformer, also with rectified flow."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    shape = SIZES[config.model]
    given: dict[str, Any] = {
        "num_attention_heads": shape["heads"],
        "attention_head_dim": shape["dim"] // shape["heads"],
        "in_channels": PLAIN.image_shape[0],
        "out_channels": PLAIN.image_shape[0],
        "num_layers": shape["depth"],
        "sample_size": PLAIN.image_shape[1],
        "patch_size": 2,
        "norm_num_groups": 1,
    }
    more: dict[str, Any] = {"use_additional_conditions": False, "caption_channels": PLAIN.caption_shape[1]}
    model = (
        PixArtTransformer2DModel(**given, cross_attention_dim=shape["dim"], **more)
        if text
        else DiTTransformer2DModel(**given)
    )
    network = torch.compile(model) if config.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)

    def output(x: torch.Tensor, states: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if text:
            known = {"resolution": None, "aspect_ratio": None}
            return network(x, states, t, known, return_dict=False)[0]
        return network(x, t, torch.zeros_like(t), return_dict=False)[0]

    def step() -> None:
        batch = data.batch(np.arange(config.batch_size))
        noise, level = torch.randn_like(batch["image_latents"]), torch.rand(config.batch_size)
        for start in range(0, config.batch_size, part):
            some = slice(start, start + part)
            x, states, t = batch["image_latents"][some], batch["caption_latents"][some], level[some]
            noisy = torch.lerp(x, noise[some], t[:, None, None, None])
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                error = output(noisy, states, (1000 * t).long()) - (noise[some] - x)
            (error.float().square().mean() * (len(x) / config.batch_size)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    some = data.batch(np.arange(1))
    with torch.no_grad(), flop_counter() as counter:
        output(some["image_latents"], some["caption_latents"], torch.zeros(1, dtype=torch.int64))
    return Contestant(step, model, part, counter.get_total_flops())


def speed(config: TrainConfig, rounds: int) -> None:
    data = Noise(config.batch_size)
    plain = ours(config, data, "vector")
    contestants = {
        "DiT of diffusers": theirs(config, data, False, config.batch_size),
        "DiT, in parts": theirs(config, data, False, plain.part),
        "ours": plain,
        "ours, 0.5 masked": ours(replace(config, mask_ratio=0.5), data, "vector"),
        "ours, 0.75 masked": ours(replace(config, mask_ratio=0.75), data, "vector"),
        "PixArt of diffusers": theirs(config, data, True, config.batch_size),
        "ours, attention to text": ours(config, data, "attention"),
    }
    matrix = torch.randn(1024, 1024).to(getattr(torch, config.precision))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peak = 0.0
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            start = perf_counter()
            contestant.step()
            between = perf_counter()
            matrix @ matrix
            if number:  # the first round is a warm-up
                times[name].append(between - start)
                peak = max(peak, 2 * 1024**3 / (perf_counter() - between))
    print(f"batch {config.batch_size}, {config.precision}, {torch.get_num_threads()} threads, ", end="")
    print(f"{'compiled' if config.compile else 'not compiled'}; peak {peak / 1e9:.0f} GFLOP/s")
    print(f"{'':<24} {'million':>7} {'GFLOP/':>7} {'images':>7} {'MFU':>5} {'x DiT':>6} {'x PixArt':>8}")
    print(f"{'':<24} {'weights':>7} {'image':>7} {'/s':>7}")
    for name, contestant in contestants.items():
        weights = sum(p.numel() for p in contestant.model.parameters()) / 1e6
        rate = config.batch_size / median(times[name])
        ratios = [
            median(peer / own for peer, own in zip(times[other], times[name], strict=True))
            for other in ("DiT of diffusers", "PixArt of diffusers")
        ]
        mfu = 3 * contestant.flops * rate / peak
        print(f"{name:<24} {weights:>7.2f} {3 * contestant.flops / 1e9:>7.2f} {rate:>7.1f} {mfu:>5.2f} ", end="")
        print(f"{ratios[0]:>6.2f} {ratios[1]:>8.2f}")


def main(
    what: str = "ablation,speed",
    steps: str = "2400",
    rounds: str = "7",
    size: str = "nano",
    batch: str = "32",
    precision: str = "float32",
    compile: str = "false",
    threads: str = "1",
) -> None:
    torch.set_num_threads(int(threads))
    if "speed" in what:
        config = TrainConfig(
            model=size,
            batch_size=int(batch),
            steps=int(rounds) + 1,
            precision=precision,
            compile=compile == "true",
        )
        speed(config, int(rounds))
    if "ablation" in what:
        ablation(int(steps))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
