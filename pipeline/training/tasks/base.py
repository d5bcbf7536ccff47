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
    """What the randomness of a step is keyed by: never the rank, so that 1 or 8 ranks draw the same for each sample.

    ``step`` is -1 in an evaluation, where nothing is augmented.

    ``slots``: int64 (b,), the samples' places in the global batch of ``step``.
    ``positions``, ``epochs``: int64 (b,), which samples these are, and how often each was seen before.
    """

    seed: int
    step: int
    slots: npt.NDArray[Any]
    positions: npt.NDArray[Any]
    epochs: npt.NDArray[Any]

    def part(self, some: slice) -> Keys:
        """Those of some of the samples."""
        return replace(self, slots=self.slots[some], positions=self.positions[some], epochs=self.epochs[some])


class Task(ABC):
    """Owns model, loss and metrics; knows nothing of optimizers, ranks, checkpoints or files."""

    name: ClassVar[str]
    model: nn.Module
    """The bare network. The loop trains it, or a wrapper around it."""

    @classmethod
    def input(cls, config: TrainConfig) -> Dataset | None:
        """The finished dataset directory that is trained on: ``input=``, or by default what stage=precompute made.

        None: the task reads something else, which :meth:`from_config` opens.

        Raises:
            ConfigError, Unfinished: there is none, or it is not finished.
        """
        return open_input(config, "train")

    @classmethod
    def from_config(
        cls, config: TrainConfig, dataset: Dataset | None, device: str | torch.device = "cpu"
    ) -> tuple[Task, Batches, Batches | None]:
        """The task, what it is trained on, and what it is measured on meanwhile.

        Args:
            dataset: what :meth:`input` has found.
            device: where networks compute that are no part of what is trained.

        Raises:
            ConfigError: the data do not fit the settings.
        """
        raise NotImplementedError(f"task={cls.name} cannot be chosen by a setting")

    def remarks(self, config: TrainConfig) -> list[str]:
        """What a person should know before the training begins, a line each."""
        return []

    on_host: ClassVar[frozenset[str]] = frozenset()
    """What of a prepared batch stays on the CPU."""

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """What is done to a batch on the CPU, ahead of time and maybe in a worker process: augmentation, and everything
        that is drawn at random."""
        return batch

    def for_workers(self) -> Self:
        """A copy that can :meth:`prepare`, without the network, which may be on a GPU: worker processes get this."""
        twin = copy.copy(self)
        twin.__dict__.pop("model", None)
        return twin

    @abstractmethod
    def losses(self, network: nn.Module, batch: Batch, keys: Keys) -> Tensor:
        """Loss of each sample, (b,).

        Args:
            network: the model, or what the loop has wrapped around it.
            batch: as :meth:`prepare` returns it, on the model's device.
        """

    def measure(self, network: nn.Module, batch: Batch, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
        """Metrics of a batch of the validation set: name → (values (b,), weights (b,)); the loop takes their mean."""
        losses = self.losses(network, batch, keys)
        return {"valid_loss": (losses, torch.ones_like(losses))}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, from the means over the whole validation set."""
        return means

    def pictures(self, network: nn.Module | None) -> npt.NDArray[Any] | None:
        """What the report shows of an evaluation, uint8 (n, h, w, 3), if anything; of None: what it should be like.

        All ranks are asked at once, and get the same.
        """
        return None

    metric: ClassVar[str] = "valid_loss"
    """Which of them decides what is best, and when to stop."""
    higher_is_better: ClassVar[bool] = False

    def cached(self) -> int:
        """So many samples a forward pass had best take at a time on a CPU, so that what it makes of them stays in the
        caches; 0: all."""
        return 0

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies to a parameter."""
        return True

    def example(self) -> tuple[Any, ...]:
        """Arguments of the model for one sample, on the CPU, to count its operations; empty: not counted."""
        return ()

    def facts(self) -> dict[str, Any]:
        """What it takes to use the model without the training data; JSON-able, goes into every checkpoint."""
        return {}

    def preprocessing(self) -> dict[str, Any]:
        """How an input becomes what the model takes; JSON-able, goes into the export."""
        return {}
