"""Reusable memory buffers."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST = 32 << 20  # that the second one takes


def keep_freed_memory(most: int = 1 << 28) -> None:
    """Let this process keep up to ``most`` bytes that it has freed: to get them again, page by page, takes the system
    longer than to read an image into them. Without effect where the C library is not glibc."""
    with suppress(AttributeError):
        set_parameter = ctypes.CDLL(None).mallopt
        set_parameter(_MMAP_THRESHOLD, _LARGEST)
        set_parameter(_TRIM_THRESHOLD, most)
