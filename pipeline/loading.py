"""Which samples a training step sees, and how they come: keyed shuffle in O(1) memory, sampler, dataset of latents.

The order depends on (seed, epoch, number of samples) alone. The samples of all epochs form one endless stream; step
after step takes the next ``batch_size`` of it, and each rank its slice of that. So the state of the sampler is one
number, and a run may go on under another number of ranks (or with another batch size) without missing or repeating
a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np

from pipeline.randomness import digest, keyed_seed

if TYPE_CHECKING:
    import torch

_ROUNDS = 6
_MIN_BITS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64, Steele et al., OOPSLA 2014


class Permutation:
    """A pseudo-random permutation of ``range(n)`` that is computed, not stored.

    An alternating Feistel network permutes the next power of two; results outside of ``range(n)`` are sent through
    again until they fall inside ("cycle walking", Black and Rogaway, CT-RSA 2002). That is at most a few times,
    because n is more than half of the power of two (tiny n aside, where all is quick).

    Args:
        n: number of elements, at most 2^62.
        seed: any integer; equal seeds give equal permutations on every platform.
    """

    def __init__(self, n: int, seed: int) -> None:
        if not 0 <= n <= 2**62:
            raise ValueError(f"a permutation of {n} elements: expected 0 to 2^62")
        bits = max(_MIN_BITS, (n - 1).bit_length() if n else 0)
        self._n = n
        self._left = np.uint64(bits // 2)
        self._right = np.uint64(bits - bits // 2)
        keys = digest(seed, "permutation", n, size=8 * _ROUNDS)
        self._keys = np.frombuffer(keys, dtype="<u8").astype(np.uint64)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: np.ndarray) -> np.ndarray: ...

    def __getitem__(self, index: int | np.ndarray) -> int | np.ndarray:
        """Where ``index`` goes: an int for an int, int64 of the same shape for an integer array.

        Raises:
            IndexError: an index outside of [0, n).
        """
        given = np.asarray(index)
        if given.size and (given.min() < 0 or given.max() >= self._n):
            raise IndexError(f"index outside of a permutation of {self._n} elements")
        values = self._network(np.atleast_1d(given).astype(np.uint64))
        outside = np.flatnonzero(values >= self._n)
        while outside.size:
            values.flat[outside] = self._network(values.flat[outside])
            outside = outside[values.flat[outside] >= self._n]
        if isinstance(index, np.ndarray):
            return values.astype(np.int64).reshape(given.shape)
        return int(values[0])

    def __iter__(self) -> Iterator[int]:
        block = 1 << 16
        for start in range(0, self._n, block):
            yield from self[np.arange(start, min(start + block, self._n))].tolist()

    def _network(self, values: np.ndarray) -> np.ndarray:
        """One pass of the Feistel network over uint64 ``values``; a bijection of [0, 2^(left + right))."""
        left_mask, right_mask = ((np.uint64(1) << width) - np.uint64(1) for width in (self._left, self._right))
        left, right = values >> self._right, values & right_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                right = right ^ (_mix(left ^ key) & right_mask)
            else:
                left = left ^ (_mix(right ^ key) & left_mask)
        return (left << self._right) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit of uint64 ``values`` over all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


def order(seed: int, epoch: int, n: int) -> Permutation:
    """The order of the ``n`` samples in ``epoch``."""
    return Permutation(n, keyed_seed(seed, "epoch", epoch))


@dataclass
class Sampler:
    """Deals the endless stream of shuffled epochs out in global batches, and these to ranks.

    Args:
        n: number of samples.
        batch_size: samples per step over all ranks.
        position: samples that earlier steps took, over all ranks and epochs: all the state there is.
    """

    n: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    position: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("there are no samples to train on")
        if self.batch_size < self.world_size:
            raise ValueError(
                f"batch_size={self.batch_size} is less than one sample for each of {self.world_size} ranks"
            )

    @property
    def epoch(self) -> int:
        return self.position // self.n

    def slots(self) -> np.ndarray:
        """This rank's places (int64, contiguous) in the next global batch; ranks' sizes differ by one at most."""
        first, last = (self.batch_size * r // self.world_size for r in (self.rank, self.rank + 1))
        return np.arange(first, last)

    def positions(self) -> np.ndarray:
        """The samples (int64) that this rank takes in the next step; a batch may reach into the next epoch."""
        stream = self.position + self.slots()
        epochs, places = stream // self.n, stream % self.n
        samples = np.empty_like(stream)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = order(self.seed, int(epoch), self.n)[places[chosen]]
        return samples

    def advance(self) -> None:
        """The step is done: the next batch follows."""
        self.position += self.batch_size

    def state(self) -> dict[str, int]:
        return {"seed": self.seed, "n": self.n, "epoch": self.epoch, "position": self.position}

    def load(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: the state belongs to other data or to another seed, so its position means nothing here.
        """
        for name in ("seed", "n"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"cannot go on: the checkpoint has {name}={state[name]}, this run has {name}={getattr(self, name)}"
                )
        self.position = state["position"]


class Rows(Protocol):
    """Random access to stored samples; the readers in :mod:`pipeline.formats` have it."""

    def __len__(self) -> int: ...

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Samples with ``key``, ``caption``, ``caption_latents`` and ``latents_<resolution>`` (bytes)."""
        ...


class Batches(Protocol):
    """What the training loop reads from."""

    def __len__(self) -> int: ...

    def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]: ...


class LatentDataset:
    """Image latents and text states of stored samples, as tensors.

    Args:
        rows: the stored samples.
        image_shape: (channels, height, width) of the image latents.
        caption_shape: (length, width) of the text states.
        resolution: which ``latents_<resolution>`` column.
        dtype: how both are stored.
    """

    def __init__(
        self,
        rows: Rows,
        image_shape: tuple[int, int, int],
        caption_shape: tuple[int, int],
        resolution: int,
        dtype: str = "float16",
    ) -> None:
        self.rows = rows
        self.image_shape = image_shape
        self.caption_shape = caption_shape
        self.column = f"latents_{resolution}"
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
        """``image_latents`` (b, c, h, w) and ``caption_latents`` (b, l, d), float32 on the CPU, in the order asked for.

        Raises:
            ValueError: a sample lacks a column, or its bytes are not of the declared shape; names key and column.
        """
        import torch

        rows = self.rows.rows([int(position) for position in positions])
        image = np.stack([self._array(row, self.column, self.image_shape) for row in rows])
        caption = np.stack([self._array(row, "caption_latents", self.caption_shape) for row in rows])
        return {"image_latents": torch.from_numpy(image), "caption_latents": torch.from_numpy(caption)}

    def _array(self, row: Mapping[str, Any], column: str, shape: tuple[int, ...]) -> np.ndarray:
        if column not in row:
            raise ValueError(f"sample {row.get('key')!r} has no column {column!r}; it has {', '.join(sorted(row))}")
        values = np.frombuffer(row[column], dtype=self.dtype)
        if values.size != np.prod(shape):
            raise ValueError(f"sample {row.get('key')!r}: {column} holds {values.size} values, expected {shape}")
        return values.reshape(shape).astype(np.float32)
