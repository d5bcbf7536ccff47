"""Random access to committed data files; each block of 4 MiB is checked against its hash before it is used."""

from __future__ import annotations

import io
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.storage import BLOCK, StorageError

Verify = Literal["first", "always", "never"]
VERIFY: tuple[str, ...] = get_args(Verify)


class Damaged(ValueError):
    """The bytes of a data file are not those that were written."""


def blocks_of(sizes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Number of blocks of files with these sizes in bytes; an empty file has one block."""
    return np.maximum(1, -(-sizes // BLOCK))


class MappedBytes(np.ndarray[Any, np.dtype[Any]]):
    """Memory-mapped bytes of a file: uint8 (n,), read-only.

    When they are sent to another local process (such as from a DataLoader worker), only their position in the file is
    transferred, and the receiver maps the file; other pickling copies the bytes.
    """

    path: str
    identity: tuple[int, int, int]

    @staticmethod
    def whole(fd: int, path: str) -> MappedBytes:
        """Map a whole open file."""
        state = os.fstat(fd)
        data = mmap.mmap(fd, state.st_size, prot=mmap.PROT_READ) if state.st_size else b""
        mapped = np.frombuffer(data, np.uint8).view(MappedBytes)
        mapped.path, mapped.identity = path, (state.st_dev, state.st_ino, state.st_size)
        return mapped

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()

    def __array_wrap__(self, array: npt.NDArray[Any], context: Any = None, return_scalar: bool = False) -> Any:
        return array[()] if return_scalar else np.asarray(array)


def _place(part: MappedBytes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    whole = part.base
    if not isinstance(whole, MappedBytes) or part.dtype != np.uint8 or part.strides != (1,):
        return part.__reduce__()  # type: ignore[no-any-return]
    start = part.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return _attached, (whole.path, whole.identity, start, len(part))


def _attached(path: str, identity: tuple[int, int, int], start: int, length: int) -> npt.NDArray[Any]:
    return _mapped(path, identity)[start : start + length]


@lru_cache(maxsize=1024)
def _mapped(path: str, identity: tuple[int, int, int]) -> MappedBytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole = MappedBytes.whole(fd, path)
    finally:
        os.close(fd)
    if whole.identity != identity:
        raise StorageError(f"{path} was replaced while it was read")
    return whole


ForkingPickler.register(MappedBytes, _place)


class BlockFile:
    """A data file that is read by position, so that forked processes can share it.

    Args:
        fd: file descriptor, which this object then owns.
        name: for messages.
        size: expected size in bytes.
        blocks: XXH3-128 of each block.
        verify: ``first``: check a block on first access; ``always``: on every access; ``never``.
        seen: a byte for each block, nonzero once it has been checked; can be shared between processes.
        path: path of the file, for processes that receive bytes by position.

    Raises:
        Damaged: the file has a different size.
    """

    def __init__(
        self,
        fd: int,
        name: str,
        size: int,
        blocks: Sequence[str],
        verify: Verify = "first",
        seen: memoryview | None = None,
        path: str = "",
    ) -> None:
        self.name = name
        self._fd = fd
        self._size = size
        self._blocks = blocks
        self._map: MappedBytes | None = None
        self._path = path
        self._always = verify == "always"
        self._seen: memoryview | bytearray | None = None
        if verify != "never" and blocks:
            self._seen = bytearray(len(blocks)) if seen is None else seen
        found = os.fstat(fd).st_size
        if found != size:
            raise Damaged(f"{name} has {found} bytes instead of {size}")

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: modules may be gone at exit
        close(self._fd)

    def __len__(self) -> int:
        return self._size

    def check(self, offset: int, length: int) -> None:
        """Raise Damaged if a block that contains these bytes has changed."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise Damaged(f"{self.name} ends before byte {offset + length}")
        seen = self._seen
        if seen is None or not length:
            return
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if seen[first] and seen[last] and last - first < 2 and not self._always:
            return
        for number in range(first, last + 1):
            if seen[number] and not self._always:
                continue
            block = os.pread(self._fd, BLOCK, number * BLOCK)
            if xxhash.xxh3_128_hexdigest(block) != self._blocks[number]:
                raise Damaged(f"{self.name}: block {number} of {BLOCK >> 20} MiB has changed since it was written")
            seen[number] = 1

    def bytes(self, offset: int, length: int) -> bytes:
        """Copy ``length`` bytes from ``offset``.

        Raises:
            Damaged: the bytes have changed, or the file ends before them.
        """
        self.check(offset, length)
        data = os.pread(self._fd, length, offset)
        while len(data) < length:  # Linux reads at most 2 GiB at once
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise Damaged(f"{self.name} ends before byte {offset + length}")
            data += more
        return data

    def view(self, offset: int, length: int) -> npt.NDArray[Any]:
        """Like :meth:`bytes`, without a copy: :class:`MappedBytes` (length,)."""
        self.check(offset, length)
        return (self._map if self._map is not None else self.unchecked())[offset : offset + length]

    def unpack(self, layout: struct.Struct, offset: int) -> tuple[Any, ...]:
        """Unpack numbers at ``offset``; raises Damaged like :meth:`bytes`."""
        self.check(offset, layout.size)
        return layout.unpack_from(self.unchecked().data, offset)

    def unchecked(self) -> MappedBytes:
        """All bytes, memory-mapped and not checked."""
        if self._map is None:
            self._map = MappedBytes.whole(self._fd, self._path)
        return self._map

    def file(self) -> io.BufferedIOBase:
        """A file object for libraries that need one; only the blocks that are read are checked."""
        return _File(self)


class _File(io.BufferedIOBase):
    def __init__(self, data: BlockFile) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(len(self._data) - self._at, 0)
        length = left if size is None or size < 0 else min(size, left)
        data = self._data.bytes(self._at, length)
        self._at += length
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        target = memoryview(buffer).cast("B")
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)
