"""Memory shared between a process and its workers, divided into slots of equal size."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNED = 64  # bytes


def starts_of(sizes: Iterable[int]) -> list[int]:
    """Byte offset of each part of a slot, given the sizes of the parts, followed by the size of the slot."""
    return list(accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))


class Slots:
    """``count`` slots of ``size`` bytes in a memfd, which cannot outlive the processes.

    Attributes:
        memory: uint8 (count, size).
        descriptor: file descriptor of the memfd, which workers inherit.
    """

    def __init__(self, count: int, size: int) -> None:
        self.descriptor = os.memfd_create("latentmill")
        self.close = weakref.finalize(self, os.close, self.descriptor)
        """Close the descriptor; the memory is freed with its last mapping."""
        os.ftruncate(self.descriptor, max(1, count * size))
        self.memory = mapped(self.descriptor, (count, size))


def mapped(descriptor: int, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """Map the memfd ``descriptor`` as a uint8 array of ``shape`` (count, size)."""
    count = shape[0] * shape[1]
    return np.frombuffer(mmap.mmap(descriptor, max(1, count)), np.uint8)[:count].reshape(shape)
