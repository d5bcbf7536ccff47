"""Training images per second of our loop with a Vision Mamba, and of a bare loop with timm's ViT of the same size.

    python benchmarks/classify.py [steps=30] [batch=64] [model=nano] [resolution=16]

Both learn scikit-learn's digits in float32, or bfloat16 on a GPU; they take turns, and the ratio is the median over
turns. `loop` is ours around timm's ViT: what augmentation, averaging, logging and checkpoints cost. Also printed: the
share of our time that was spent waiting for data.
"""

from __future__ import annotations

import os
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from pipeline.config import TrainConfig
from pipeline.distributed import Rank
from pipeline.storage import Folder
from pipeline.training.images import ImageDataset
from pipeline.training.logs import read_log
from pipeline.training.loop import train
from pipeline.training.tasks.classify import Classify, normalised


class Digits:
    def __init__(self) -> None:
        data = load_digits()
        self._images, self._labels = np.round(data.images * (255 / 16)).astype(np.uint8), data.target

    def __len__(self) -> int:
        return len(self._labels)

    def rows(self, positions: Any) -> list[dict[str, Any]]:
        return [self._row(int(position)) for position in positions]

    def _row(self, position: int) -> dict[str, Any]:
        file = BytesIO()
        Image.fromarray(self._images[position]).save(file, "PNG")
        return {"key": str(position), "jpg": file.getvalue(), "label": int(self._labels[position])}


def vit(task: Classify) -> nn.Module:
    """timm's, with the width, depth, patches and heads of the task's model."""
    config = task.model.config
    return timm.models.vision_transformer.VisionTransformer(
        img_size=config.height,
        patch_size=config.patch,
        num_classes=config.classes,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
    )


def ours(task: Classify, data: ImageDataset, config: TrainConfig) -> tuple[float, float]:
    """(images per second, share of the time without data), the first steps left out."""
    with tempfile.TemporaryDirectory() as place:
        with Folder.open(place) as folder:
            train(task, data, config, Rank(), folder)
        lines = [line for line in read_log(Path(place)) if "samples_per_second" in line][1:]
    return median(line["samples_per_second"] for line in lines), median(line["data_wait"] for line in lines)


def bare(model: nn.Module, task: Classify, data: ImageDataset, config: TrainConfig, device: torch.device) -> float:
    """Images per second of forward, backward and AdamW, nothing else."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = {name: tensor.to(device) for name, tensor in data.batch(np.arange(config.batch_size)).items()}
    times = []
    for _ in range(config.steps):
        start = perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = model(normalised(batch["images"], task.mean, task.std))
        F.cross_entropy(logits.float(), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - start)
    return config.batch_size / median(times)


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    device = Rank().device
    if device.type == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    config = TrainConfig(
        task="classify",
        model=options.get("model", "nano"),
        steps=int(options.get("steps", 30)),
        batch_size=int(options.get("batch", 64)),
        precision="bfloat16" if device.type == "cuda" else "float32",
        rotate=10.0,
        log_every=5,
        checkpoint_every=1000,
    )
    data = ImageDataset(Digits(), int(options.get("resolution", 16)))
    rates: dict[str, list[float]] = {"ours": [], "loop": [], "timm": [], "bare": []}
    waits = []
    for _ in range(3):
        task = Classify(config, data)
        rates["bare"].append(bare(task.model, task, data, config, device))
        rate, wait = ours(task, data, config)
        rates["ours"].append(rate)
        waits.append(wait)
        rates["timm"].append(bare(vit(task), task, data, config, device))
        task = Classify(config, data)
        task.model, task.facts, task.example = vit(task), dict, tuple  # type: ignore[method-assign, assignment]
        rates["loop"].append(ours(task, data, config)[0])

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    print(f"our loop, Vision Mamba {config.model}:  {median(rates['ours']):8.1f} images/s")
    print(f"bare loop, Vision Mamba:       {median(rates['bare']):8.1f} images/s")
    print(f"bare loop, timm's ViT:         {median(rates['timm']):8.1f} images/s")
    print(f"Vision Mamba / ViT, both bare:          {ratio('bare', 'timm'):.2f}")
    print(f"our loop / bare loop, Vision Mamba:     {ratio('ours', 'bare'):.2f}")
    print(f"our loop / bare loop, ViT:              {ratio('loop', 'timm'):.2f}")
    print(f"waiting for data:                       {median(waits):.1%}")


if __name__ == "__main__":
    main()
