"""task=compress: an autoencoder with few channels for latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.options import Options, option, part_of
from pipeline.config.schema import TrainConfig
from pipeline.loading import Batches
from pipeline.partitions.dataset import Dataset
from pipeline.randomness import keyed_seed
from pipeline.registry import tasks
from pipeline.training.feed import split
from pipeline.training.stored_latents import latents_of
from pipeline.training.tasks.base import Batch, Keys, Task


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Options):
    """Compression of latents, task=compress."""

    bottleneck: int = option(2, "channels that the latents are compressed to", identity=True, ge=1)


@tasks.register("compress", CompressOptions)
class Compress(Task):
    name = "compress"

    def __init__(self, channels: int, bottleneck: int, seed: int) -> None:
        torch.manual_seed(keyed_seed(seed, "weights"))
        self.model = nn.Sequential(nn.Conv2d(channels, bottleneck, 1), nn.Conv2d(bottleneck, channels, 1))
        self.shape = {"channels": channels, "bottleneck": bottleneck}

    @classmethod
    def from_config(
        cls, config: TrainConfig, dataset: Dataset | None, device: str | torch.device = "cpu"
    ) -> tuple[Task, Batches, Batches | None]:
        """The task, what it is trained on, and what it is measured on."""
        assert dataset is not None
        latents, info = latents_of(config, dataset.root.path)
        task = cls(info.image_shape[0], part_of(config, CompressOptions).bottleneck, config.seed)
        return task, *split(latents, config.valid_fraction, config.seed)

    def losses(self, network: nn.Module, batch: Batch, keys: Keys) -> Tensor:
        """Mean squared error of each sample, (b,)."""
        latents = batch["image_latents"].float()
        return (network(latents) - latents).square().mean((1, 2, 3))

    def facts(self) -> dict[str, Any]:
        """Goes into every checkpoint: what it takes to build the network again."""
        return {"model": self.shape}
