"""A local cache of remote files, shared by the processes of a machine and limited in size."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.config.schema import ConfigError
from pipeline.storage import StorageError
from pipeline.stores.errors import StoreError
from pipeline.stores.store import Object, Store

FOLDER, LIMIT = "LATENTMILL_CACHE", "LATENTMILL_CACHE_BYTES"
_BYTES = 64 << 30
_LOCKS = 4096  # files, so that their number does not grow
_SILENT = 3600.0  # seconds after which a file that nobody has locked is one that a killed process has left
_TRIES = 3  # of what others may evict between two steps


def cache_folder(given: str | Path = "") -> Path:
    """Where files go: as given, as the environment says, else below the system's temporary folder."""
    return Path(given or os.environ.get(FOLDER) or Path(tempfile.gettempdir(), f"latentmill-{os.geteuid()}"))


class Cache:
    """Files below a local folder. Those used longest ago go first; who has one open reads on.

    A file appears whole, and only one process brings it. A killed process leaves nothing that counts.

    Args:
        folder: by default that of :func:`cache_folder`.
        most_bytes: of all files in it, those on their way counted whole; 0: as the environment says, else 64 GiB.

    Raises:
        ConfigError: ``LATENTMILL_CACHE_BYTES`` is no number of bytes.
    """

    def __init__(self, folder: str | Path = "", most_bytes: int = 0) -> None:
        self.folder = cache_folder(folder)
        given = os.environ.get(LIMIT) or str(_BYTES)
        if not given.isdecimal() or not int(given):
            raise ConfigError(f"{LIMIT}={given}: expected a number of bytes")
        self.most_bytes = most_bytes or int(given)

    def file(self, name: str, size: int, bring: Callable[[Path], None]) -> Path:
        """The local file ``name``, a path below the folder, which ``bring`` makes where it is not there.

        Args:
            size: bytes that it will have; ``bring`` may take as many on the way.
            bring: fills an empty file.

        Raises:
            StorageError: there is no room; and what ``bring`` raises.
        """
        path = self.folder / name
        if self._used(path, size):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._lock(f"{hash_of(name) % _LOCKS:04x}")):
            if not self._used(path, size):
                self._bring(path, size, bring)
        return path

    def opened(self, name: str, size: int, bring: Callable[[Path], None]) -> int:
        """A descriptor of :meth:`file`, which others may evict at any time."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                return os.open(self.file(name, size, bring), os.O_RDONLY | os.O_CLOEXEC)
        raise self.full(size)

    def open(self, store: Store, found: Object) -> int:
        """A descriptor of a copy of an object, for reading; brings it here first if it is not."""
        name = hashlib.sha256(f"{store.name(found.path)}\0{found.etag}\0{found.size}".encode()).hexdigest()
        return self.opened(f"objects/{name[:2]}/{name}", found.size, lambda path: store.download(found, path))

    def full(self, size: int) -> StorageError:
        """What to say where files are evicted as soon as they come."""
        return StoreError(
            f"{self.folder}: no room for a file of {size} bytes among those in use: set cache_limit= or {LIMIT} to "
            f"more than {self.most_bytes}"
        )

    def _used(self, path: Path, size: int) -> bool:
        """Whether the file is there whole; it is then the one used last."""
        try:
            if os.stat(path).st_size != size:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _lock(self, name: str) -> Path:
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def _bring(self, path: Path, size: int, bring: Callable[[Path], None]) -> None:
        attempt = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with self._reserved(attempt, size):
                bring(attempt)
                with locked(self._lock("room")):  # whoever counts meets it under one of its names
                    os.replace(attempt, path)
        except OSError as error:
            raise StoreError(f"{self.folder}: no place for {path.name}: {error}") from error
        finally:
            attempt.unlink(missing_ok=True)

    @contextmanager
    def _reserved(self, attempt: Path, size: int) -> Iterator[None]:
        """Context: an empty file that counts as one of ``size`` bytes; its lock tells that somebody fills it."""
        with locked(self._lock("room")):
            self._make_room(size)
            fd = os.open(attempt, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.truncate(fd, size)
        try:
            yield
        finally:
            os.close(fd)

    def _make_room(self, size: int) -> None:
        """Delete what was used longest ago, and what killed processes have left, until ``size`` bytes fit."""
        total, entries = size, []
        for path in self._files():
            with suppress(OSError):
                if path.suffix == ".tmp" and _abandoned(path):
                    path.unlink()
                    continue
                state = path.stat()
                total += state.st_size
                if path.suffix != ".tmp":
                    entries.append((state.st_mtime_ns, state.st_size, path))
        for _, freed, path in sorted(entries):
            if total <= self.most_bytes:
                return
            with suppress(FileNotFoundError):
                path.unlink()
            total -= freed
        if total > self.most_bytes:
            raise self.full(size)

    def _files(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if name != ".locks"]
            yield from (Path(folder, name) for name in names)


def hash_of(name: str) -> int:
    """A number that is the same in all processes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def _abandoned(path: Path) -> bool:
    """Whether nobody fills this file any more. (Who does may have put another in its place, without a lock.)"""
    if time.time() - path.stat().st_mtime < _SILENT:
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among all threads and processes of this machine that lock ``path``; a lock dies with its process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
