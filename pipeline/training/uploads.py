"""The result of the last upload of a run, for submit.py and status.py."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

FILE = "upload.json"


def note(run: Path, repository: str, folder: Path, error: str) -> None:
    """Record that ``folder`` was uploaded, or why not. Never raises OSError."""
    attempt = run / f".{FILE}.{os.getpid()}"
    with suppress(OSError):
        attempt.write_text(json.dumps({"repository": repository, "folder": str(folder), "error": error}))
        os.replace(attempt, run / FILE)


def problem(run: Path) -> str:
    """The error of the run's last upload, with a command to repeat it; empty if it succeeded."""
    try:
        said = json.loads((run / FILE).read_text())
        error, repository, folder = (str(said[name]) for name in ("error", "repository", "folder"))
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    by_hand = f"huggingface-cli upload {repository} {folder}"
    return f"upload to hub_repo={repository} failed: {error}; {folder} is complete: {by_hand}" if error else ""
