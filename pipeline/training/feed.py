"""The batches of the next steps, in order, optionally prepared by worker processes.

The data of a step depend only on the sampler's position. Workers therefore have no state that a resumed run needs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.distributed import Rank, ignore_signals
from pipeline.imaging.worker_pool import available_cpus
from pipeline.loading import Batches, Sampler, order
from pipeline.loading.bucketed import BucketSampler
from pipeline.loading.prefetch import Announced
from pipeline.randomness import keyed_seed
from pipeline.training.tasks.base import Batch, Keys, Task

_AHEAD = 2  # batches that each worker prepares ahead
_REQUIRED = 1 << 15  # samples over all ranks that are announced ahead, for remote data
_MOST_WORKERS = 8  # maximum number started by default


@dataclass(frozen=True)
class Part:
    """A part of a step's batch, the input of one forward pass."""

    keys: Keys
    batch: Batch
    last: bool

    def pin_memory(self) -> Part:
        """A copy in pinned memory. Called by DataLoader, in its own thread."""
        return replace(self, batch={name: tensor.pin_memory() for name, tensor in self.batch.items()})


class Feed:
    """Iterates over the parts of this rank's share of every step, from the position of ``sampler`` on, on its device.

    For a GPU, batches are prepared in pinned memory by worker processes. These are fresh interpreters, so that they do
    not inherit the network or a driver's state from a fork. :meth:`prefetch` starts to copy the next part while one is
    computed.

    Args:
        sampler: copied; the loop advances its own.
        steps: number of remaining steps.
    """

    def __init__(
        self,
        task: Task,
        data: Batches,
        sampler: Sampler | BucketSampler,
        first: int,
        steps: int,
        config: TrainConfig,
        rank: Rank,
    ) -> None:
        self._device, self._host = rank.device, task.on_host
        self._on_gpu = rank.device.type == "cuda"
        prepared = _Prepared(task.for_workers(), data)
        require = getattr(data, "require", None)
        requests = _requests(replace(sampler), first, steps, config, part_size(task, config, rank), require)
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
        """Seconds during which the device was idle for lack of data."""

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
        """Call when a part's computation has been started: on a GPU, fetches the next part meanwhile, if any."""
        if self._on_gpu:
            self._computed = torch.cuda.Event()
            self._computed.record()
            try:
                self._next = self._fetch()
            except StopIteration:
                self._next = None

    def _fetch(self) -> tuple[Part, Any]:
        """The next part and, for a GPU, the event that marks the end of its copy."""
        start = time.monotonic()
        part = next(self._parts)
        if self._computed is None or self._computed.query():  # the device is idle
            self.waited += time.monotonic() - start
        if not self._on_gpu:
            return part, None
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            part = replace(part, batch=on_device(part.batch, self._device, self._host))
            copied.record()
        return part, copied


def on_device(batch: Batch, device: torch.device, host: frozenset[str]) -> Batch:
    """Copy ``batch`` to ``device``, except tensors named in ``host``; copies from pinned memory are asynchronous."""
    return {name: tensor if name in host else tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def worker_count(config: TrainConfig, rank: Rank) -> int:
    """Number of processes that prepare batches: ``workers=`` if given, else none on a CPU, and all CPUs of the rank but
    one on a GPU."""
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
    """Number of samples per forward pass: as the settings say, else the rank's whole share of a batch, or on a CPU the
    task's preference, evened out over the share."""
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
        return Part(keys, self._task.prepare(self._data.batch(keys.positions, keys.epochs), keys), last)


class _requests:  # noqa: N801 - used like a generator, but with the length-free interface of a sampler
    def __init__(
        self,
        sampler: Sampler | BucketSampler,
        first: int,
        steps: int,
        config: TrainConfig,
        size: int,
        require: Callable[[npt.NDArray[Any]], None] | None,
    ) -> None:
        self._sampler, self._first, self._steps, self._config, self._size = sampler, first, steps, config, size
        self._require = require

    def __iter__(self) -> Iterator[tuple[Keys, bool]]:
        sampler = self._sampler
        stop = sampler.position + self._steps * sampler.batch_size
        announced = Announced(sampler, self._require, _REQUIRED, stop)
        for step in range(self._first, self._first + self._steps):
            announced.reach(sampler.position)
            slots, positions, epochs = sampler.slots(), sampler.positions(), sampler.seen()
            for start in range(0, len(slots), self._size):
                part = slice(start, start + self._size)
                keys = Keys(self._config.seed, step, slots[part], positions[part], epochs[part])
                yield keys, start + self._size >= len(slots)
            sampler.advance()


@dataclass(frozen=True)
class Chosen:
    """A subset of a dataset, as a dataset: ``first`` to ``stop`` of a permutation that is computed, not stored."""

    data: Batches
    seed: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def places(self, positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Positions in ``data``."""
        return order(self.seed, 0, len(self.data))[self.first + positions]

    def batch(self, positions: npt.NDArray[Any], epochs: npt.NDArray[Any] | None = None) -> Batch:
        return self.data.batch(self.places(positions), epochs)


@dataclass(frozen=True)
class Picked:
    """The samples of a dataset at ``at``, int64 (n,), as a dataset."""

    data: Batches
    at: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.at)

    def places(self, positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Positions in ``data``."""
        found: npt.NDArray[Any] = self.at[positions]
        return found

    def batch(self, positions: npt.NDArray[Any], epochs: npt.NDArray[Any] | None = None) -> Batch:
        return self.data.batch(self.places(positions), epochs)


@dataclass(frozen=True)
class ChosenInBuckets:
    """A subset of a dataset in buckets, as a dataset in buckets: ``parts`` are first and stop in each bucket, of a
    permutation that is computed, not stored."""

    data: Batches
    seed: int
    parts: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.bucket_starts[-1]

    @cached_property
    def bucket_starts(self) -> tuple[int, ...]:
        return tuple(np.cumsum([0, *(stop - first for first, stop in self.parts)]).tolist())

    def places(self, positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Positions in ``data``."""
        whole, buckets, found = bucket_starts(self.data), self._buckets(positions), np.empty_like(positions)
        for bucket in np.unique(buckets).tolist():
            mine = buckets == bucket
            within = positions[mine] - self.bucket_starts[bucket] + self.parts[bucket][0]
            count = whole[bucket + 1] - whole[bucket]
            found[mine] = whole[bucket] + order(keyed_seed(self.seed, "bucket", bucket), 0, count)[within]
        return found

    def _buckets(self, positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = np.searchsorted(self.bucket_starts, positions, "right") - 1
        return found

    def batch(self, positions: npt.NDArray[Any], epochs: npt.NDArray[Any] | None = None) -> Batch:
        return self.data.batch(self.places(positions), epochs)


def bucket_starts(data: Batches) -> tuple[int, ...]:
    """For a dataset that numbers its samples bucket by bucket: the first of each bucket, followed by the number of
    samples. Empty for other datasets."""
    starts: tuple[int, ...] = getattr(data, "bucket_starts", ())
    return starts


def shape_ranges(data: Batches) -> list[range]:
    """Ranges of samples with the same shape; without buckets, one range of all."""
    starts = bucket_starts(data) or (0, len(data))
    return [range(first, stop) for first, stop in pairwise(starts) if stop > first]


def sampler_of(data: Batches, config: TrainConfig, rank: Rank) -> Sampler | BucketSampler:
    """The sampler that divides ``data`` among steps and ranks."""
    place = (config.batch_size, config.seed, rank.rank, rank.world_size)
    if starts := bucket_starts(data):
        return BucketSampler(np.array(starts, np.int64), *place)
    local = getattr(data, "stream", None)  # remote data, read shard by shard
    return Sampler(len(data), *place, stream=local(config.seed) if local else None)


def some(data: Batches, count: int, seed: int) -> Chosen | ChosenInBuckets:
    """Up to ``count`` samples chosen by the seed; with buckets, proportionally from each, but at least one."""
    starts = bucket_starts(data)
    if not starts:
        return Chosen(data, seed, 0, min(count, len(data)))
    sizes = np.diff(starts).tolist()
    shares = [min(size, max(1, round(size * count / len(data)))) for size in sizes]
    return ChosenInBuckets(data, seed, tuple((0, share) for share in shares))


def split(data: Batches, fraction: float, seed: int) -> tuple[Chosen | ChosenInBuckets, Chosen | ChosenInBuckets]:
    """Split into (training, validation); ``fraction`` of the samples, chosen by the seed alone, are for validation.
    With buckets, each bucket is split.

    Raises:
        ConfigError: one of the two would be empty.
    """
    if starts := bucket_starts(data):
        sizes = np.diff(starts).tolist()
        kept = [round(size * fraction) for size in sizes]
        valid = sum(kept)
    else:
        valid = round(len(data) * fraction)
    if valid == len(data) or (fraction and not valid):
        left = "trained on" if valid else "kept for validation"
        raise ConfigError(f"valid_fraction={fraction}: of {len(data)} samples, none would be {left}")
    key = keyed_seed(seed, "validation")
    if starts:
        train = tuple((share, size) for share, size in zip(kept, sizes, strict=True))
        return ChosenInBuckets(data, key, train), ChosenInBuckets(data, key, tuple((0, share) for share in kept))
    return Chosen(data, key, valid, len(data)), Chosen(data, key, 0, valid)
