"""Which samples a training step sees: keyed shuffle in O(1) memory, streams of samples, and the sampler.

The order depends only on (seed, epoch, number of samples). The samples of all epochs form an endless stream; each step
reads the next ``batch_size`` samples, and each rank its slice of these. The state of the sampler is therefore a single
number, and a run can resume with a different number of ranks, or a different batch size, without missing or repeating a
sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.randomness import Permutation, digest, keyed_seed


def order(seed: int, epoch: int, n: int) -> Permutation:
    """The order of the ``n`` samples in ``epoch``."""
    return Permutation(n, keyed_seed(seed, "epoch", epoch))


class Indexed(Protocol):
    """The order of one epoch: maps positions (int64 array) to samples (int64 array)."""

    def __getitem__(self, index: npt.NDArray[Any], /) -> npt.NDArray[Any]: ...


Order = Callable[[int, int, int], Indexed]
"""(seed, epoch, number of samples) → the order of that epoch."""


def sequential(seed: int, epoch: int, n: int) -> Indexed:
    """The samples in the order in which they are stored."""
    return _Identity()


class _Identity:
    def __getitem__(self, index: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(index, np.int64)


class ShardLocal:
    """An order for slow disks: blocks (partitions or shards) are shuffled, and samples are shuffled within groups of
    ``window`` blocks. Memory use depends only on the number of blocks.

    Args:
        starts: First sample of each block, followed by the number of samples; for a dataset, ``dataset.starts``.
        window: Number of blocks whose samples are shuffled together.
    """

    def __init__(self, starts: Sequence[int] | npt.NDArray[Any], window: int = 8) -> None:
        self.starts = np.asarray(starts, np.int64)
        if len(self.starts) < 2 or self.starts[0] != 0 or (np.diff(self.starts) < 0).any():
            raise ValueError("starts must increase from 0 to the number of samples")
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1")
        self.window = window

    def __call__(self, seed: int, epoch: int, n: int) -> Indexed:
        if n != self.starts[-1]:
            raise ValueError(f"the blocks hold {self.starts[-1]} samples, but there are {n}")
        return _Blocks(self.starts, self.window, keyed_seed(seed, "blocks", epoch))

    def __repr__(self) -> str:
        return f"ShardLocal({digest(0, str(self.starts.tolist())).hex()}, {self.window})"


class _Blocks:
    def __init__(self, starts: npt.NDArray[Any], window: int, seed: int) -> None:
        count = len(starts) - 1
        order = Permutation(count, seed)[np.arange(count)]
        self._firsts = starts[order]  # of the blocks in shuffled order
        self._ends = np.cumsum(np.diff(starts)[order])
        self._window = window
        self._seed = seed

    def __getitem__(self, index: npt.NDArray[Any]) -> npt.NDArray[Any]:
        index = np.asarray(index, np.int64)
        result = np.empty_like(index)
        windows = np.searchsorted(self._ends, index, "right") // self._window
        for window in np.unique(windows):
            first = int(window) * self._window
            last = min(first + self._window, len(self._ends)) - 1
            start = int(self._ends[first - 1]) if first else 0
            chosen = windows == window
            permutation = Permutation(int(self._ends[last]) - start, keyed_seed(self._seed, "window", int(window)))
            places = start + permutation[index[chosen] - start]
            blocks = np.searchsorted(self._ends, places, "right")
            before = np.where(blocks > 0, self._ends[blocks - 1], 0)
            result[chosen] = self._firsts[blocks] + places - before
        return result


class Stream(Protocol):
    """An endless sequence of samples with random access."""

    n: int
    """Samples in an epoch."""

    def samples(self, places: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The samples (int64) at these positions of the stream."""
        ...


class Epochs:
    """Epochs of ``n`` samples, one after the other, each in its own order.

    Args:
        order: Computes the order of an epoch; by default, a full shuffle.
    """

    def __init__(self, n: int, seed: int, order: Order = order) -> None:
        if n < 1:
            raise ValueError("there are no samples to train on")
        self.n = n
        self.seed = seed
        self.order = order
        self._known: dict[int, Indexed] = {}

    def _order_of(self, epoch: int) -> Indexed:
        if epoch not in self._known:
            self._known = {known: found for known, found in self._known.items() if known == epoch - 1}
            self._known[epoch] = self.order(self.seed, epoch, self.n)
        return self._known[epoch]

    def samples(self, places: npt.NDArray[Any]) -> npt.NDArray[Any]:
        epochs, within = places // self.n, places % self.n
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self._order_of(int(epoch))[within[chosen]]
        return samples

    def __repr__(self) -> str:
        name = getattr(self.order, "__name__", repr(self.order))
        return f"Epochs({self.n}, {self.seed}, {name})"


class Parts:
    """The concatenation of several datasets, which gives each sample a number.

    Args:
        sizes: Number of samples of each dataset.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.starts = np.cumsum([0, *sizes])
        """First sample of each dataset, followed by the number of samples: int64 (parts + 1,)."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, samples: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """For each of ``samples``, the dataset that it is in and its position there, both int64."""
        owners = np.searchsorted(self.starts, samples, side="right") - 1
        return owners, samples - self.starts[owners]


class Weighted:
    """Samples of several datasets, numbered as in :class:`Parts`, in epochs in which samples of weight 2 are used twice
    as often as samples of weight 1.

    In an epoch, each sample of the dataset with the smallest weight is used once. If another weight is not a multiple
    of it, some samples of that dataset, chosen by the seed, are used once more than the others.

    Args:
        sizes: samples of each dataset.
        weights: Weight of each dataset, above 0.
        least: Weight of samples that are used once in an epoch (0: the smallest of the weights).
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, least: float = 0.0) -> None:
        least = least or min(weights)
        self.parts = Parts(sizes)
        self._turns = Parts([max(n > 0, round(n * weight / least)) for n, weight in zip(sizes, weights, strict=True)])
        self._orders = [Permutation(n, keyed_seed(seed, "mix", number)) for number, n in enumerate(sizes)]

    def __len__(self) -> int:
        """Number of samples in an epoch, including repetitions."""
        return len(self._turns)

    def samples(self, places: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The samples (int64) at these positions of an epoch."""
        owners, turns = self._turns.locate(places)
        found = np.empty_like(turns)
        for number in np.unique(owners):
            mine = owners == number
            order = self._orders[number]
            found[mine] = self.parts.starts[number] + order[turns[mine] % len(order)]
        return found

    def seen(self, places: npt.NDArray[Any], epochs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A number for each use of a sample, int64, distinct for all places with the same sample, in this epoch and all
        others."""
        owners, turns = self._turns.locate(places)
        sizes = np.array([max(1, len(order)) for order in self._orders], np.int64)[owners]
        in_an_epoch = -(-np.diff(self._turns.starts)[owners] // sizes)
        found: npt.NDArray[Any] = epochs * in_an_epoch + turns // sizes
        return found


class Mixture:
    """Several datasets, mixed by weight; samples are numbered as in :class:`Parts`.

    In each block of ``block`` positions, every dataset has its share to within one sample, and the shares are exact in
    the long run; positions within a block are shuffled. Each dataset has its own epochs, in which every sample is used
    once. An epoch of the mixture has as many samples as all datasets together.

    Args:
        streams: One stream for each dataset.
        weights: Positive numbers, which need not sum to 1.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], seed: int, block: int = 1024) -> None:
        if len(streams) != len(weights) or not streams:
            raise ValueError(f"{len(streams)} datasets and {len(weights)} weights: give one weight for each dataset")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights={list(weights)}: must be positive")
        self.streams = list(streams)
        self.n = sum(stream.n for stream in streams)
        self.seed = seed
        self._block = block
        self._weights = [Fraction(weight) for weight in weights]
        total = sum(self._weights)
        self._shares = [sum(self._weights[: i + 1], Fraction(0)) / total for i in range(len(streams))]  # cumulative
        self._firsts = Parts([stream.n for stream in streams]).starts

    def _given(self, block: int) -> npt.NDArray[Any]:
        """Number of positions of each dataset before ``block``: int64 (datasets,)."""
        bounds = [floor(share * block * self._block + Fraction(1, 2)) for share in self._shares]
        return np.diff([0, *bounds])

    def samples(self, places: npt.NDArray[Any]) -> npt.NDArray[Any]:
        places = np.asarray(places, np.int64)
        result = np.empty_like(places)
        blocks = places // self._block
        for block in np.unique(blocks):
            chosen = blocks == block
            before, after = self._given(int(block)), self._given(int(block) + 1)
            owners = np.repeat(np.arange(len(self.streams)), after - before)
            shuffled = Permutation(self._block, keyed_seed(self.seed, "mixture", int(block)))
            owners = owners[shuffled[np.arange(self._block)]]
            wanted = places[chosen] - int(block) * self._block
            found = np.empty(len(wanted), np.int64)
            for number, stream in enumerate(self.streams):
                mine = owners == number
                rank = np.cumsum(mine) - 1  # earlier positions of this dataset in the block
                here = mine[wanted]
                found[here] = self._firsts[number] + stream.samples(before[number] + rank[wanted[here]])
            result[chosen] = found
        return result

    def __repr__(self) -> str:
        return f"Mixture({self.streams}, {[str(w) for w in self._weights]}, {self.seed}, {self._block})"


@dataclass
class Sampler:
    """Divides a stream of samples into global batches, and these among the ranks.

    Args:
        n: Number of samples.
        batch_size: Number of samples per step, over all ranks.
        position: Number of samples used by earlier steps, over all ranks and epochs. This is the whole state.
        stream: The samples in their order; by default, epochs that are shuffled by the seed.
        epochs: Stop after this many epochs; the last batches may then be smaller, and empty on some ranks if fewer
            samples than ranks are left. 0: never stop.
    """

    n: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    position: int = 0
    stream: Stream | None = None
    epochs: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("there are no samples to train on")
        if self.batch_size < self.world_size:
            raise ValueError(
                f"batch_size={self.batch_size} is less than one sample for each of {self.world_size} ranks"
            )
        if self.stream is not None and self.stream.n != self.n:
            raise ValueError(f"the stream is of {self.stream.n} samples, not of {self.n}")
        self._stream = self.stream or Epochs(self.n, self.seed)

    @property
    def epoch(self) -> int:
        return self.position // self.n

    @property
    def finished(self) -> bool:
        """Whether all requested epochs are done."""
        return self.epochs > 0 and self.position >= self.n * self.epochs

    def _size(self) -> int:
        """Size of the next global batch; leaves no samples, or (if possible) enough for all ranks."""
        if not self.epochs:
            return self.batch_size
        left = self.n * self.epochs - self.position
        size = min(self.batch_size, left)
        missing = self.world_size - (left - size)
        return size - missing if 0 < missing < self.world_size <= size - missing else size

    def slots(self) -> npt.NDArray[Any]:
        """This rank's positions (int64, contiguous) in the next global batch; sizes of ranks differ by at most one."""
        size = self._size()
        first, last = (size * r // self.world_size for r in (self.rank, self.rank + 1))
        return np.arange(first, last)

    def positions(self) -> npt.NDArray[Any]:
        """The samples (int64) of this rank in the next step; a batch may extend into the next epoch."""
        return self._stream.samples(self.position + self.slots())

    def seen(self) -> npt.NDArray[Any]:
        """In how many earlier epochs each sample was used, int64 (b,)."""
        seen: npt.NDArray[Any] = (self.position + self.slots()) // self.n
        return seen

    def advance(self) -> None:
        """Move on to the next batch."""
        self.position += self._size()

    def state(self) -> dict[str, int]:
        state = {"seed": self.seed, "n": self.n, "epoch": self.epoch, "position": self.position}
        return state | ({"stream": keyed_seed(0, repr(self.stream))} if self.stream is not None else {})

    def load(self, state: Mapping[str, int]) -> None:
        """Resume where ``state`` was taken.

        Raises:
            ValueError: The state was taken with other data, another seed or another order.
        """
        mine = self.state()
        for name in ("seed", "n", "stream"):
            if state.get(name) != mine.get(name):
                raise ValueError(
                    f"cannot resume: the checkpoint has {name}={state.get(name)}, this run has {name}={mine.get(name)}"
                )
        self.position = state["position"]
