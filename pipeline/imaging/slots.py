"""Memory that a process shares with its workers, divided into slots of equal size."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt


class Slots:
    """``count`` slots of ``size`` bytes. The memory has no name that could outlive the processes: it is a memfd.

    Attributes:
        memory: uint8 (count, size).
        descriptor: of the memfd, for workers to inherit.
    """

    def __init__(self, count: int, size: int) -> None:
        self.descriptor = os.memfd_create("latentmill")
        self.close = weakref.finalize(self, os.close, self.descriptor)
        """Close the descriptor; the memory lives as long as somebody refers to it."""
        os.ftruncate(self.descriptor, max(1, count * size))
        self.memory = mapped(self.descriptor, (count, size))


def mapped(descriptor: int, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """uint8 of ``shape`` (count, size) in the memfd ``descriptor``."""
    count = shape[0] * shape[1]
    return np.frombuffer(mmap.mmap(descriptor, max(1, count)), np.uint8)[:count].reshape(shape)
