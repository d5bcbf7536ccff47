"""Progress events: append-only JSON lines, one file per process, below ``events/`` of what the process works on.

Every event carries the process's totals so far, so that a reader needs only the last line of each file.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.storage import Folder

_PER_BUCKET = 1000


class Events:
    """The event file of one process."""

    def __init__(self, root: Folder, rank: int, world_size: int) -> None:
        self._root = root
        bucket = f"events/{rank // _PER_BUCKET:03d}"
        root.mkdir("events", exist_ok=True)
        root.mkdir(bucket, exist_ok=True)
        self._name = f"{bucket}/{rank:05d}.{uuid.uuid4().hex}.jsonl"
        self._fixed = {"rank": rank, "world_size": world_size, "host": socket.gethostname(), "pid": os.getpid()}
        job = {
            k: os.environ[v] for k, v in (("job", "SLURM_JOB_ID"), ("life", "SLURM_RESTART_COUNT")) if v in os.environ
        }
        self._fixed |= job
        self._begin = time.time()
        self.totals: Counter[str] = Counter()

    def emit(self, event: str, **values: Any) -> None:
        """Append one event; values must be JSON-able. A disk that refuses it does not stop the work."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        line = {
            "event": event,
            "time": time.time(),
            "begin": self._begin,
            "rss": memory,
            **self._fixed,
            "totals": dict(self.totals),
            **values,
        }
        try:
            self._root.append(self._name, json.dumps(line).encode() + b"\n")
        except OSError:
            self.totals["events_lost"] += 1


def last_events(root: Path) -> Iterator[dict[str, Any]]:
    """The newest event of every process that worked on ``root``; unreadable lines are skipped."""
    for path in sorted(root.glob("events/*/*.jsonl")):
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16384))
            lines = file.read().splitlines()
        for line in reversed(lines):
            try:
                yield json.loads(line)
                break
            except ValueError:
                continue
