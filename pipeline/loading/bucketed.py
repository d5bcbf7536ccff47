"""Epochs of samples in buckets: the bucket of each step, and its samples.

Every bucket is shuffled for itself, and each step takes the next samples of one bucket. Which one is drawn by a key,
with a probability in proportion to the samples that the bucket has left: so shapes are mixed over the whole epoch, and
all buckets end together. How far each bucket is tells everything: these few numbers are the state of a loader or
sampler, and mean the same under any number of ranks and any batch size.

Memory grows with the number of runs in the indexes (partitions times buckets), not with the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.imaging.buckets import Size
from pipeline.loading.sampler import Epochs, Mixture, Order, Parts, ShardLocal, Stream, order, sequential
from pipeline.partitions.bucket_index import BucketIndex
from pipeline.randomness import digest, keyed_seed, uniforms

_MIXED = 1 << 15
"""Samples that are shuffled among each other where shards come from elsewhere, at least."""


class BucketMajor:
    """Numbers the samples of an index bucket by bucket, and within a bucket as they lie.

    Attributes:
        sizes: of the buckets, height and width in pixels.
        starts: number of each bucket's first sample, and of all at the end: int64 (sizes + 1,).
    """

    def __init__(self, index: BucketIndex) -> None:
        self.sizes = index.sizes
        self.starts = np.concatenate([[0], np.cumsum(index.counts())]).astype(np.int64)
        by_bucket = np.argsort(index.owners, kind="stable")
        self._first = index.starts[:-1][by_bucket]
        self._runs = Parts(np.diff(index.starts)[by_bucket].tolist())
        self._run_owners = index.owners[by_bucket]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def positions(self, numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Where samples with these numbers lie: int64."""
        runs, within = self._runs.locate(numbers)
        found: npt.NDArray[Any] = self._first[runs] + within
        return found

    def size_of(self, numbers: npt.NDArray[Any]) -> Size:
        """The bucket of samples with these numbers.

        Raises:
            ValueError: they are of several.
        """
        buckets = np.unique(np.searchsorted(self.starts, numbers, "right") - 1)
        if len(buckets) != 1:
            raise ValueError(f"samples of {len(buckets)} buckets cannot form a batch")
        return self.sizes[int(buckets[0])]

    def run_lengths(self, bucket: int) -> list[int]:
        """Of the runs of a bucket."""
        lengths: list[int] = np.diff(self._runs.starts)[self._run_owners == bucket].tolist()
        return lengths


@dataclass(frozen=True)
class BucketSlots:
    """Which samples of which folder stand in an epoch, by bucket.

    Without weights every sample stands in an epoch once. With weights, an epoch has as many places as there are
    samples; a folder has its share of them, spread over the buckets as its samples are, and is gone through again and
    again.

    Attributes:
        indexes: of each folder.
        weights: shares of the folders; empty: each sample once.
        blocks: samples of each bucket are shuffled within a window of runs, so that few shards are needed at a time.
    """

    indexes: tuple[BucketIndex, ...]
    seed: int
    shuffle: bool = True
    weights: tuple[float, ...] = ()
    blocks: bool = False

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Of all buckets, height and width in pixels."""
        return tuple(sorted({size for index in self.indexes for size in index.sizes}))

    @cached_property
    def _folders(self) -> list[BucketMajor]:
        return [BucketMajor(index) for index in self.indexes]

    @cached_property
    def _counts(self) -> npt.NDArray[Any]:
        """Samples of each folder in each bucket: int64 (folders, sizes)."""
        counts = np.zeros((len(self.indexes), len(self.sizes)), np.int64)
        for number, index in enumerate(self.indexes):
            counts[number, [self.sizes.index(size) for size in index.sizes]] = index.counts()
        return counts

    @cached_property
    def quotas(self) -> npt.NDArray[Any]:
        """Places that each bucket has in an epoch: int64 (sizes,)."""
        if not self.weights:
            total: npt.NDArray[Any] = self._counts.sum(0)
            return total
        shares = [sum(self._shares(bucket).values(), Fraction(0)) for bucket in range(len(self.sizes))]
        whole = sum(shares, Fraction(0))
        bounds = [
            int(len(self) * sum(shares[: n + 1], Fraction(0)) / whole + Fraction(1, 2)) for n in range(len(shares))
        ]
        return np.diff([0, *bounds]).astype(np.int64)

    def _shares(self, bucket: int) -> dict[int, Fraction]:
        """Of the folders with samples in a bucket: their weight times the part of their samples that lies there."""
        return {
            number: Fraction(weight) * int(self._counts[number, bucket]) / int(self._counts[number].sum())
            for number, weight in enumerate(self.weights)
            if self._counts[number, bucket]
        }

    def __len__(self) -> int:
        """Places in an epoch."""
        return int(self._counts.sum())

    @property
    def order(self) -> str:
        """Tells orders apart: a state in one order means nothing in another."""
        said = [self.sizes, self.quotas.tolist(), self.weights, self.shuffle, self.blocks]
        return f"buckets {digest(0, repr(said), size=8).hex()}"

    # ---- samples

    @cached_property
    def starts(self) -> npt.NDArray[Any]:
        """Number of each bucket's first place in an epoch: int64 (sizes + 1,)."""
        found: npt.NDArray[Any] = np.concatenate([[0], np.cumsum(self.quotas)]).astype(np.int64)
        return found

    @cached_property
    def _streams(self) -> dict[int, tuple[Stream, list[int]]]:
        """By bucket: the stream of its samples, and the folders that it is of."""
        return {bucket: self._stream(bucket) for bucket in range(len(self.sizes))}

    def _stream(self, bucket: int) -> tuple[Stream, list[int]]:
        folders = np.flatnonzero(self._counts[:, bucket]).tolist()
        height, width = self.sizes[bucket]
        seed = keyed_seed(self.seed, "bucket", height, width)
        lengths = [self._folders[f].run_lengths(self._folders[f].sizes.index(self.sizes[bucket])) for f in folders]
        if not self.weights:
            return self._epochs(list(chain.from_iterable(lengths)), seed), folders
        streams = [self._epochs(lengths[n], keyed_seed(seed, "folder", f)) for n, f in enumerate(folders)]
        shares = self._shares(bucket)
        return Mixture(streams, [float(shares[f]) for f in folders], seed), folders

    def _epochs(self, lengths: Sequence[int], seed: int) -> Epochs:
        n = sum(lengths)
        shuffled: Order = order
        if self.blocks:
            shuffled = ShardLocal(np.cumsum([0, *lengths]), max(8, -(-_MIXED * len(lengths) // max(1, n))))
        return Epochs(n, seed, shuffled if self.shuffle else sequential)

    def samples(self, epoch: int, bucket: int, places: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Folder and position (int64 both) at ``places`` of a bucket in ``epoch``."""
        stream, folders = self._streams[bucket]
        numbers = stream.samples(epoch * int(self.quotas[bucket]) + places)
        parts = Parts([int(self._counts[f, bucket]) for f in folders])
        owners, within = parts.locate(numbers)
        positions = np.empty_like(within)
        for number, f in enumerate(folders):
            mine, folder = owners == number, self._folders[f]
            first = folder.starts[folder.sizes.index(self.sizes[bucket])]
            positions[mine] = folder.positions(first + within[mine])
        return np.asarray(folders, np.int64)[owners], positions

    # ---- steps

    def choose(self, epoch: int, taken: npt.NDArray[Any], least: npt.NDArray[Any]) -> int | None:
        """The bucket of the next step; None if no bucket has as many samples left.

        Args:
            taken: places of each bucket that earlier steps took: int64 (sizes,).
            least: how many samples a bucket must have left: int64 (sizes,).
        """
        left = self.quotas - taken
        left = np.where(left >= least, left, 0)
        if not left.any():
            return None
        if not self.shuffle:
            return int(np.argmax(left > 0))
        return drawn(left, self.seed, epoch, int(taken.sum()))


def drawn(left: npt.NDArray[Any], seed: int, epoch: int, taken: int) -> int:
    """A bucket with a probability in proportion to what it has ``left``; keyed by epoch and samples ``taken``."""
    bounds = np.cumsum(left)
    at = int(uniforms(1, seed, "step", epoch, taken)[0] * int(bounds[-1]))
    return int(np.searchsorted(bounds, at, "right"))


@dataclass
class BucketSampler:
    """Deals the samples of a dataset in buckets out in global batches of one bucket, and these to ranks.

    It is a :class:`~pipeline.loading.sampler.Sampler` for training, without an end: every bucket goes through its
    samples again and again, in an order of its own each time, and a batch may reach into the bucket's next round. In
    each epoch (as many samples as there are) a bucket has its share, to within a batch.

    Attributes:
        starts: number of each bucket's first sample, and of all at the end: int64 (buckets + 1,). Samples are numbered
            bucket by bucket.
        batch_size: samples per step over all ranks.
        taken: samples of each bucket that earlier steps took: all the state there is.
    """

    starts: npt.NDArray[Any]
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    taken: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < self.world_size:
            raise ValueError(
                f"batch_size={self.batch_size} is less than one sample for each of {self.world_size} ranks"
            )
        if self.n < 1:
            raise ValueError("there are no samples to train on")
        self.taken = tuple(self.taken) or (0,) * len(self._counts)
        self._streams = [Epochs(int(n), keyed_seed(self.seed, "bucket", b)) for b, n in enumerate(self._counts) if n]
        self._stream_of = np.cumsum(self._counts > 0) - 1

    @property
    def _counts(self) -> npt.NDArray[Any]:
        return np.diff(self.starts)

    @property
    def n(self) -> int:
        """Number of samples."""
        return int(self.starts[-1])

    @property
    def position(self) -> int:
        """Samples that earlier steps took, over all ranks and epochs."""
        return sum(self.taken)

    @property
    def epoch(self) -> int:
        return self.position // self.n

    @property
    def finished(self) -> bool:
        """It has no end."""
        return False

    @property
    def bucket(self) -> int:
        """Of the next global batch."""
        left = np.maximum(self._counts * (self.epoch + 1) - np.array(self.taken, np.int64), 0)
        return drawn(left, self.seed, self.epoch, self.position)

    def slots(self) -> npt.NDArray[Any]:
        """This rank's places (int64, contiguous) in the next global batch; ranks' sizes differ by one at most."""
        first, last = (self.batch_size * r // self.world_size for r in (self.rank, self.rank + 1))
        return np.arange(first, last)

    def positions(self) -> npt.NDArray[Any]:
        """The samples (int64) that this rank takes in the next step, all of one bucket."""
        bucket = self.bucket
        places = self.taken[bucket] + self.slots()
        found: npt.NDArray[Any] = self.starts[bucket] + self._streams[self._stream_of[bucket]].samples(places)
        return found

    def seen(self) -> npt.NDArray[Any]:
        """In how many rounds of its bucket each of them was before: int64 (b,)."""
        bucket = self.bucket
        seen: npt.NDArray[Any] = (self.taken[bucket] + self.slots()) // int(self._counts[bucket])
        return seen

    def advance(self) -> None:
        """The step is done: the next batch follows."""
        bucket = self.bucket
        self.taken = tuple(n + self.batch_size * (b == bucket) for b, n in enumerate(self.taken))

    def state(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "starts": self.starts.tolist(), "taken": list(self.taken)}
        return {"seed": self.seed, "n": self.n, **place}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: the state belongs to other data or another seed.
        """
        mine = self.state()
        for name in ("seed", "n", "starts"):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"cannot resume: the checkpoint has {name}={state.get(name)}, this run has {name}={mine[name]}"
                )
        self.taken = tuple(state["taken"])
