"""Files and folders that appear whole or not at all: the one module that commits, replaces, deletes and probes.

Everything goes through a :class:`Folder`, an *open* directory. A process whose output was moved aside while it slept
still holds the old directory and writes there: it cannot reach the new directory of the same name.

Every operation passes through :func:`interposed`, where tests kill or pause the process, or simulate a stale handle or
a full disk.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import xxhash

from pipeline.registry import ExpectedError

T = TypeVar("T")
BLOCK = 4 << 20  # bytes per block hash
_BUFFER = 1 << 20
_PIECES = 512  # buffers per writev call; systems accept 1,024
_AHEAD = 4 << 20  # bytes after which write-back to disk is started
_DIGEST = re.compile(rb'\n "digest": "[0-9a-f]{32}"(,?)')  # of the outermost object: inner ones are indented further
GONE = (errno.ENOENT, errno.ESTALE)
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
TRASH = ".trash."

# Called as interpose(operation, path, do) instead of do(); set only by tests.
interpose: Callable[[str, str, Callable[[], Any]], Any] | None = None


class StorageError(ExpectedError):
    """The file system failed, lacks a required guarantee, or contains something unexpected."""


def interposed(operation: str, path: str, do: Callable[[], T]) -> T:
    return do() if interpose is None else interpose(operation, path, do)


class Folder:
    """An open directory; names are relative to it. ``path`` is its path when it was opened, for messages."""

    links = False
    """Whether a commit stores the name of the attempt's folder instead of renaming that folder."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False) -> Folder:
        """Open ``path``; with ``create``, make it and its parents first.

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError: as reported by the system.
        """
        path = Path(path).absolute()
        if create:
            interposed("makedirs", str(path), lambda: os.makedirs(path, exist_ok=True))
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY), path)

    def close(self, _close: Callable[[int], None] = os.close) -> None:  # at exit, os may be gone before this object
        if self.fd >= 0:
            _close(self.fd)
            self.fd = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    # ---- reading

    def in_place(self) -> bool:
        """Whether ``path`` still leads to this folder, which means that nobody has moved or removed it."""
        here = os.fstat(self.fd)
        try:
            there = interposed("stat", str(self.path), lambda: os.stat(self.path))
        except OSError as error:
            if error.errno in (*GONE, errno.ENOTDIR):
                return False
            raise
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def folder(self, name: str) -> Folder:
        """Open the subfolder ``name``."""
        path = self.path / name
        flags = os.O_RDONLY | os.O_DIRECTORY
        return Folder(interposed("open", str(path), lambda: os.open(name, flags, dir_fd=self.fd)), path)

    def listdir(self) -> list[str]:
        """The names in this folder, sorted."""
        return sorted(interposed("listdir", str(self.path), lambda: os.listdir(self.fd)))

    def exists(self, name: str) -> bool:
        try:
            self.stat(name)
        except OSError as error:
            if error.errno in (*GONE, errno.ENOTDIR):
                return False
            raise
        return True

    def stat(self, name: str) -> os.stat_result:
        return interposed("stat", str(self.path / name), lambda: os.stat(name, dir_fd=self.fd))

    def open_file(self, name: str) -> int:
        """Open the file ``name`` for reading and return its descriptor, which the caller closes."""
        return interposed(
            "read", str(self.path / name), lambda: os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        )

    def read(self, name: str) -> bytes:
        with os.fdopen(self.open_file(name), "rb") as file:
            return file.read()

    def digest_of(self, name: str) -> str:
        """XXH3-128 of the file ``name``, as 32 hexadecimal digits."""
        whole = xxhash.xxh3_128()
        with os.fdopen(self.open_file(name), "rb", buffering=0) as file:
            while block := file.read(BLOCK):
                whole.update(block)
        return whole.hexdigest()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file ``name``; None if there is no such file.

        Raises:
            StorageError: the file does not contain a JSON object.
        """
        text = self._read_if_there(name)
        return None if text is None else self._parsed(name, text)

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except OSError as error:
            if error.errno in (*GONE, errno.ENOTDIR):
                return None
            raise

    def _parsed(self, name: str, text: bytes) -> dict[str, Any]:
        return _parsed(text, self.path / name)

    def read_sealed(self, name: str) -> dict[str, Any] | None:
        """The object in the file ``name``, which :func:`seal` wrote; None if there is no such file.

        Raises:
            StorageError: the file has changed since it was written.
        """
        text = self._read_if_there(name)
        return None if text is None else unsealed(text, self.path / name)

    # ---- writing

    def mkdir(self, name: str, *, exist_ok: bool = False) -> None:
        try:
            interposed("mkdir", str(self.path / name), lambda: os.mkdir(name, dir_fd=self.fd))
        except FileExistsError:
            if not exist_ok:
                raise

    def create(self, name: str) -> HashedFile:
        """Create a file, which is written once from start to end, hashed while written, and on disk when closed."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        path = str(self.path / name)
        return HashedFile(interposed("create", path, lambda: os.open(name, flags, 0o666, dir_fd=self.fd)), name, path)

    def write_new(self, name: str, data: bytes) -> None:
        """Write a new small file that need not survive a power cut; FileExistsError if the name is taken."""
        self._write_small(name, data, os.O_EXCL)

    def append(self, name: str, data: bytes) -> None:
        """Append ``data`` to a file in one write; creates the file if needed."""
        self._write_small(name, data, os.O_APPEND)

    def overwrite(self, name: str, data: bytes) -> None:
        """Write ``data`` at the start of a small file; creates it if needed. Readers may see it half written."""
        self._write_small(name, data, 0)

    def _write_small(self, name: str, data: bytes, flag: int) -> None:
        def do() -> None:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o666, dir_fd=self.fd)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)

        interposed("write_small", str(self.path / name), do)

    def write_atomic(self, name: str, data: bytes) -> None:
        """Replace the file ``name`` with ``data``; readers see either the old or the new bytes."""
        self.write_stream(name, (data,))

    def write_stream(self, name: str, parts: Iterable[bytes]) -> str:
        """Like :meth:`write_atomic`, from several parts. Returns the digest of the file."""

        def write(file: HashedFile) -> None:
            for part in parts:
                file.write(part)

        return self.write_stream_by(name, write)

    def write_stream_by(self, name: str, write: Callable[[HashedFile], None]) -> str:
        """Like :meth:`write_atomic`, with a function that writes the new file. Returns the digest of the file."""
        temporary = f".{name}.{uuid.uuid4().hex}"
        try:
            with self.create(temporary) as file:
                write(file)
            self.replace(temporary, name, file.digest)
        except Exception:
            with suppress(OSError):
                self.delete(temporary)
            raise
        self.sync()
        return file.digest

    def write_json(self, name: str, value: Any) -> None:
        self.write_atomic(name, json_bytes(value))

    def rename(self, name: str, new_name: str) -> None:
        interposed(
            "rename",
            str(self.path / new_name),
            lambda: os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=self.fd),
        )

    def replace(self, name: str, new_name: str, expected: str) -> None:
        """Rename the file ``name``, whose digest is ``expected``, to ``new_name``, replacing an existing file.

        A rename that succeeded can still report ENOENT after an NFS retransmission: the digest shows whether it did.
        """
        try:
            self.rename(name, new_name)
        except OSError as error:
            if error.errno not in GONE or not self.exists(new_name) or self.digest_of(new_name) != expected:
                raise

    def unlink(self, name: str, *, missing_ok: bool = False) -> None:
        try:
            interposed("unlink", str(self.path / name), lambda: os.unlink(name, dir_fd=self.fd))
        except OSError as error:
            if not (missing_ok and error.errno in GONE):
                raise

    def sync(self) -> None:
        """Flush the entries of this folder to disk."""
        interposed("fsync", str(self.path), lambda: os.fsync(self.fd))

    def commit(self, attempt: str, final: str, proof: str) -> bool:
        """See :func:`commit`: here, one rename. A rename that succeeded can still report ENOENT after an NFS
        retransmission: the proof shows whether it did."""
        try:
            with self.folder(attempt) as folder:
                mine = folder.read(proof)
                folder.sync()
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False
        try:
            self.rename(attempt, final)
        except OSError as error:
            if error.errno not in (*TAKEN, *GONE):
                raise
            try:
                with self.folder(final) as winner:
                    won = winner.read(proof) == mine
            except OSError as look:
                if look.errno not in GONE:
                    raise
                won = False
            if not won:
                return False
        self.sync()
        return True

    def place(self, name: str) -> str:
        """The path, relative to this folder, at which the files of the folder ``name`` are stored."""
        return name

    def probe(self) -> None:
        """See :func:`probe`."""
        _probe(self)

    def trash(self, name: str) -> bool:
        """Rename ``name`` to a name that is ignored everywhere, then delete it. False if it was already gone."""
        aside = f"{TRASH}{uuid.uuid4().hex}"
        try:
            self.rename(name, aside)
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        self.delete(aside)
        return True

    def delete(self, name: str) -> None:
        """Delete the tree ``name``, which must no longer be in use; what cannot be deleted now is left to ``gc``."""

        def do() -> None:
            if os.path.isdir(f"/proc/self/fd/{self.fd}/{name}"):
                shutil.rmtree(name, ignore_errors=True, dir_fd=self.fd)
            else:
                os.unlink(name, dir_fd=self.fd)

        try:
            interposed("delete", str(self.path / name), do)
        except OSError as error:
            if error.errno not in GONE:
                raise


class HashedFile:
    """A file being written from start to end, with its XXH3-128 as a whole and per block of 4 MiB.

    It has what libraries need to write to a file object: ``write``, ``tell``, ``flush``, ``close``, ``closed``.
    """

    def __init__(self, fd: int, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self.bytes = 0
        self._fd = fd
        self._started = 0  # bytes whose write-back to disk was started
        self._pieces: list[memoryview] = []  # not written yet
        self._waiting = 0  # bytes in _pieces
        self._whole = xxhash.xxh3_128()
        self._block = xxhash.xxh3_128()
        self._block_left = BLOCK
        self._blocks: list[str] = []

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        self._hash(view)
        self.bytes += size
        large = size > _BUFFER
        # buffered data must not change: even the memory behind a read-only view may be reused by its owner
        self._pieces.append(view if large or isinstance(data, bytes) else memoryview(bytes(view)))
        self._waiting += size
        if large or self._waiting > _BUFFER or len(self._pieces) == _PIECES:
            self.flush()
        return size

    def _hash(self, view: memoryview) -> None:
        self._whole.update(view)
        while len(view) >= self._block_left:
            self._block.update(view[: self._block_left])
            self._blocks.append(self._block.hexdigest())
            self._block.reset()
            view, self._block_left = view[self._block_left :], BLOCK
        if len(view):
            self._block.update(view)
            self._block_left -= len(view)

    def flush(self) -> None:
        if self._pieces:
            interposed("write", self.path, self._write)
            self._pieces, self._waiting = [], 0
            if self.bytes - self._started >= _AHEAD:
                whole = self.bytes - self.bytes % _AHEAD
                _start_writing(self._fd, self._started, whole - self._started)
                self._started = whole

    def _write(self) -> None:
        rest = self._pieces
        while rest:
            written = os.writev(self._fd, rest)
            done = 0
            while done < len(rest) and written >= len(rest[done]):
                written -= len(rest[done])
                done += 1
            rest = rest[done:]
            if rest:
                rest[0] = rest[0][written:]

    def tell(self) -> int:
        return self.bytes

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Write the rest, flush it to disk and close the file."""
        if self._fd < 0:
            return
        try:
            self.flush()
            interposed("fsync", self.path, lambda: os.fsync(self._fd))
        finally:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Close the file without making sure that anything is on disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        self.discard()

    @property
    def digest(self) -> str:
        """XXH3-128 of all bytes, as 32 hexadecimal digits."""
        return self._whole.hexdigest()

    @property
    def blocks(self) -> list[str]:
        """XXH3-128 of each block of 4 MiB; the last block may be shorter."""
        return (
            [*self._blocks, self._block.hexdigest()] if self._block_left < BLOCK or not self._blocks else self._blocks
        )


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
_WRITE = 2  # SYNC_FILE_RANGE_WRITE


def _start_writing(fd: int, start: int, length: int) -> None:
    """Start writing these bytes back to disk, so that fsync has less to wait for."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(length), _WRITE)


def commit(parent: Folder, attempt: str, final: str, proof: str) -> bool:
    """Commit the folder ``attempt`` as ``final``, in the same parent; of several attempts, exactly one succeeds.

    Args:
        proof: a file in the attempt whose content is unique because it contains the attempt's id.

    Returns:
        True if this attempt was committed; False if another one was first or this one was removed.
    """
    return parent.commit(attempt, final, proof)


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: sorted keys, UTF-8, one final newline."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def seal(value: dict[str, Any]) -> bytes:
    """Canonical JSON of ``value`` with its own digest, so that a changed byte is detected."""
    return json_bytes({**value, "digest": digest(json_bytes(value))})


def unsealed(text: bytes, path: Path) -> dict[str, Any]:
    """The object in ``text``, which :func:`seal` made; ``path`` is for the error message.

    Raises:
        StorageError: ``text`` has changed since it was made.
    """
    value = _parsed(text, path)
    if value.pop("digest", None) != _digest_sealed(text):
        raise StorageError(f"{path} is damaged: its content does not match its digest")
    return value


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise StorageError(f"{path} is damaged: not a JSON object")
    return value


def _digest_sealed(text: bytes) -> str:
    """The digest that a sealed ``text`` must contain, computed without parsing, which would take 20 times as long."""
    match = _DIGEST.search(text)
    if match is None:
        return ""
    before, after = text[: match.start()], text[match.end() :]
    if not match[1]:  # the last entry: the comma before it is removed too
        before = before.removesuffix(b",")
    return digest(before + after)


def digest(data: bytes) -> str:
    """XXH3-128 as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def probe(folder: Folder) -> None:
    """Check that the file system under ``folder`` has the guarantees that a commit needs.

    Raises:
        StorageError: a folder can be renamed onto a non-empty one, a rename is not visible, or folders cannot be
            synced (flat object stores mounted as a file system).
    """
    folder.probe()


def _probe(folder: Folder) -> None:
    name = f".probe.{uuid.uuid4().hex}"
    folder.mkdir(name)
    try:
        with folder.folder(name) as inside:
            for side in ("a", "b"):
                inside.mkdir(side)
                with inside.folder(side) as one, one.create("file") as file:
                    file.write(side.encode())
            try:
                inside.rename("a", "b")
            except OSError as error:
                if error.errno not in TAKEN:
                    raise
                exclusive = True
            else:
                exclusive = False
            if exclusive:
                try:
                    inside.rename("a", "c")
                except OSError as error:
                    if error.errno not in GONE or not inside.exists("c"):  # otherwise it succeeded despite the error
                        raise
                inside.sync()
                with inside.folder("c") as moved:
                    exclusive = moved.read("file") == b"a" and inside.listdir() == ["b", "c"]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO) or not folder.exists(name):
            raise
        raise StorageError(
            f"{folder.path}: this file system cannot rename and sync folders ({error.strerror})"
        ) from error
    finally:
        with suppress(OSError):
            folder.delete(name)
    if not exclusive:
        raise StorageError(
            f"{folder.path}: this file system does not keep folder renames exclusive, so results could be lost; "
            "choose an output on a POSIX file system (local disk, NFS, Lustre, GPFS)"
        )
