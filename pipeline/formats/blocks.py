"""Random access to a committed data file, each block of 4 MiB checked against its hash before its bytes are used."""

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
    """Number of blocks of files of these sizes in bytes; an empty one has one, too."""
    return np.maximum(1, -(-sizes // BLOCK))


class MappedBytes(np.ndarray[Any, np.dtype[Any]]):
    """Bytes of a file as they lie in memory: uint8 (n,), read-only.

    Sent to another process on this machine (by a DataLoader's worker, say), they go as their place in the file, which
    the other maps too; pickled in any other way, as a copy.
    """

    path: str
    identity: tuple[int, int, int]

    @staticmethod
    def whole(fd: int, path: str) -> MappedBytes:
        """All bytes of an open file."""
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
    """A data file, read by position, so that processes that were forked share it without harm.

    Args:
        fd: descriptor of the file; it is ours from now on.
        name: for messages.
        size: bytes that the file must have.
        blocks: XXH3-128 of each block.
        verify: ``first``: check a block when it is first touched; ``always``: at every touch; ``never``.
        seen: a byte for each block, not 0 once it was checked; shared with other processes, each is checked once.
        path: where the file lies, for processes that get bytes of it by their place.

    Raises:
        Damaged: the file has another size.
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

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: modules go first when Python ends
        close(self._fd)

    def __len__(self) -> int:
        return self._size

    def check(self, offset: int, length: int) -> None:
        """Raises Damaged unless the blocks that hold these bytes are as they were written."""
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
        """A copy of ``length`` bytes from ``offset`` on.

        Raises:
            Damaged: they are not what was written, or the file ends before them.
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
        """Numbers that lie at ``offset``; raises Damaged as :meth:`bytes` does."""
        self.check(offset, layout.size)
        return layout.unpack_from(self.unchecked().data, offset)

    def unchecked(self) -> MappedBytes:
        """All bytes, as they lie in memory."""
        if self._map is None:
            self._map = MappedBytes.whole(self._fd, self._path)
        return self._map

    def file(self) -> io.BufferedIOBase:
        """A file object of the whole, for libraries that want one; it checks what is read, and only that."""
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
