"""Ends a rank that makes no progress, after logging where it is stuck, so that it can be restarted."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType

from pipeline.config.life import Life
from pipeline.distributed.ending import hard_exit
from pipeline.distributed.signals import EXIT_HUNG

_FAREWELL = 10.0  # seconds to report the hang, to a disk that may itself be the cause


class Watchdog:
    """Context: ends this process if it makes no progress for ``timeout`` seconds; 0: never.

    Time in which the whole process was stopped (a suspended job, Ctrl-Z) does not count and cannot be detected here;
    for that, the job script checks ``<rank>.alive`` (see :mod:`pipeline.config.life`).

    Args:
        moved: returns whether there was progress since the last call.
        tell: reports that this rank hung; may itself hang.
    """

    def __init__(self, timeout: float, moved: Callable[[], bool], life: Life, tell: Callable[[], None]) -> None:
        self._timeout = timeout
        self._moved = moved
        self._life = life
        self._tell = tell
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="latentmill-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            self._life.alive(self._timeout)  # here, because the work may freeze this process before the thread runs
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        tick = min(self._timeout / 10, 10.0)
        quiet = 0.0
        while not self._ended.wait(tick):
            self._life.alive(self._timeout)
            quiet += tick  # not measured by a clock, which continues while the process is stopped
            if self._moved():
                quiet = 0.0
            if quiet >= self._timeout:
                self._end()

    def _end(self) -> None:
        """Report the hang and exit, without the logging module: the main thread may hold its lock, or any other."""
        threading.Thread(target=self._force, daemon=True).start()
        os.write(2, f"no progress for {self._timeout:g} s (hang_timeout): this rank ends; its stack:\n".encode())
        faulthandler.dump_traceback(2, all_threads=True)
        self._life.ended(EXIT_HUNG, f"no progress for {self._timeout:g} s (hang_timeout)")
        self._tell()
        hard_exit(EXIT_HUNG)

    def _force(self) -> None:
        threading.Event().wait(_FAREWELL)
        os._exit(EXIT_HUNG)


def show_stacks_on_request() -> None:
    """Let SIGUSR1 make a rank write all its stacks to stderr, even if it is stuck in C: ``scancel --signal=USR1``."""
    if threading.current_thread() is threading.main_thread():
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=False)
