"""Random access to a committed data file, each block of 4 MiB checked against its hash before its bytes are used."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from typing import Literal, get_args

import xxhash

from pipeline.storage import BLOCK

Verify = Literal["first", "always", "never"]
VERIFY: tuple[str, ...] = get_args(Verify)


class Damaged(ValueError):
    """The bytes of a data file are not those that were written."""


class BlockFile:
    """A data file, read by position, so that processes that were forked share it without harm.

    Args:
        fd: descriptor of the file; it is ours from now on.
        name: for messages.
        size: bytes that the file must have.
        blocks: XXH3-128 of each block.
        verify: ``first``: check a block when it is first touched; ``always``: at every touch; ``never``.

    Raises:
        Damaged: the file has another size.
    """

    def __init__(self, fd: int, name: str, size: int, blocks: Sequence[str], verify: Verify = "first") -> None:
        self.name = name
        self._fd = fd
        self._size = size
        self._blocks = blocks
        self._map: memoryview | None = None
        self._always = verify == "always"
        # One byte per block, shared with the processes that are forked from now on: each block is checked once.
        self._seen: mmap.mmap | None = None
        if verify != "never" and blocks:
            self._seen = mmap.mmap(-1, len(blocks))
        found = os.fstat(fd).st_size
        if found != size:
            raise Damaged(f"{name} has {found} bytes instead of {size}")

    def __del__(self) -> None:
        os.close(self._fd)

    def __len__(self) -> int:
        return self._size

    def check(self, offset: int, length: int) -> None:
        """Raises Damaged unless the blocks that hold these bytes are as they were written."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise Damaged(f"{self.name} ends before byte {offset + length}")
        if self._seen is None or not length:
            return
        for number in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
            if self._seen[number] and not self._always:
                continue
            block = os.pread(self._fd, BLOCK, number * BLOCK)
            if xxhash.xxh3_128_hexdigest(block) != self._blocks[number]:
                raise Damaged(f"{self.name}: block {number} of {BLOCK >> 20} MiB has changed since it was written")
            self._seen[number] = 1

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

    def view(self, offset: int, length: int) -> memoryview:
        """Like :meth:`bytes`, without a copy: the file as it lies in memory."""
        self.check(offset, length)
        return self.unchecked()[offset : offset + length]

    def unchecked(self) -> memoryview:
        """All bytes, as they lie in memory."""
        if self._map is None:
            self._map = memoryview(mmap.mmap(self._fd, self._size, prot=mmap.PROT_READ) if self._size else b"")
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
