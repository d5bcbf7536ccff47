"""The one interface between the training loop and what is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True)
class Keys:
    """What the randomness of a step is keyed by: never the rank, so that 1 or 8 ranks draw the same for each sample.

    ``slots``: int64 (b,), the samples' places in the global batch of ``step``.
    """

    seed: int
    step: int
    slots: np.ndarray


class Task(ABC):
    """Owns model, loss and metrics; knows nothing of optimizers, ranks, checkpoints or files."""

    name: ClassVar[str]
    model: nn.Module
    """The bare network. The loop trains it, or a wrapper around it."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: dict[str, Tensor], keys: Keys) -> Tensor:
        """Loss of each sample, (b,).

        Args:
            network: the model, or what the loop has wrapped around it.
            batch: as the dataset's ``batch`` returns it, on the model's device.
        """

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Metrics of ``network`` (with averaged weights), for the log; none by default."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What it takes to use the model without the training data; JSON-able, goes into every checkpoint."""
        return {}
