"""Epochs of samples in buckets: the bucket of each step, and its samples.

Every bucket is shuffled separately, and each step takes the next samples of one bucket. The bucket is drawn with a
keyed random number, with probability proportional to the number of samples it has left, so that shapes are mixed over
the whole epoch and all buckets end together. The state of a loader or sampler is therefore just the number of samples
taken from each bucket, and is valid for any number of ranks and any batch size.

Memory use grows with the number of runs in the indexes (partitions times buckets), not with the number of samples.
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
"""Minimum number of samples that are shuffled together if shards are remote."""


class BucketMajor:
    """Numbers the samples of an index bucket by bucket, and in stored order within a bucket.

    Attributes:
        sizes: height and width of each bucket in pixels.
        starts: number of each bucket's first sample, followed by the number of samples: int64 (sizes + 1,).
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
        """Stored positions of the samples with these numbers: int64."""
        runs, within = self._runs.locate(numbers)
        found: npt.NDArray[Any] = self._first[runs] + within
        return found

    def size_of(self, numbers: npt.NDArray[Any]) -> Size:
        """The bucket of the samples with these numbers.

        Raises:
            ValueError: they are in different buckets.
        """
        buckets = np.unique(np.searchsorted(self.starts, numbers, "right") - 1)
        if len(buckets) != 1:
            raise ValueError(f"samples of {len(buckets)} buckets cannot form a batch")
        return self.sizes[int(buckets[0])]

    def run_lengths(self, bucket: int) -> list[int]:
        """Lengths of a bucket's runs."""
        lengths: list[int] = np.diff(self._runs.starts)[self._run_owners == bucket].tolist()
        return lengths


@dataclass(frozen=True)
class BucketSlots:
    """Which sample of which folder is in each slot of an epoch, by bucket.

    Without weights, every sample is in an epoch once. With weights, an epoch has as many slots as there are samples;
    each folder gets its share of them, distributed over the buckets like its samples, and is repeated.

    Attributes:
        indexes: bucket index of each folder.
        weights: proportions of the folders; empty: each sample once.
        blocks: whether samples of a bucket are shuffled within a window of runs, so that few shards are needed at a
            time.
    """

    indexes: tuple[BucketIndex, ...]
    seed: int
    shuffle: bool = True
    weights: tuple[float, ...] = ()
    blocks: bool = False

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Height and width of all buckets in pixels."""
        return tuple(sorted({size for index in self.indexes for size in index.sizes}))

    @cached_property
    def _folders(self) -> list[BucketMajor]:
        return [BucketMajor(index) for index in self.indexes]

    @cached_property
    def _counts(self) -> npt.NDArray[Any]:
        """Number of samples of each folder in each bucket: int64 (folders, sizes)."""
        counts = np.zeros((len(self.indexes), len(self.sizes)), np.int64)
        for number, index in enumerate(self.indexes):
            counts[number, [self.sizes.index(size) for size in index.sizes]] = index.counts()
        return counts

    @cached_property
    def quotas(self) -> npt.NDArray[Any]:
        """Number of slots of each bucket in an epoch: int64 (sizes,)."""
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
        """For folders with samples in a bucket: their weight times the fraction of their samples in the bucket."""
        return {
            number: Fraction(weight) * int(self._counts[number, bucket]) / int(self._counts[number].sum())
            for number, weight in enumerate(self.weights)
            if self._counts[number, bucket]
        }

    def __len__(self) -> int:
        """Number of slots in an epoch."""
        return int(self._counts.sum())

    @property
    def order(self) -> str:
        """Identifies the order: a state is only valid for the order in which it was taken."""
        said = [self.sizes, self.quotas.tolist(), self.weights, self.shuffle, self.blocks]
        return f"buckets {digest(0, repr(said), size=8).hex()}"

    # ---- samples

    @cached_property
    def starts(self) -> npt.NDArray[Any]:
        """First slot of each bucket in an epoch, followed by the number of slots: int64 (sizes + 1,)."""
        found: npt.NDArray[Any] = np.concatenate([[0], np.cumsum(self.quotas)]).astype(np.int64)
        return found

    @cached_property
    def _streams(self) -> dict[int, tuple[Stream, list[int]]]:
        """For each bucket, the stream of its samples and the folders they are from."""
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
        """Folder and position (int64 both) of the samples at ``places`` of a bucket in ``epoch``."""
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
        """The bucket of the next step; None if no bucket has enough samples left.

        Args:
            taken: slots of each bucket used by earlier steps: int64 (sizes,).
            least: minimum number of slots that a bucket must have left: int64 (sizes,).
        """
        left = self.quotas - taken
        left = np.where(left >= least, left, 0)
        if not left.any():
            return None
        if not self.shuffle:
            return int(np.argmax(left > 0))
        return drawn(left, self.seed, epoch, int(taken.sum()))


def drawn(left: npt.NDArray[Any], seed: int, epoch: int, taken: int) -> int:
    """Draw a bucket with probability proportional to ``left``; keyed by epoch and number of samples ``taken``."""
    bounds = np.cumsum(left)
    at = int(uniforms(1, seed, "step", epoch, taken)[0] * int(bounds[-1]))
    return int(np.searchsorted(bounds, at, "right"))


@dataclass
class BucketSampler:
    """Divides samples in buckets into global batches from one bucket each, and these among the ranks.

    It is a :class:`~pipeline.loading.sampler.Sampler` for training that never ends: every bucket is repeated, each time
    in a new order, and a batch may extend into the bucket's next round. In each epoch (as many samples as there are)
    every bucket has its share, to within a batch.

    Attributes:
        starts: number of each bucket's first sample, followed by the number of samples: int64 (buckets + 1,). Samples
            are numbered bucket by bucket.
        batch_size: samples per step over all ranks.
        taken: samples of each bucket used by earlier steps. This is the whole state.
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
        """Number of samples used by earlier steps, over all ranks and epochs."""
        return sum(self.taken)

    @property
    def epoch(self) -> int:
        return self.position // self.n

    @property
    def finished(self) -> bool:
        """Always false: the sampler never ends."""
        return False

    @property
    def bucket(self) -> int:
        """The bucket of the next global batch."""
        left = np.maximum(self._counts * (self.epoch + 1) - np.array(self.taken, np.int64), 0)
        return drawn(left, self.seed, self.epoch, self.position)

    def slots(self) -> npt.NDArray[Any]:
        """This rank's positions (int64, contiguous) in the next global batch; sizes of ranks differ by at most one."""
        first, last = (self.batch_size * r // self.world_size for r in (self.rank, self.rank + 1))
        return np.arange(first, last)

    def positions(self) -> npt.NDArray[Any]:
        """The samples (int64) of this rank in the next step, all from one bucket."""
        bucket = self.bucket
        places = self.taken[bucket] + self.slots()
        found: npt.NDArray[Any] = self.starts[bucket] + self._streams[self._stream_of[bucket]].samples(places)
        return found

    def seen(self) -> npt.NDArray[Any]:
        """In how many earlier rounds of its bucket each sample was used, int64 (b,)."""
        bucket = self.bucket
        seen: npt.NDArray[Any] = (self.taken[bucket] + self.slots()) // int(self._counts[bucket])
        return seen

    def advance(self) -> None:
        """Move on to the next batch."""
        bucket = self.bucket
        self.taken = tuple(n + self.batch_size * (b == bucket) for b, n in enumerate(self.taken))

    def state(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "starts": self.starts.tolist(), "taken": list(self.taken)}
        return {"seed": self.seed, "n": self.n, **place}

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume where ``state`` was taken.

        Raises:
            ValueError: the state was taken with other data or another seed.
        """
        mine = self.state()
        for name in ("seed", "n", "starts"):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"cannot resume: the checkpoint has {name}={state.get(name)}, this run has {name}={mine[name]}"
                )
        self.taken = tuple(state["taken"])
