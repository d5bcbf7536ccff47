"""A tiny dataset in memory and a tiny task, quick to train; for tests/training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.schema import TrainConfig
from pipeline.distributed import Rank
from pipeline.randomness import normals
from pipeline.storage import Folder
from pipeline.training.feed import Chosen
from pipeline.training.loop import State, train
from pipeline.training.tasks.base import Batch, Keys, Task


class Points:
    """Noisy points of a plane; ``seen`` notes which were read."""

    def __init__(self, count: int = 50) -> None:
        self.x = torch.from_numpy(normals((count, 4), 0, "points"))
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.1 * torch.from_numpy(normals((count,), 0, "noise"))
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        self.seen += positions.tolist()
        return {"x": self.x[positions], "y": self.y[positions]}


class Regression(Task):
    """Learns :class:`Points`.

    Args:
        poison: a step whose loss is NaN.
        plain: without dropout (which draws from torch's own generator) and batch norm (which has buffers).
    """

    name = "regression"

    def __init__(self, poison: int = -2, plain: bool = False) -> None:
        torch.manual_seed(0)
        extra = [] if plain else [nn.BatchNorm1d(8), nn.Dropout(0.2)]
        self.model = nn.Sequential(nn.Linear(4, 8), *extra, nn.Tanh(), nn.Linear(8, 1))
        self.poison = poison

    def losses(self, network: nn.Module, batch: dict[str, Tensor], keys: Keys) -> Tensor:
        losses = (network(batch["x"])[:, 0] - batch["y"]).square()
        return losses * float("nan") if keys.step == self.poison else losses

    def measure(self, network: nn.Module, batch: Batch, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
        losses, weights = super().measure(network, batch, keys)["valid_loss"]
        return {"valid_loss": (losses, weights), "training": (torch.full_like(losses, network.training), weights)}

    def facts(self) -> dict[str, Any]:
        return {"shape": [4, 1]}


class Run:
    """One life of a run in a folder; another one there resumes it."""

    def __init__(self, folder: Path, rank: Rank | None = None) -> None:
        self.path = folder
        folder.mkdir(exist_ok=True)
        self.data = Points()
        self.rank = rank or Rank()

    def __call__(self, task: Task | None = None, **settings: Any) -> State:
        small = {"steps": 12, "batch_size": 8, "checkpoint_every": 5, "log_every": 3, "valid_fraction": 0.1}
        config = TrainConfig(**{**small, **settings})
        with Folder.open(self.path) as folder:
            valid = Chosen(Points(30), 0, 10, 30)
            return train(task or Regression(), self.data, config, self.rank, folder, valid)
