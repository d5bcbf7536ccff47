"""A counter of a rank's progress, for the watchdog and for telemetry."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.distributed.rank import Rank

_MOVED = 1 << 20  # bytes read or written that count as progress: more than heartbeats, less than a long download


class Progress:
    """Detects whether a rank makes progress: it completes a step of its work, or reads or writes a mebibyte."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._steps = rank.steps
        self._moved = sum(bytes_moved())

    def made(self) -> bool:
        """Whether there was progress since the last call that returned True."""
        if self._rank.steps == self._steps and sum(bytes_moved()) - self._moved < _MOVED:
            return False
        self._steps, self._moved = self._rank.steps, sum(bytes_moved())
        return True


def bytes_moved() -> tuple[int, int]:
    """Bytes that this process has read and written; zeros if the system does not report them."""
    with suppress(OSError, ValueError), open("/proc/self/io") as file:
        said = dict(line.split(":") for line in file)
        return int(said.get("rchar", 0)), int(said.get("wchar", 0))
    return 0, 0
