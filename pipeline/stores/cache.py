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
_LOCKS = 4096  # lock files, which several cached files share
_SILENT = 3600.0  # seconds after which an unlocked temporary file counts as left by a killed process
_TRIES = 3  # attempts to open a file that other processes may evict


def cache_folder(given: str | Path = "") -> Path:
    """The cache folder: ``given``, else ``LATENTMILL_CACHE``, else a folder in the system's temporary folder."""
    return Path(given or os.environ.get(FOLDER) or Path(tempfile.gettempdir(), f"latentmill-{os.geteuid()}"))


class Cache:
    """Files in a local folder, of which the least recently used are evicted; open files stay readable.

    A file appears only once it is complete, and only one process fetches it. Leftovers of killed processes are ignored.

    Args:
        folder: default: :func:`cache_folder`.
        most_bytes: limit for all files in it, including those being fetched; 0: ``LATENTMILL_CACHE_BYTES``, else
            64 GiB.

    Raises:
        ConfigError: ``LATENTMILL_CACHE_BYTES`` is not a number of bytes.
    """

    def __init__(self, folder: str | Path = "", most_bytes: int = 0) -> None:
        self.folder = cache_folder(folder)
        given = os.environ.get(LIMIT) or str(_BYTES)
        if not given.isdecimal() or not int(given):
            raise ConfigError(f"{LIMIT}={given}: expected a number of bytes")
        self.most_bytes = most_bytes or int(given)

    def file(self, name: str, size: int, bring: Callable[[Path], None]) -> Path:
        """The path of the cached file ``name``, relative to the folder; ``bring`` fetches it if it is missing.

        Args:
            size: its size in bytes.
            bring: called with the path of a temporary file of this size, to write the content.

        Raises:
            StorageError: there is no room. Exceptions of ``bring`` are passed on.
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
        """An open descriptor of :meth:`file`, which stays readable if other processes evict the file."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                return os.open(self.file(name, size, bring), os.O_RDONLY | os.O_CLOEXEC)
        raise self.full(size)

    def open(self, store: Store, found: Object) -> int:
        """A descriptor of a local copy of an object, for reading; downloads the object first if needed."""
        name = hashlib.sha256(f"{store.name(found.path)}\0{found.etag}\0{found.size}".encode()).hexdigest()
        return self.opened(f"objects/{name[:2]}/{name}", found.size, lambda path: store.download(found, path))

    def full(self, size: int) -> StorageError:
        """The error for files that do not fit or are evicted as soon as they arrive."""
        return StoreError(
            f"{self.folder}: no room for a file of {size} bytes among those in use: set cache_limit= or {LIMIT} to "
            f"more than {self.most_bytes}"
        )

    def _used(self, path: Path, size: int) -> bool:
        """Whether the file is complete; if so, marks it as the most recently used."""
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
                with locked(self._lock("room")):  # so that _make_room counts it exactly once
                    os.replace(attempt, path)
        except OSError as error:
            raise StoreError(f"{self.folder}: no place for {path.name}: {error}") from error
        finally:
            attempt.unlink(missing_ok=True)

    @contextmanager
    def _reserved(self, attempt: Path, size: int) -> Iterator[None]:
        """Context: a temporary file that counts as ``size`` bytes; its lock shows that a process is writing it."""
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
        """Delete leftovers of killed processes and the least recently used files until ``size`` bytes fit."""
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
    """A hash that is the same in all processes, in [0, 2^32)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def _abandoned(path: Path) -> bool:
    """Whether no process writes this temporary file any more.

    Its age is checked too, because a writer may replace the file by another one, which is not locked.
    """
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
    """Context: holds an exclusive lock on ``path`` among all threads and processes of this machine.

    The lock of a process that dies is released.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
