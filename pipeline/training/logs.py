"""What a run tells of itself: one JSON object a line, one file for each life of the run."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from pipeline.storage import Folder


class TrainingLog:
    """Appends to ``logs/<life>.jsonl`` of a run's folder.

    Where lives overlap (one was killed after its last checkpoint), readers take the newer file's lines.
    """

    def __init__(self, run: Folder, life: str) -> None:
        run.mkdir("logs", exist_ok=True)
        self._folder = run.folder("logs")
        self._name = f"{life}.jsonl"

    def write(self, **values: Any) -> None:
        """One line; numbers that JSON cannot say (NaN, infinite) become null."""
        line = {name: _said(value) for name, value in {"time": round(time.time(), 3), **values}.items()}
        self._folder.append(self._name, (json.dumps(line) + "\n").encode())


def _said(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Mean loss and speed between two log lines."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._losses: list[float] = []
        self._samples = 0

    def add(self, loss: float, samples: int) -> None:
        self._losses.append(loss)
        self._samples += samples

    def read(self) -> dict[str, float]:
        """``loss`` and ``samples_per_second`` since the last call."""
        now = time.monotonic()
        values = {
            "loss": sum(self._losses) / max(1, len(self._losses)),
            "samples_per_second": round(self._samples / max(1e-9, now - self._start), 2),
        }
        self._start, self._losses, self._samples = now, [], 0
        return values
