"""A file that tells status.py that a command runs several stages, so that it keeps watching between two of them."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_EVERY = 5.0  # seconds between updates of the file's modification time
_STALE = 30.0  # seconds without an update after which the command counts as dead
_NAME = "submission."


class Submission:
    """Context: keeps a file in ``logs/`` next to the first output that says which of how many stages is running.

    Args:
        first: Output of the first stage that has one; None: no file is written.
        stages: Names of the stages, in order.
    """

    def __init__(self, first: Path | None, stages: Iterable[str]) -> None:
        self._stages = list(stages)
        self._path = first.parent / "logs" / f"{_NAME}{socket.gethostname()}.{os.getpid()}.json" if first else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Submission:
        if self._path and len(self._stages) > 1:
            self._thread.start()
        else:
            self._path = None
        return self

    def at(self, number: int) -> None:
        """Write that stage ``number``, counted from 1, begins."""
        if self._path is None:
            return
        said = {"host": socket.gethostname(), "pid": os.getpid(), "stages": self._stages, "at": number}
        attempt = self._path.with_name(f".{self._path.name}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            attempt.write_text(json.dumps(said))
            os.replace(attempt, self._path)

    def _live(self) -> None:
        while not self._over.wait(_EVERY):
            with suppress(OSError):
                os.utime(self._path or "")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._over.set()
            self._thread.join()
            self._path.unlink(missing_ok=True)


def going_on(logs: Iterable[Path]) -> str:
    """The progress of a live command with a file in one of these folders, ``stage 2 of 3, shard, of a command on
    node1``; empty if there is none."""
    for folder in logs:
        with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            for path in folder.glob(f"{_NAME}*.json"):
                said = json.loads(path.read_text())
                if _lives(path, str(said["host"]), int(said["pid"])):
                    at, stages = int(said["at"]), list(said["stages"])
                    return f"stage {at} of {len(stages)}, {stages[at - 1]}, of a command on {said['host']}"
    return ""


def _lives(path: Path, host: str, process: int) -> bool:
    if host == socket.gethostname():
        return Path(f"/proc/{process}").exists()
    return time.time() - path.stat().st_mtime < _STALE
