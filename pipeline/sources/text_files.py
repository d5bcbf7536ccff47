"""Reads text files with any compression and byte order mark as numbered lines of UTF-8."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from pipeline.config.schema import ConfigError
from pipeline.samples import SampleError
from pipeline.samples.captions import repaired
from pipeline.sources.archives.compression import unpacked

MOST = 1 << 40
"""Maximum unpacked bytes of a list."""
LONGEST = 64 << 20
"""Maximum bytes of a line."""
PACKED = (".gz", ".bz2", ".xz")
_CHUNK = 1 << 16
_MARKS = (
    (codecs.BOM_UTF8, ""),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # must precede UTF-16's mark, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def list_errors(path: Path | str) -> Iterator[None]:
    """Convert errors that concern a whole file into a ConfigError that names it."""
    try:
        yield
    except SampleError as error:
        raise ConfigError(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except (OSError, pa.ArrowException) as error:
        said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{path}: cannot be read: {said}") from None
    except (MemoryError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}") from None


def suffix_of(path: Path | str) -> str:
    """The lower-case suffix of a file, ignoring compression: ``.csv`` for ``a.CSV.gz``."""
    path = Path(path)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins with ``start`` is a Git LFS pointer."""
    return start.startswith(_POINTER)


def open_text(file: IO[bytes]) -> tuple[IO[bytes], int]:
    """Return the text in ``file`` as a UTF-8 stream, and the size of its byte order mark in bytes.

    The stream is seekable if ``file`` is uncompressed UTF-8; see :func:`skip`.

    Raises:
        SampleError: it is a Git LFS pointer.
    """
    stream = unpacked(file, MOST)
    if stream is file:
        start = stream.read(_CHUNK)
        stream.seek(0)
    else:
        start = stream.peek(_CHUNK)  # type: ignore[attr-defined]
    if is_pointer(start):
        raise SampleError("lfs_pointer", "a pointer of Git LFS: fetch the file itself with `git lfs pull`")
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            if not encoding:
                return stream, len(mark)
            skip(stream, len(mark))
            return io.BufferedReader(_Transcoded(stream, encoding), _CHUNK), 0
    if b"\r" in start and b"\n" not in start:  # line ends of classic Mac OS
        return io.BufferedReader(_Transcoded(stream, "utf-8", "\r"), _CHUNK), 0
    return stream, 0


def skip(stream: IO[bytes], count: int) -> None:
    """Skip ``count`` bytes of a stream that need not be seekable."""
    if stream.seekable():
        stream.seek(count, io.SEEK_CUR)
        return
    while count > 0 and (data := stream.read(min(count, _CHUNK))):
        count -= len(data)


class _Transcoded(io.RawIOBase):
    """Converts text in another encoding, or with other line ends, to UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str, end: str = "\n") -> None:
        self._stream = stream
        self._newline = end
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._rest = b""
        self._end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest and not self._end:
            data = self._stream.read(_CHUNK)
            self._end = not data
            text = self._decoder.decode(data, self._end).replace(self._newline, "\n")
            self._rest = text.encode("utf-8", "replace")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


class Lines:
    """Reads numbered lines from a stream; lines can be put back.

    Attributes:
        at: number of bytes taken.
        number: number of the last line taken, from 1.
    """

    def __init__(self, stream: IO[bytes], at: int = 0, number: int = 0) -> None:
        self._stream = stream
        self._back: list[bytes] = []
        self.at = at
        self.number = number

    def take(self) -> bytes:
        """Return the next line with its line end; empty at the end of the stream.

        Raises:
            SampleError: ``line_too_long``.
        """
        line = self._back.pop() if self._back else self._stream.readline(LONGEST + 1)
        if len(line) > LONGEST:
            raise SampleError("line_too_long", f"line {self.number + 1} has more than {LONGEST >> 20} MiB")
        self.at += len(line)
        self.number += bool(line)
        return line

    def put_back(self, lines: list[bytes]) -> None:
        """Put ``lines`` back, to be taken again."""
        for line in reversed(lines):
            self._back.append(line)
            self.at -= len(line)
            self.number -= 1


def lines_of(path: Path) -> Iterator[str]:
    """Yield the non-blank lines of a text file, stripped.

    Raises:
        ConfigError: the file cannot be read or is not UTF-8.
    """
    with list_errors(path), path.open("rb") as file:
        stream, mark = open_text(file)
        skip(stream, mark)
        lines = Lines(stream)
        while line := lines.take():
            if text := line.decode().strip():
                yield text


def decoded(line: bytes) -> str:
    """Decode a line without its line end; invalid UTF-8 becomes U+FFFD, and NULs are removed."""
    return line.decode("utf-8", "replace").replace("\0", "").rstrip("\r\n")


def small_text(data: bytes) -> str:
    """The stripped text of a small file in UTF-8, or in the encoding of its byte order mark."""
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data.removeprefix(mark).decode(encoding, "replace").strip()
    return repaired(data.removeprefix(b"\xef\xbb\xbf")).strip()
