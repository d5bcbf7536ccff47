"""The slots of an epoch: which sample of which folder each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt

from pipeline.loading import Epochs, Mixture, Parts, ShardLocal, Stream, order, sequential
from pipeline.randomness import keyed_seed

BLOCK = 1024
"""Slots for which random numbers are generated at once, and in which weighted folders have their exact shares."""
MIXED = 1 << 15
"""Minimum number of samples that are shuffled among each other if shards are in an object store."""


@dataclass(frozen=True)
class Slots:
    """Which sample of which folder is in each slot of an epoch. An epoch has as many slots as there are samples.

    Without weights, every sample is in an epoch once. With weights, each block of 1024 slots contains samples of the
    folders in these proportions, and each folder is repeated, with every sample once per round.

    Attributes:
        sizes: Number of samples of each folder.
        blocks: For each folder, the first sample of each shard, followed by the number of samples. Samples are then
            shuffled within a window of shards, so that few shards are needed at a time. If empty, all samples are
            shuffled.
    """

    sizes: tuple[int, ...]
    seed: int
    shuffle: bool = True
    weights: tuple[float, ...] = ()
    blocks: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    def samples(self, epoch: int, slots: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Folder and position (int64 both) of each of the ``slots`` of ``epoch``."""
        return self._parts.locate(self._stream.samples(epoch * len(self) + slots))

    @property
    def order(self) -> str:
        """Name of the order, if it is not the default one. A position is only valid for the order that it was taken
        in."""
        if not self.shuffle:
            return "sequential"
        return repr([ShardLocal(starts) for starts in self.blocks]) if self.blocks else ""

    @cached_property
    def _parts(self) -> Parts:
        return Parts(self.sizes)

    @cached_property
    def _stream(self) -> Stream:
        if not self.weights:
            firsts = self._parts.starts.tolist()
            starts = [first + start for first, own in zip(firsts, self.blocks, strict=False) for start in own[:-1]]
            return self._epochs(len(self), self.seed, [*starts, len(self)])
        rounds = [
            self._epochs(n, keyed_seed(self.seed, "folder", number), self.blocks[number] if self.blocks else ())
            for number, n in enumerate(self.sizes)
        ]
        return Mixture(rounds, self.weights, self.seed, BLOCK)

    def _epochs(self, n: int, seed: int, starts: Sequence[int]) -> Epochs:
        if not self.shuffle:
            return Epochs(n, seed, sequential)
        if not self.blocks:
            return Epochs(n, seed, order)
        return Epochs(n, seed, ShardLocal(starts, shuffle_window(n, len(starts) - 1)))


def shuffle_window(samples: int, shards: int) -> int:
    """Number of shards in an object store among which samples are shuffled."""
    return max(8, -(-MIXED * shards // samples))
