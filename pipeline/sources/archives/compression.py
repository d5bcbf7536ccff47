"""Decompresses gzip, bzip2 and xz while reading, with a limit on the unpacked size and with their checksums
verified."""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import IO, Protocol

from pipeline.sources.archives.member import bomb, damaged, truncated

_CHUNK = 1 << 16
_PIECE = 1 << 20  # maximum bytes to unpack at a time, whatever was requested
_XZ_MEMORY = 256 << 20  # otherwise, a file could demand a dictionary of 4 GiB


class Decoder(Protocol):
    """The decompressor interface of bz2 and lzma."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class Inflate:
    """zlib's decompressor with the interface of bz2 and lzma. ``wbits``: 31 for gzip, -15 for raw deflate."""

    def __init__(self, wbits: int) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self.eof = False
        self.unused_data = b""
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        unpacked = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.eof, self.unused_data = self._zlib.eof, self._zlib.unused_data
        self.needs_input = not self._zlib.unconsumed_tail
        return unpacked


_KINDS: list[tuple[re.Pattern[bytes], Callable[[], Decoder]]] = [
    (re.compile(rb"\x1f\x8b\x08"), lambda: Inflate(31)),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"), bz2.BZ2Decompressor),
    (re.compile(rb"\xfd7zXZ\0"), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)),
]
MAGIC_BYTES = 10
"""Bytes needed to recognize a compression format."""


def unpacked(file: IO[bytes], most: int) -> IO[bytes]:
    """Return ``file`` itself if it is not compressed, otherwise a stream of its unpacked bytes, at most ``most``."""
    file.seek(0)
    magic = file.read(MAGIC_BYTES)
    file.seek(0)
    for pattern, make in _KINDS:
        if pattern.match(magic):
            return io.BufferedReader(_Unpacking(file, pattern, make, most), 1 << 18)
    return file


class _Unpacking(io.RawIOBase):
    """One or several consecutive compressed streams; other bytes after them are ignored."""

    def __init__(self, file: IO[bytes], magic: re.Pattern[bytes], make: Callable[[], Decoder], most: int) -> None:
        self._file = file
        self._magic = magic
        self._make = make
        self._decoder = make()
        self._most = most
        self._size = 0
        self._end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = b"" if self._end else self._decode(min(len(buffer), _PIECE))
        buffer[: len(data)] = data
        self._size += len(data)
        if self._size > self._most:
            raise bomb(f"unpacks to more than {self._most} bytes")
        return len(data)

    def _decode(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end."""
        while True:
            if self._decoder.eof and not self._next():
                return b""
            packed = self._file.read(_CHUNK) if self._decoder.needs_input else b""
            starved = self._decoder.needs_input and not packed
            if data := decode(self._decoder, packed, size):
                return data
            if starved and not self._decoder.eof:
                raise truncated("the compressed data end too early")

    def _next(self) -> bool:
        """Start the next compressed stream; return whether there is one."""
        rest = self._decoder.unused_data
        rest += self._file.read(MAGIC_BYTES) if len(rest) < MAGIC_BYTES else b""
        self._end = not self._magic.match(rest)
        if self._end:
            return False
        self._file.seek(-len(rest), io.SEEK_CUR)
        self._decoder = self._make()
        return True


def decode(decoder: Decoder, packed: bytes, size: int) -> bytes:
    """Run ``decoder`` once; its exceptions become ``damaged_archive`` errors."""
    try:
        return decoder.decompress(packed, size)
    except (zlib.error, lzma.LZMAError, OSError) as error:  # bz2 raises OSError
        raise damaged(f"the compressed data are damaged ({type(error).__name__})") from None
