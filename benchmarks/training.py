"""Training steps: a Vision Mamba in our loop, timm's ViT of the same size in our loop, and both as bare steps.

    python benchmarks/training.py [edge=32] [steps=8] [rounds=5] [settings of stage=train, as model=tiny]

The data are scikit-learn's scanned digits, enlarged to edge x edge, cropped and mirrored. All take turns; figures are
medians over rounds. A bare step is forward pass, backward pass, clipping and AdamW on one batch that is on the device;
the additional time of our loop is its overhead. The ViT has the width of the Vision Mamba, and the number of blocks
that brings it closest in parameters. On a GPU, add precision=bfloat16 (and workers=8): it also prints MFU.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

from pipeline.config.cli import build
from pipeline.config.schema import TrainConfig
from pipeline.distributed import Rank
from pipeline.storage import Folder
from pipeline.training.images import ImageDataset
from pipeline.training.loggers import forward_flops, peak_flops, read_log
from pipeline.training.loop import train
from pipeline.training.tasks.classify import Classify, normalised

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Digits:
    """Rows as read from shards."""

    def __init__(self) -> None:
        digits = load_digits()
        self._pixels, self._labels = (digits.images * 15.9).astype("uint8"), digits.target

    def __len__(self) -> int:
        return len(self._labels)

    def rows(self, positions: Any) -> list[dict[str, Any]]:
        return [self._row(int(position)) for position in positions]

    def _row(self, position: int) -> dict[str, Any]:
        file = BytesIO()
        Image.fromarray(self._pixels[position]).convert("RGB").save(file, "PNG")
        return {"key": str(position), "jpg": file.getvalue(), "label": int(self._labels[position])}


class ClassifyByViT(Classify):
    """The same task with timm's ViT, of the Vision Mamba's width and about as many parameters."""

    def __init__(self, config: TrainConfig, data: ImageDataset) -> None:
        super().__init__(config, data)
        like, parameters = self.model.config, count(self.model)
        size = {"img_size": like.height, "patch_size": like.patch, "num_classes": like.classes, "global_pool": "avg"}
        models = (
            VisionTransformer(**size, embed_dim=like.dim, depth=depth, num_heads=like.heads) for depth in range(1, 25)
        )
        self.model = min(models, key=lambda model: abs(count(model) - parameters))  # type: ignore[assignment]
        self._example = (torch.zeros(1, 3, like.height, like.width),)

    def example(self) -> tuple[Any, ...]:
        return self._example

    def facts(self) -> dict[str, Any]:
        return {}

    def preprocessing(self) -> dict[str, Any]:
        return {}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def in_our_loop(task: Classify, data: ImageDataset, config: TrainConfig) -> dict[str, float]:
    """The last line of a run's log, with speeds after the first half, which is a warm-up."""
    with tempfile.TemporaryDirectory() as place, Folder.open(place) as run:
        train(task, data, config, Rank(), run)
        return [line for line in read_log(Path(place)) if "samples_per_second" in line][-1]


def bare(task: Classify, data: ImageDataset, config: TrainConfig) -> dict[str, float]:
    model = task.model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = data.batch(torch.arange(config.batch_size).numpy())
    images, labels = (batch[name].to(DEVICE) for name in ("images", "labels"))
    start = 0.0
    for step in range(config.steps):
        if step == config.steps // 2:
            synchronize()
            start = perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = model(normalised(images, task.mean, task.std))
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize()
    speed = (config.steps - config.steps // 2) * config.batch_size / (perf_counter() - start)
    flops = forward_flops(task.model, task.example())
    peak = peak_flops(DEVICE)
    return {"samples_per_second": speed, "data_wait": 0.0, "mfu": 3 * flops * speed / peak if peak else 0.0}


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    given: dict[str, Any] = dict(argument.split("=", 1) for argument in sys.argv[1:])
    rounds = int(given.pop("rounds", 5))
    settings = {"task": "classify", "batch_size": 64, "steps": 8, "resolution": given.pop("edge", 32), "threads": 1}
    settings |= {"crop_scale": 0.6, "flip": 0.5, **given}
    steps = int(settings["steps"])
    config = build(TrainConfig, {**settings, "log_every": max(1, steps // 2), "checkpoint_every": 10 * steps})
    torch.set_num_threads(config.threads)
    data = ImageDataset(Digits(), config.resolution)
    mamba, transformer = Classify(config, data), ClassifyByViT(config, data)
    contestants: dict[str, Callable[[], dict[str, float]]] = {}
    for name, task in (("Vision Mamba", mamba), ("timm ViT", transformer)):
        contestants[f"{name}, bare steps"] = lambda task=task: bare(task, data, config)
        contestants[f"{name}, our loop"] = lambda task=task: in_our_loop(task, data, config)
    lines: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            lines[name].append(contestant())
    print(f"{DEVICE}, batch {config.batch_size}, {config.resolution} x {config.resolution}, {config.precision}")
    print(f"parameters: Vision Mamba {count(mamba.model) / 1e6:.2f} M, timm ViT {count(transformer.model) / 1e6:.2f} M")
    print(f"{'':28}{'img/s':>9}{'of bare':>9}{'waits for data':>16}{'MFU':>8}")
    speeds = {name: [line["samples_per_second"] for line in lines[name]] for name in contestants}
    for name in contestants:
        base = speeds[f"{name.split(',')[0]}, bare steps"]
        share = median(own / other for own, other in zip(speeds[name], base, strict=True))
        wait, mfu = (median(line.get(key, 0.0) for line in lines[name]) for key in ("data_wait", "mfu"))
        print(f"{name:28}{median(speeds[name]):9.1f}{share:9.3f}{100 * wait:15.2f}%{100 * mfu:7.1f}%")
    pairs = zip(speeds["Vision Mamba, our loop"], speeds["timm ViT, our loop"], strict=True)
    print(f"Vision Mamba / timm ViT, both in our loop: {median(a / b for a, b in pairs):.2f} x img/s")


if __name__ == "__main__":
    main()
