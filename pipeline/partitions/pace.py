"""Limits how often an idle rank accesses the file system."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Allows ``burst`` operations at once, and ``rate`` operations per second in the long run.

    Args:
        clock: a monotonic clock in seconds; default: ``time.monotonic``.
    """

    def __init__(self, rate: float = 1.5, burst: int = 500, clock: Callable[[], float] | None = None) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock or time.monotonic
        self._left = float(burst)
        self._at = self._clock()

    def spend(self, operations: int) -> float:
        """Record this many operations and return the seconds to wait before the next ones."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - operations
        self._at = now
        return max(0.0, -self._left / self._rate)
