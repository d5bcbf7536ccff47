"""Writes a dataset directory in an object store, without a file system that its writers share.

The commit is the conditional creation of one object, the proof, at which exactly one writer succeeds:
``data/BBB/PPPPP/record.json`` or ``plan/plan.json``. The proof names its attempt, whose other files were stored before
it as objects below ``data/BBB/.PPPPP.<attempt>/``. In the same way, ``_SUCCESS`` names the attempt whose manifest and
index, in ``.final.<attempt>/``, are valid; it is replaced only if its version is still the one that the writer saw
before it read the plans. Copies of manifest and index at the root, for other readers, are replaced in the same way
before ``_SUCCESS``. No other valid object is ever deleted or replaced, so that it does no harm if the store executes a
request late or twice, or executes it and still responds with an error.

An attempt is first written to a local temporary folder. Objects of an attempt that may still be committed are never
deleted; ``stage=gc`` deletes those of attempts that have lost.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.storage import BLOCK, Folder, HashedFile, StorageError
from pipeline.stores.cache import Cache
from pipeline.stores.errors import StoreError
from pipeline.stores.folder import PROOFS, SUCCESS, StoreFolder, absent, attempt_folder, finish_folder
from pipeline.stores.store import Object, Store

_PREFIX = "latentmill-output."
Value = TypeVar("Value")


@dataclass
class _Staging:
    """The uncommitted attempts of one process: local folders by their paths in the store."""

    home: Path
    folders: dict[str, Path] = field(default_factory=dict)
    seen: dict[str, dict[str, str]] = field(default_factory=dict)
    """Attempt at files of the root → versions of these files when it began, by name."""
    appended: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    """Committed folder → folder of its attempt."""

    @classmethod
    def make(cls) -> _Staging:
        home, fd = _locked_folder()
        for left in home.parent.glob(f"{_PREFIX}*"):
            if left != home:
                _delete_abandoned(left)
        staging = cls(home)
        weakref.finalize(staging, _end, home, fd, os.getpid())
        return staging

    def local(self, path: str) -> Path | None:
        """The local path of a file or folder in an attempt of this process; None if there is no such attempt."""
        for attempt, folder in self.folders.items():
            if path == attempt or path.startswith(f"{attempt}/"):
                return folder / path[len(attempt) + 1 :] if path != attempt else folder
        return None


def _locked_folder() -> tuple[Path, int]:
    """A new temporary folder, and a file descriptor whose lock shows that the process is alive."""
    while True:
        home = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with suppress(FileNotFoundError):
            fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if home.exists():
                return home, fd
            os.close(fd)
        # another process deleted it as abandoned before it was locked


def _end(home: Path, fd: int, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(home, ignore_errors=True)
        os.close(fd)


def _delete_abandoned(folder: Path) -> None:
    """Delete the folder of a killed process; those of living processes are locked."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(fd)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Context: turn a StoreError into an OSError, which callers of unimportant writes ignore as for a disk."""
    try:
        yield
    except StoreError as error:
        raise OSError(errno.EIO, str(error)) from None


class StoreOutput(StoreFolder):
    """A folder of a dataset directory that is being written. Only commits are cached in memory."""

    links = True

    def __init__(self, store: Store, cache: Cache, at: str = "", staging: _Staging | None = None) -> None:
        super().__init__(store, cache, at)
        self._staging = staging or _Staging.make()

    def _inside(self, path: str) -> StoreFolder:
        return StoreOutput(self.store, self._cache, path, self._staging)

    def _local(self, name: str) -> Path | None:
        return self._staging.local(self._below(name))

    def _parent_of(self, path: Path) -> Folder:
        return Folder(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY), path.parent)

    # ---- reading

    def _children(self, path: str) -> dict[str, Object | None]:
        return self._listed(path)

    def _find(self, name: str) -> Object:
        return self._looked_up(name, self._head)

    def _looked_up(self, name: str, look: Callable[[str], Value | None]) -> Value:
        """The result of ``look`` for the path of a file, or for its path in the attempt that was committed."""
        path = self._below(name)
        parent, _, last = path.rpartition("/")
        finish = finish_folder(self._read_object(SUCCESS) or b"{}") if not parent and last != SUCCESS else ""
        found = look(f"{finish}/{last}") if finish else None
        if found is None:
            found = look(path)
        if found is None and (link := self._link(parent)):
            found = look(f"{link}/{last}")
        if found is None:
            raise absent(self.store.name(path))
        return found

    def _head(self, path: str) -> Object | None:
        try:
            return self.store.head(path)
        except StoreError as error:
            if not error.not_there:
                raise
            return None

    def _link(self, path: str) -> str:
        """The folder of the attempt that the folder ``path`` was committed from; empty if it is not committed."""
        links = self._staging.links
        if path and path not in links:
            name = PROOFS[path.rpartition("/")[2].startswith("plan")]
            if (proof := self._read_object(f"{path}/{name}")) is None:
                return ""
            links[path] = attempt_folder(path, proof)
        return links.get(path, "")

    def _read_object(self, path: str) -> bytes | None:
        try:
            return self.store.read(path)
        except StoreError as error:
            if not error.not_there:
                raise
            return None

    def folder(self, name: str) -> Folder:
        if local := self._local(name):
            return Folder(os.open(local, os.O_RDONLY | os.O_DIRECTORY), self.path / name)
        return self._inside(self._below(name))

    def listdir(self) -> list[str]:
        names = set(self._children(self.at))
        if link := self._link(self.at):
            names |= set(self._children(link))
        return sorted(names)

    def exists(self, name: str) -> bool:
        if local := self._local(name):
            return local.exists()
        path = self._below(name)
        return self._head(path) is not None or next(self.store.objects(path), None) is not None

    def place(self, name: str) -> str:
        return self._link(self._below(name)) or self._below(name)

    def read(self, name: str) -> bytes:
        if local := self._local(name):
            return local.read_bytes()
        return self._looked_up(name, self._read_object)

    def open_file(self, name: str) -> int:
        if local := self._local(name):
            return os.open(local, os.O_RDONLY | os.O_CLOEXEC)
        return super().open_file(name)

    # ---- writing

    def mkdir(self, name: str, *, exist_ok: bool = False) -> None:
        """Begin an attempt if ``name`` starts with a dot; other folders need not be created."""
        path = self._below(name)
        if path.rpartition("/")[2].startswith("."):
            local = self._staging.home / uuid.uuid4().hex
            local.mkdir()
            self._staging.folders[path] = local
            if not self.at:
                self._staging.seen[path] = {name: o.etag for name, o in self._listed("").items() if o is not None}

    def create(self, name: str) -> HashedFile:
        if local := self._local(name):
            with self._parent_of(local) as folder:
                return folder.create(local.name)
        raise StorageError(f"{self.path / name}: a file of a store is written in an attempt")

    def write_new(self, name: str, data: bytes) -> None:
        if not self.store.put_new(self._below(name), data):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.store.name(self._below(name)))

    def append(self, name: str, data: bytes) -> None:
        """Store what this process has appended so far, plus ``data``; no other process writes to such a file."""
        path = self._below(name)
        whole = self._staging.appended.get(path, b"") + data
        with _as_os_error():
            self.store.put(path, whole)
        self._staging.appended[path] = whole

    def overwrite(self, name: str, data: bytes) -> None:
        with _as_os_error():
            self.store.put(self._below(name), data)

    def write_atomic(self, name: str, data: bytes) -> None:
        path = self._below(name)
        with _as_os_error():
            self.store.put(path, data)
        if path in self._staging.appended:
            self._staging.appended[path] = data

    def unlink(self, name: str, *, missing_ok: bool = False) -> None:
        with _as_os_error():
            self.store.delete([self._below(name)])

    def sync(self) -> None:
        return

    def replace(self, name: str, new_name: str, expected: str) -> None:
        """Move a file of an attempt to the root, unless another process has replaced it since the attempt began.

        Raises:
            FileNotFoundError: another process has replaced it; the attempt is discarded.
        """
        attempt = name.partition("/")[0]
        local = self._local(name)
        if local is None:
            raise absent(self.store.name(name))
        data, version = local.read_bytes(), self._staging.seen[attempt].get(new_name, "")
        if new_name != SUCCESS:
            self.store.put(name, data)
        if version:
            done = self.store.replace(new_name, data, version)
        else:
            done = self.store.put_new(new_name, data)
        if not done:
            self._forget(attempt)
            raise absent(self.store.name(name))

    def commit(self, attempt: str, final: str, proof: str) -> bool:
        local = self._local(attempt)
        if local is None:
            return False
        target, source = self._below(final), self._below(attempt)
        mine = (local / proof).read_bytes()
        if attempt_folder(target, mine) != source:
            raise StorageError(f"{self.path / attempt}: {proof} names another attempt")
        theirs = self._read_object(f"{target}/{proof}")
        if theirs is not None:
            return theirs == mine
        sent = []
        for path in sorted(local.iterdir()):
            if path.name != proof:
                with self._parent_of(path) as folder:
                    hashed = folder.digest_of(path.name)
                self.store.upload(f"{source}/{path.name}", _pieces(path), path.stat().st_size, hashed)
                sent.append(f"{source}/{path.name}")
        if self.store.put_new(f"{target}/{proof}", mine):
            return True
        self.store.delete(sent)  # another attempt was committed
        return False

    def trash(self, name: str) -> bool:
        return self._forget(self._below(name))

    def delete(self, name: str) -> None:
        self._forget(self._below(name))

    def _forget(self, path: str) -> bool:
        """Delete the local folder of an attempt; returns whether there was one."""
        local = self._staging.folders.pop(path, None)
        self._staging.seen.pop(path, None)
        if local is not None:
            shutil.rmtree(local, ignore_errors=True)
        return local is not None

    def probe(self) -> None:
        """Raises StorageError if the store does not support conditional writes."""
        name = f".probe.{uuid.uuid4().hex}"
        try:
            if not (self.store.put_new(name, b"a") and not self.store.put_new(name, b"b")):
                raise StorageError(
                    f"{self.path}: this store does not support conditional writes (If-None-Match), so results could be "
                    "lost; choose another, or a local output= and stage=publish"
                )
        finally:
            self.store.delete([name])


def _pieces(path: Path) -> Callable[[], Iterator[bytes]]:
    def read() -> Iterator[bytes]:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                yield block

    return read


def open_output(url: str | Path) -> StoreOutput:
    """Open a dataset directory in a store for writing; reads return its current state."""
    return StoreOutput(Store(url), Cache())
