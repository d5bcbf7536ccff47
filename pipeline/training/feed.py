"""The batches of the coming steps, in order, prepared ahead by worker processes where asked for.

What a step gets is a function of the sampler's position alone. So workers have no state, and a run that goes on needs
nothing from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import DataLoader, Dataset

from pipeline.config import TrainConfig
from pipeline.distributed import Rank, ignore_signals
from pipeline.loading import Batches, Sampler, order
from pipeline.randomness import keyed_seed
from pipeline.training.tasks.base import Batch, Keys, Task

_AHEAD = 2  # batches that each worker prepares beforehand


@dataclass(frozen=True)
class Part:
    """A part of a step's batch, as one forward pass takes it."""

    keys: Keys
    batch: Batch
    last: bool


class Feed:
    """Iterates over the parts of this rank's share of every step, from where ``sampler`` is on.

    Args:
        sampler: read once; the loop advances its own.
        steps: how many steps are left.
    """

    def __init__(
        self, task: Task, data: Batches, sampler: Sampler, first: int, steps: int, config: TrainConfig, rank: Rank
    ) -> None:
        prepared = _Prepared(task, data)
        requests = _requests(replace(sampler), first, steps, config, part_size(task, config, rank))
        self._parts: Iterator[Part]
        if config.workers:
            loader = DataLoader(
                prepared,
                sampler=requests,
                batch_size=None,
                collate_fn=None,
                num_workers=config.workers,
                prefetch_factor=_AHEAD,
                worker_init_fn=ignore_signals,
            )
            self._parts = iter(loader)
        else:
            self._parts = (prepared[request] for request in requests)

    def __iter__(self) -> Iterator[Part]:
        return self

    def __next__(self) -> Part:
        return next(self._parts)


def part_size(task: Task, config: TrainConfig, rank: Rank) -> int:
    """How many samples a forward pass takes: as the settings say, else all of the rank's share of a batch, or on a CPU
    what the task says, evened out over the share."""
    share = -(-config.batch_size // rank.world_size)
    most = task.cached() if rank.device.type == "cpu" else 0
    if config.micro_batch or not most:
        return config.micro_batch or share
    return -(-share // -(-share // most))


class _Prepared(Dataset[Part]):
    def __init__(self, task: Task, data: Batches) -> None:
        self._task, self._data = task, data

    def __getitem__(self, request: tuple[Keys, bool]) -> Part:
        keys, last = request
        return Part(keys, self._task.prepare(self._data.batch(keys.positions), keys), last)


class _requests:  # noqa: N801 - used like a generator, but with the length-free interface of a sampler
    def __init__(self, sampler: Sampler, first: int, steps: int, config: TrainConfig, size: int) -> None:
        self._sampler, self._first, self._steps, self._config, self._size = sampler, first, steps, config, size

    def __iter__(self) -> Iterator[tuple[Keys, bool]]:
        sampler = self._sampler
        for step in range(self._first, self._first + self._steps):
            slots, positions = sampler.slots(), sampler.positions()
            epochs = (sampler.position + slots) // sampler.n
            for start in range(0, len(slots), self._size):
                part = slice(start, start + self._size)
                keys = Keys(self._config.seed, step, slots[part], positions[part], epochs[part])
                yield keys, start + self._size >= len(slots)
            sampler.advance()


@dataclass(frozen=True)
class Chosen:
    """Some samples of a data set, as a data set; ``first`` to ``stop`` in an order that is computed, not stored."""

    data: Batches
    seed: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Where they are in ``data``."""
        return order(self.seed, 0, len(self.data))[self.first + positions]

    def batch(self, positions: np.ndarray) -> Batch:
        return self.data.batch(self.places(positions))


@dataclass(frozen=True)
class Picked:
    """The samples of a data set at ``at``, int64 (n,), as a data set."""

    data: Batches
    at: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Where they are in ``data``."""
        found: np.ndarray = self.at[positions]
        return found

    def batch(self, positions: np.ndarray) -> Batch:
        return self.data.batch(self.places(positions))


def split(data: Batches, fraction: float, seed: int) -> tuple[Chosen, Chosen]:
    """(training, validation): ``fraction`` of the samples, chosen by the seed alone, are kept out of training."""
    valid = round(len(data) * fraction)
    key = keyed_seed(seed, "validation")
    return Chosen(data, key, valid, len(data)), Chosen(data, key, 0, valid)
