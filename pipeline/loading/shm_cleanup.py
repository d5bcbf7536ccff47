"""Removes shared memory of crashed runs of StreamingDataset, which would block the next run."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_SHARED = Path("/dev/shm")
_PROCESSES = Path("/proc")


def remove_stale(names: list[str], shared: Path = _SHARED) -> list[str]:
    """Remove this user's shared memory ``<six digits>_<one of names>`` unless a running process has it mapped.

    The digits identify a run; if any of its memory is in use, all of it is kept. Unlike streaming's own
    ``clean_stale_shared_memory``, this does not affect other jobs on the machine.

    Returns:
        Names of the files removed.
    """
    if not _PROCESSES.is_dir():
        return []  # running processes are unknown
    ours = re.compile(rf"(\d{{6}})_({'|'.join(map(re.escape, names))})")
    found = [match for match in map(ours.fullmatch, _names_in(shared)) if match and _is_mine(shared / match[0])]
    used = {match[1] for name in _mapped(shared) if (match := ours.fullmatch(name))} if found else set()
    removed = []
    for match in found:
        if match[1] not in used:
            with suppress(FileNotFoundError):  # another rank has removed it
                (shared / match[0]).unlink()
            removed.append(match[0])
    return sorted(removed)


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _is_mine(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return path.stat().st_uid == os.geteuid()
    return False


def _mapped(shared: Path) -> set[str]:
    """Names of the files in ``shared`` that processes have mapped."""
    names: set[str] = set()
    pattern = re.compile(rf"{re.escape(str(shared))}/(\S+)$", re.MULTILINE)
    for process in _PROCESSES.glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            names.update(pattern.findall((process / "maps").read_text(errors="replace")))
    return names
