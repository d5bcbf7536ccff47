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
"""Suffix of the older part of a log."""
LIMIT = "LATENTMILL_LOG_MEGABYTES"
"""Environment variable, set by the launchers: maximum megabytes of a rank's log in one file."""


def limit() -> int:
    """Maximum bytes of this process's log in one file, from :data:`LIMIT`; 0 or not set: no limit.

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
    """Continue in a new file if the log of this process has more than ``most`` bytes; the full one becomes ``<log>.1``
    and replaces the previous ``<log>.1``.

    Processes that share a log may all call this: one of them renames it, the others follow. A log that is not a
    ``*.log`` file (a terminal, a pipe) or cannot be renamed stays unchanged. Child processes that were started before
    keep writing to the older file.
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
                # otherwise it was already renamed, for the other stream or by another process
                _reopen(descriptor, log, first)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Context that only one of the processes that share the log at ``path`` can enter at a time.

    On a file system without locks, all can enter; if two rename the log at once, its older part is lost.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reopen(descriptor: int, path: Path, first: str) -> None:
    """Redirect ``descriptor`` to ``path``, and write the line ``first`` there."""
    new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        os.write(new, first.encode())
        os.dup2(new, descriptor)
    finally:
        os.close(new)
