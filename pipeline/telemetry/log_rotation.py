"""Rotation of the file behind standard output and standard error when it has grown large."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.config.schema import ConfigError

OLDER = ".1"
"""What the name of the older part of a log ends with."""
LIMIT = "LATENTMILL_LOG_MEGABYTES"
"""The launchers set this environment variable: megabytes of a rank's log that are kept in one file."""


def limit() -> int:
    """How many bytes of this process's log are kept in one file; 0, also where :data:`LIMIT` is not set: any number.

    Raises:
        ConfigError: the variable is not a number of megabytes.
    """
    text = os.environ.get(LIMIT) or "0"
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = -1.0
    if not 0 <= megabytes < float("inf"):
        raise ConfigError(f"{LIMIT}={text} is not a number of megabytes (0: no limit)")
    return int(megabytes * 1e6)


def rotate(most: int) -> None:
    """Go on in a new file if the log of this process has more than ``most`` bytes: the full one becomes ``<log>.1`` and
    replaces the one before it.

    Processes that share a log may all call this: one of them renames it, the others follow. What is no ``*.log`` file
    (a terminal, a pipe) or cannot be renamed stays as it is. Processes that were started before write on into the
    older file.
    """
    for descriptor in (1, 2) if most else ():
        with suppress(OSError):
            mine = os.fstat(descriptor)
            if not stat.S_ISREG(mine.st_mode) or mine.st_size <= most:
                continue
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)"))
            log = path.with_name(path.name.removesuffix(OLDER))
            if log.suffix != ".log":
                continue
            with _only_one(path):
                first = ""
                if path == log and log.exists() and os.path.samestat(log.stat(), mine):
                    older = log.with_name(log.name + OLDER)
                    log.rename(older)
                    first = f"(earlier lines: {older}; what was older is not kept)\n"
                # else renamed before: for the other stream, or by another process
                _reopen(descriptor, log, first)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Of the processes that share the log at ``path``, one at a time gets in.

    On a file system without locks all get in; if two rename the log at once, its older part is lost.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reopen(descriptor: int, path: Path, first: str) -> None:
    """Let the descriptor write to ``path``, after the line ``first``."""
    new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        os.write(new, first.encode())
        os.dup2(new, descriptor)
    finally:
        os.close(new)
