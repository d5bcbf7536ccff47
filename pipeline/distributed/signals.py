"""Signals, which set a flag that is read at safe boundaries, and the exit codes of a rank."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""Stopped by a signal at a safe boundary; the same command resumes (``EX_TEMPFAIL`` of sysexits.h: try again later)."""
EXIT_PEER = 76
"""Ended only because another rank failed, whose log has the reason."""
EXIT_HUNG = 77
"""Ended by its own watchdog because it made no progress; the log says where it was stuck."""
EXIT_STORAGE = 74
"""The file system cannot be written (full, quota, read-only, no permission); retrying will not help (``EX_IOERR``)."""
EXIT_ENVIRONMENT = 78
"""Python or a required module is missing on this node (``EX_CONFIG``)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Stopped(SystemExit):
    """Raised at a safe boundary after a signal: all work is saved, and the same command resumes."""

    def __init__(self, message: str = "stopped at a safe boundary; the same command resumes") -> None:
        super().__init__(message)
        self.message = message
        self.code: int = EXIT_STOPPED

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """Context in which SIGTERM, SIGUSR2 and the first SIGINT only set a flag; the second SIGINT interrupts.

    SLURM, torchrun and people may send each of them several times. Only the main thread can install signal handlers:
    in other threads, this does nothing.
    """

    def __init__(self) -> None:
        self.received = ""
        """Name of the first signal received; empty if there was none."""
        self._interrupted = False
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._take) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not installed from Python

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # a forked worker that did not call ignore_signals(): with only a flag, it could not be terminated
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True


def ignore_signals(_worker: int = 0) -> None:
    """Make a worker process ignore signals that are meant for its rank. Call it first in the worker.

    SLURM signals every process of a step, and a terminal every process of its foreground job: without this, workers
    would die while their rank still finishes its work. SIGTERM from the parent process is obeyed, so that
    ``Process.terminate``, ``Pool.terminate`` and the end of a DataLoader work. Usable as ``worker_init_fn`` and as
    ``initializer``.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # a handler cannot find out which process sent a signal; a thread that waits for the signal can
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), name="signals", daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
