"""Files and folders that appear whole or not at all: the one module that commits, replaces, deletes and probes.

Everything goes through a :class:`Folder`, an *open* directory. A process that was left behind (its output was moved
aside while it slept) still holds the old directory and writes there: it cannot reach what has taken its place.

Every operation passes :func:`interposed`, where tests kill, pause, or answer as a stale or full disk would.
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

T = TypeVar("T")
BLOCK = 4 << 20  # bytes per block hash
_BUFFER = 1 << 20
_PIECES = 512  # that one call writes; systems take 1,024
_AHEAD = 4 << 20  # bytes after which writing back to the disk is started
_DIGEST = re.compile(rb'\n "digest": "[0-9a-f]{32}"(,?)')  # of the outermost object: inner ones are indented further
GONE = (errno.ENOENT, errno.ESTALE)
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
TRASH = ".trash."

# Called as interpose(operation, path, do) instead of do(); set by tests alone.
interpose: Callable[[str, str, Callable[[], Any]], Any] | None = None


class StorageError(RuntimeError):
    """The file system cannot hold what we promise, or holds something that we did not put there."""


def interposed(operation: str, path: str, do: Callable[[], T]) -> T:
    return do() if interpose is None else interpose(operation, path, do)


class Folder:
    """An open directory; names are relative to it. ``path`` is where it was when opened, for messages."""

    links = False
    """Whether what was committed names the attempt whose folder holds it, instead of a rename."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False) -> Folder:
        """Open ``path``; with ``create``, make it and its parents first.

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError: as the system says.
        """
        path = Path(path).absolute()
        if create:
            interposed("makedirs", str(path), lambda: os.makedirs(path, exist_ok=True))
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY), path)

    def close(self, _close: Callable[[int], None] = os.close) -> None:  # the module may be gone before its last object
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

    # ---- looking

    def in_place(self) -> bool:
        """Whether ``path`` still leads here: nobody has moved or removed this folder."""
        here = os.fstat(self.fd)
        try:
            there = interposed("stat", str(self.path), lambda: os.stat(self.path))
        except OSError as error:
            if error.errno in (*GONE, errno.ENOTDIR):
                return False
            raise
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def folder(self, name: str) -> Folder:
        """Open the folder ``name`` in this one."""
        path = self.path / name
        flags = os.O_RDONLY | os.O_DIRECTORY
        return Folder(interposed("open", str(path), lambda: os.open(name, flags, dir_fd=self.fd)), path)

    def listdir(self) -> list[str]:
        """Names in this folder, sorted."""
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
        """A descriptor of the file ``name``, for reading; the caller closes it."""
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
        """The JSON object in the file ``name``; None where there is no such file.

        Raises:
            StorageError: the file is no JSON object.
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
        """The object that :func:`seal` made the file ``name`` of; None where there is no such file.

        Raises:
            StorageError: a byte of it has changed.
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
        """A new file, written once from start to end; hashed while it is written, on disk when closed."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        path = str(self.path / name)
        return HashedFile(interposed("create", path, lambda: os.open(name, flags, 0o666, dir_fd=self.fd)), name, path)

    def write_new(self, name: str, data: bytes) -> None:
        """A new small file that need not survive a power cut; FileExistsError if the name is taken."""
        self._write_small(name, data, os.O_EXCL)

    def append(self, name: str, data: bytes) -> None:
        """Add ``data`` to the end of a file in one write, creating it."""
        self._write_small(name, data, os.O_APPEND)

    def overwrite(self, name: str, data: bytes) -> None:
        """Put ``data`` at the start of a small file, creating it; readers may see it half written."""
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
        """Replace the file ``name`` by ``data``: readers see the old or the new bytes, nothing between."""
        self.write_stream(name, (data,))

    def write_stream(self, name: str, parts: Iterable[bytes]) -> str:
        """Like :meth:`write_atomic`, piece by piece; the digest of the whole."""

        def write(file: HashedFile) -> None:
            for part in parts:
                file.write(part)

        return self.write_stream_by(name, write)

    def write_stream_by(self, name: str, write: Callable[[HashedFile], None]) -> str:
        """Like :meth:`write_atomic`, by a function that fills the new file; the digest of the whole."""
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
        """Let the file ``name``, with the digest ``expected``, be ``new_name``, instead of what had that name.

        A rename that succeeded can still report ENOENT after an NFS retransmission: then the content tells.
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
        """Bring the names in this folder to the disk."""
        interposed("fsync", str(self.path), lambda: os.fsync(self.fd))

    def commit(self, attempt: str, final: str, proof: str) -> bool:
        """See :func:`commit`: here, one rename. One that succeeded can still report ENOENT after an NFS retransmission,
        and then the proof tells."""
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
        """Where the files of the folder ``name`` lie, as a path below this one."""
        return name

    def probe(self) -> None:
        """See :func:`probe`."""
        _probe(self)

    def trash(self, name: str) -> bool:
        """Move ``name`` aside under a name that counts for nothing, then delete it. False: it was gone already."""
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
        """Delete the tree ``name``, which nobody counts any more; what cannot be deleted now is left to ``gc``."""

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

    It has what libraries that write to file objects ask for: ``write``, ``tell``, ``flush``, ``close``, ``closed``.
    """

    def __init__(self, fd: int, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self.bytes = 0
        self._fd = fd
        self._started = 0  # bytes that the system brings to the disk
        self._pieces: list[memoryview] = []  # not written yet
        self._waiting = 0  # bytes in them
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
        # what waits must not change: a read-only view may be of memory that its owner uses again
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
        """Write what is left, bring it to the disk, close."""
        if self._fd < 0:
            return
        try:
            self.flush()
            interposed("fsync", self.path, lambda: os.fsync(self._fd))
        finally:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Close without the promise that anything is on disk."""
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
        """XXH3-128 of each block of 4 MiB, the last one as long as it is."""
        return (
            [*self._blocks, self._block.hexdigest()] if self._block_left < BLOCK or not self._blocks else self._blocks
        )


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
_WRITE = 2  # SYNC_FILE_RANGE_WRITE


def _start_writing(fd: int, start: int, length: int) -> None:
    """Let the system begin to bring these bytes to the disk, so that fsync has to wait for few."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(length), _WRITE)


def commit(parent: Folder, attempt: str, final: str, proof: str) -> bool:
    """Let the folder ``attempt`` be ``final``, in the same parent, which exactly one attempt wins.

    Args:
        proof: a file in the attempt whose content no other attempt has: it holds the attempt's id.

    Returns:
        True if this attempt is the one that counts; False if another was first or this one was removed.
    """
    return parent.commit(attempt, final, proof)


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: sorted keys, UTF-8, one final newline."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def seal(value: dict[str, Any]) -> bytes:
    """Canonical JSON of ``value`` with a digest of itself, so that a changed byte is noticed."""
    return json_bytes({**value, "digest": digest(json_bytes(value))})


def unsealed(text: bytes, path: Path) -> dict[str, Any]:
    """The object that :func:`seal` made ``text`` of; ``path`` is for the message.

    Raises:
        StorageError: a byte of it has changed.
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
    """What the digest in a sealed ``text`` must be: taken without parsing, which costs 20 times as much."""
    match = _DIGEST.search(text)
    if match is None:
        return ""
    before, after = text[: match.start()], text[match.end() :]
    if not match[1]:  # the last of several: the comma before it goes with it
        before = before.removesuffix(b",")
    return digest(before + after)


def digest(data: bytes) -> str:
    """XXH3-128 as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def probe(folder: Folder) -> None:
    """Check that the file system under ``folder`` keeps what a commit needs.

    Raises:
        StorageError: a folder can be renamed onto a full one, a rename is not seen, or folders cannot be synced
            (flat object stores mounted as a file system).
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
                    if error.errno not in GONE or not inside.exists("c"):  # else it succeeded, whatever it says
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
