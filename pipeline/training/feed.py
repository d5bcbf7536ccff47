"""The batches of the coming steps, in order, prepared ahead by worker processes where asked for.

What a step gets is a function of the sampler's position alone. So workers have no state, and a run that goes on needs
nothing from them.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.distributed import Rank, ignore_signals
from pipeline.imaging.worker_pool import available_cpus
from pipeline.loading import Batches, Sampler, order
from pipeline.randomness import keyed_seed
from pipeline.training.tasks.base import Batch, Keys, Task

_AHEAD = 2  # batches that each worker prepares beforehand
_MOST_WORKERS = 8  # that are started unasked


@dataclass(frozen=True)
class Part:
    """A part of a step's batch, as one forward pass takes it."""

    keys: Keys
    batch: Batch
    last: bool

    def pin_memory(self) -> Part:
        """In memory that a GPU can read by itself. The DataLoader calls this, in a thread of its own."""
        return replace(self, batch={name: tensor.pin_memory() for name, tensor in self.batch.items()})


class Feed:
    """Iterates over the parts of this rank's share of every step, from where ``sampler`` is on, on the rank's device.

    For a GPU, batches are prepared in pinned memory by worker processes, which are fresh interpreters: none has the
    network, or a driver's state, from a fork. :meth:`prefetch` starts to copy the next part while one is computed.

    Args:
        sampler: read once; the loop advances its own.
        steps: how many steps are left.
    """

    def __init__(
        self, task: Task, data: Batches, sampler: Sampler, first: int, steps: int, config: TrainConfig, rank: Rank
    ) -> None:
        self._device, self._host = rank.device, task.on_host
        self._on_gpu = rank.device.type == "cuda"
        prepared = _Prepared(task.for_workers(), data)
        requests = _requests(replace(sampler), first, steps, config, part_size(task, config, rank))
        self._parts: Iterator[Part]
        if workers := worker_count(config, rank):
            loader = DataLoader(
                prepared,
                sampler=requests,
                batch_size=None,
                collate_fn=None,
                num_workers=workers,
                prefetch_factor=_AHEAD,
                worker_init_fn=ignore_signals,
                pin_memory=self._on_gpu,
                multiprocessing_context=_fresh_processes() if self._on_gpu else None,
            )
            self._parts = iter(loader)
        else:
            parts = (prepared[request] for request in requests)
            self._parts = (part.pin_memory() for part in parts) if self._on_gpu else parts
        self._stream: Any = torch.cuda.Stream(rank.device) if self._on_gpu else None
        self._next: tuple[Part, Any] | None = None
        self._computed: Any = None
        self.waited = 0.0
        """Seconds in which there was no data to compute with."""

    def __iter__(self) -> Iterator[Part]:
        return self

    def __next__(self) -> Part:
        part, copied = self._next or self._fetch()
        self._next = None
        if self._on_gpu:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for name, tensor in part.batch.items():
                if name not in self._host:
                    tensor.record_stream(current)
        return part

    def prefetch(self) -> None:
        """What was taken is being computed: meanwhile get the next part, if it is for a GPU and there is one."""
        if self._on_gpu:
            self._computed = torch.cuda.Event()
            self._computed.record()
            try:
                self._next = self._fetch()
            except StopIteration:
                self._next = None

    def _fetch(self) -> tuple[Part, Any]:
        """The next part, and for a GPU the event of its copy."""
        start = time.monotonic()
        part = next(self._parts)
        if self._computed is None or self._computed.query():  # the device has nothing else to do
            self.waited += time.monotonic() - start
        if not self._on_gpu:
            return part, None
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            part = replace(part, batch=on_device(part.batch, self._device, self._host))
            copied.record()
        return part, copied


def on_device(batch: Batch, device: torch.device, host: frozenset[str]) -> Batch:
    """``batch`` on ``device``, but for those of these names; from pinned memory nothing waits for the copies."""
    return {name: tensor if name in host else tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def worker_count(config: TrainConfig, rank: Rank) -> int:
    """Processes that prepare batches: as ``workers=`` says, else on a CPU none, for a GPU the rank's CPUs but one."""
    if config.workers >= 0:
        return config.workers
    if rank.device.type != "cuda":
        return 0
    return max(1, min(_MOST_WORKERS, available_cpus(rank.local_world_size) - 1))


def _fresh_processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


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
    """(training, validation): ``fraction`` of the samples, chosen by the seed alone, are kept out of training.

    Raises:
        ConfigError: one of them would be empty.
    """
    valid = round(len(data) * fraction)
    if valid == len(data) or (fraction and not valid):
        left = "trained on" if valid else "kept for validation"
        raise ConfigError(f"valid_fraction={fraction}: of {len(data)} samples, none would be {left}")
    key = keyed_seed(seed, "validation")
    return Chosen(data, key, valid, len(data)), Chosen(data, key, 0, valid)
