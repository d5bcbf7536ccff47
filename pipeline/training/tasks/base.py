"""The interface of a training task, between stage=train and the training loop."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.config.schema import TrainConfig
from pipeline.loading import Batches
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.stage import open_input

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Keys:
    """Keys of a step's random numbers. They do not include the rank, so that any number of ranks draws the same.

    Attributes:
        step: -1 in an evaluation, where nothing is augmented.
        slots: int64 (b,), the samples' slots in the global batch of ``step``.
        positions, epochs: int64 (b,), the samples' positions in the dataset, and how often each was seen before.
    """

    seed: int
    step: int
    slots: npt.NDArray[Any]
    positions: npt.NDArray[Any]
    epochs: npt.NDArray[Any]

    def part(self, some: slice) -> Keys:
        """The keys of some of the samples."""
        return replace(self, slots=self.slots[some], positions=self.positions[some], epochs=self.epochs[some])


class Task(ABC):
    """Owns model, loss and metrics; independent of optimizers, ranks, checkpoints and files."""

    name: ClassVar[str]
    model: nn.Module
    """The bare network. The loop trains it, or a wrapper around it."""

    @classmethod
    def input(cls, config: TrainConfig) -> Dataset | None:
        """The finished dataset directory to train on: ``input=``, or by default the output of
        ``config.upstreams``.

        None: the task reads something else, which :meth:`from_config` opens.

        Raises:
            ConfigError, Unfinished: there is none, or it is not finished.
        """
        return open_input(config, "train")

    @classmethod
    def from_config(
        cls, config: TrainConfig, dataset: Dataset | None, device: str | torch.device = "cpu"
    ) -> tuple[Task, Batches, Batches | None]:
        """Create the task, its training data and its validation data.

        Args:
            dataset: the result of :meth:`input`.
            device: of networks that are used but not trained.

        Raises:
            ConfigError: the data do not match the settings.
        """
        raise NotImplementedError(f"task={cls.name} cannot be chosen by a setting")

    def remarks(self, config: TrainConfig) -> list[str]:
        """Warnings to show before training begins, a line each."""
        return []

    on_host: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors of a prepared batch that stay on the CPU."""

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """Process a batch on the CPU, ahead of time and possibly in a worker process: augmentation, and everything that
        is random."""
        return batch

    def for_workers(self) -> Self:
        """A copy for worker processes that can :meth:`prepare`, without the network, which may be on a GPU."""
        twin = copy.copy(self)
        twin.__dict__.pop("model", None)
        return twin

    @abstractmethod
    def losses(self, network: nn.Module, batch: Batch, keys: Keys) -> Tensor:
        """Loss of each sample, (b,).

        Args:
            network: the model, or the loop's wrapper around it.
            batch: as returned by :meth:`prepare`, on the model's device.
        """

    def measure(self, network: nn.Module, batch: Batch, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
        """Metrics of a validation batch: name → (values (b,), weights (b,)); the loop computes weighted means."""
        losses = self.losses(network, batch, keys)
        return {"valid_loss": (losses, torch.ones_like(losses))}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """The values to log, from the means over the whole validation set."""
        return means

    def pictures(self, network: nn.Module | None) -> npt.NDArray[Any] | None:
        """Images of an evaluation for the report, uint8 (n, h, w, 3), or None; with ``network=None``, the real images.

        Called on all ranks at the same time; must return the same on all.
        """
        return None

    metric: ClassVar[str] = "valid_loss"
    """The metric that determines the best checkpoint and early stopping."""
    higher_is_better: ClassVar[bool] = False

    def cached(self) -> int:
        """Preferred number of samples per forward pass on a CPU, so that activations stay in the caches; 0: all."""
        return 0

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies to a parameter."""
        return True

    def example(self) -> tuple[Any, ...]:
        """Arguments of the model for one sample, on the CPU, to count its FLOPs; empty: not counted."""
        return ()

    def facts(self) -> dict[str, Any]:
        """What is needed to use the model without the training data; JSON-serialisable, stored in checkpoints."""
        return {}

    def preprocessing(self) -> dict[str, Any]:
        """How to convert an input to the model's input, as JSON-serialisable values; written with the export."""
        return {}
