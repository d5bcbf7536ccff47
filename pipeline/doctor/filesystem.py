"""Checks the file system of data_dir: what commits need, space, speed; and, from several nodes at once, whether they
see the same files, whether exactly one wins a race of renames, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pipeline import storage
from pipeline.doctor.finding import Finding, State

_FILES = 200  # files created and removed to measure the speed
_BLOCK = 2**22
_BLOCKS = 16
_LEAST_BYTES = 2**33
_LEAST_INODES = 100_000
_SLOW_NAMES = 50.0  # operations per second; a commit takes about ten operations
_LATE = 5.0  # seconds until a new name must be visible on other nodes
_SKEW, SKEW_FAIL = 2.0, 60.0  # seconds of clock skew; munge rejects credentials at five minutes


class Others(Protocol):
    """Communication with the other ranks, for checks from several nodes at once."""

    rank: int
    members: list[int]

    def wait(self, name: str) -> None: ...
    def say(self, key: str, value: str) -> None: ...
    def ask(self, key: str) -> str: ...


def look(data_dir: str, alone: bool) -> Iterator[Finding]:
    """Run the checks of a single rank; ``alone``: also measure the speed, which only one rank at a time can do."""
    path = Path(data_dir)
    if not path.is_dir():
        yield Finding(
            "data_dir",
            "fail",
            f"{data_dir}: {_why_absent(path)}",
            "mount it on every node, or give the path that all see",
        )
        return
    try:
        with storage.Folder.open(path) as folder:
            storage.probe(folder)
    except storage.StorageError as error:
        yield Finding("data_dir", "fail", str(error), "choose a POSIX file system: local disk, NFS, Lustre, GPFS")
        return
    except OSError as error:
        yield Finding("data_dir", "fail", f"{data_dir}: {error.strerror}", _advice(error))
        return
    kind = _kind(path)
    yield Finding("data_dir", "ok", f"{data_dir} ({kind}): folder renames and syncs work as commits require")
    yield from room(path)
    yield clock(path)
    if alone:
        yield speed(path)


def _why_absent(path: Path) -> str:
    if path.exists():
        return "it is not a folder"
    parent = next(folder for folder in path.parents if folder.exists())
    return f"it does not exist (the path ends at {parent})"


def _advice(error: OSError) -> str:
    if error.errno == errno.EROFS:
        return "it is mounted read-only: remount it, or leave that node out (exclude=)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"user {os.getuid()} may not write there: chown or chmod it, or choose another data_dir"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no room, or the quota is used up: delete something, or choose another data_dir"
    return "look at the mount on that node"


def _kind(path: Path) -> str:
    """The type of the file system, from /proc/self/mounts."""
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split(" ")
        if path.resolve().is_relative_to(where) and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]


def room(path: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(path).free
    status = os.statvfs(path)
    text = f"{free / 2**30:.1f} GiB free"
    yield Finding("space", "ok" if free > _LEAST_BYTES else "warn", text, "" if free > _LEAST_BYTES else "make room")
    if status.f_files:  # file systems that create inodes as needed report 0
        state = "ok" if status.f_favail > _LEAST_INODES else "warn"
        advice = "" if state == "ok" else "a partition takes a few files: larger partitions, or ask for a higher quota"
        yield Finding("inodes", "ok" if state == "ok" else "warn", f"{status.f_favail:,} inodes free", advice)


def clock(path: Path) -> Finding:
    """Compare this machine's clock with the file server's, which sets modification times."""
    name = path / f".latentmill-doctor-clock-{os.getpid()}-{time.monotonic_ns()}"
    try:
        before = time.time()
        name.write_bytes(b"x")
        after = time.time()
        stamp = name.stat().st_mtime
    finally:
        name.unlink(missing_ok=True)
    skew = stamp - after if stamp > after else min(0.0, stamp - before)
    text = (
        f"{abs(skew):.1f} s {'behind' if skew > 0 else 'ahead of'} the file server's"
        if abs(skew) > 0.1
        else "as the file server's"
    )
    if abs(skew) > _SKEW:
        state: State = "fail" if abs(skew) > SKEW_FAIL else "warn"
        return Finding("clock", state, text, "run chrony or ntpd there", {"skew": skew})
    return Finding("clock", "ok", text, values={"skew": skew})


def speed(path: Path) -> Finding:
    """Measure files created and removed per second, and bytes written and synced per second."""
    folder = path / f".latentmill-doctor-speed-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        begin = time.perf_counter()
        for number in range(_FILES):
            (folder / str(number)).touch()
        for number in range(_FILES):
            (folder / str(number)).unlink()
        names = 2 * _FILES / (time.perf_counter() - begin)
        block = os.urandom(_BLOCK)
        begin = time.perf_counter()
        with (folder / "data").open("wb") as file:
            for _ in range(_BLOCKS):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = _BLOCK * _BLOCKS / (time.perf_counter() - begin)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = f"{names:,.0f} names a second, {written / 1e6:,.0f} MB/s written"
    values = {"names": names, "written": written}
    if names < _SLOW_NAMES:
        return Finding("file system speed", "warn", text, "larger partitions, fewer ranks; is the server busy?", values)
    return Finding("file system speed", "ok", text, values=values)


# ---- from several nodes at once


def look_together(data_dir: str, name: str, others: Others, patience: float) -> Iterator[Finding]:
    """Check that all members see the same files and how soon, that one wins a race of renames, and that locks hold."""
    folder = Path(data_dir) / f".latentmill-doctor-{name}"
    first = others.rank == others.members[0]
    usable = True
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"here-{others.rank}").write_text("x")
    except OSError:
        usable = False  # already reported by look()
    others.say(f"writes/{others.rank}", "yes" if usable else "")
    others.wait("written")
    writers = [rank for rank in others.members if others.ask(f"writes/{rank}")]
    try:
        if usable and len(writers) > 1:
            yield from _visible(folder, writers, others, patience)
        others.wait("seen")
        if usable and len(writers) > 1:
            yield from _race(folder, others, writers)
            yield from _locks(folder, others, writers)
    finally:
        others.wait("done")
        if first or usable:
            shutil.rmtree(folder, ignore_errors=True)


def _visible(folder: Path, writers: list[int], others: Others, patience: float) -> Iterator[Finding]:
    begin = time.monotonic()
    missing = set(writers)
    while missing and time.monotonic() - begin < patience:
        missing -= {rank for rank in missing if (folder / f"here-{rank}").exists()}
        if missing:
            with suppress(OSError):
                os.listdir(folder)  # makes NFS ask the server again
            time.sleep(0.05)
    took = time.monotonic() - begin
    if missing:
        text = f"after {patience:g} s without the files of ranks {', '.join(map(str, sorted(missing)))}"
        advice = "these nodes have different folders under this path: look at the mounts (df, mount)"
        yield Finding("same data_dir", "fail", text, advice, {"unseen": sorted(missing)})
    elif took > _LATE:
        advice = "a stage waits this long for files of other ranks; mount with a shorter attribute cache (acdirmax=)"
        yield Finding(
            "same data_dir", "warn", f"files of other ranks were seen after {took:.1f} s", advice, {"delay": took}
        )
    else:
        yield Finding(
            "same data_dir", "ok", f"files of other ranks were seen after {took:.2f} s", values={"delay": took}
        )


def _race(folder: Path, others: Others, writers: list[int]) -> Iterator[Finding]:
    """Let all ranks rename their own folders to the same name; exactly one must succeed."""
    won = False
    with storage.Folder.open(folder) as parent:
        attempt = f"attempt-{others.rank}"
        parent.mkdir(attempt)
        with parent.folder(attempt) as inside:
            inside.write_new("proof", str(others.rank).encode())
        others.say(f"ready/{others.rank}", "yes")
        _poll(lambda: all(others.ask(f"ready/{rank}") for rank in writers))
        won = storage.commit(parent, attempt, "final", "proof")
    others.say(f"won/{others.rank}", "yes" if won else "no")
    if others.rank == writers[0]:
        _poll(lambda: all(others.ask(f"won/{rank}") for rank in writers))
        winners = [rank for rank in writers if others.ask(f"won/{rank}") == "yes"]
        if len(winners) == 1:
            yield Finding("exclusive rename", "ok", f"of {len(writers)} ranks that renamed to one name, one won")
        else:
            text = f"{len(winners)} of {len(writers)} ranks won a rename that only one can win"
            yield Finding("exclusive rename", "fail", text, "results could be lost: choose another file system")


def _locks(folder: Path, others: Others, writers: list[int]) -> Iterator[Finding]:
    """Check that a lock held by one rank excludes another rank."""
    path = folder / "lock"
    if others.rank == writers[0]:
        with path.open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                others.say("locked", "yes")
            except OSError as error:
                others.say("locked", f"no: {error.strerror}")
            _poll(lambda: bool(others.ask("tried")))
        said = others.ask("tried")
        good = said == "held"
        advice = "" if good else "Latentmill needs none, but caches of the Hub do: HF_HOME on another file system"
        yield Finding(
            "locks", "ok" if good else "warn", "hold between nodes" if good else f"do not hold: {said}", advice
        )
    elif others.rank == writers[1]:
        _poll(lambda: bool(others.ask("locked")))
        said = others.ask("locked")
        if said == "yes":
            try:
                with path.open("r+") as file:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                said = "two ranks got the same lock"
            except OSError as error:
                said = "held" if error.errno in (errno.EACCES, errno.EAGAIN) else str(error.strerror)
        others.say("tried", said)


def _poll(ready: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError("another rank did not answer")
        time.sleep(0.01)
