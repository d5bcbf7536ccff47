"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST = 32 << 20  # maximum value of the second parameter


def keep_freed_memory(most: int = 1 << 28) -> None:
    """Let this process keep up to ``most`` freed bytes instead of returning them to the system.

    Getting new pages from the system takes longer than reading an image into them. No effect without glibc.
    """
    with suppress(AttributeError):
        set_parameter = ctypes.CDLL(None).mallopt
        set_parameter(_MMAP_THRESHOLD, _LARGEST)
        set_parameter(_TRIM_THRESHOLD, most)
