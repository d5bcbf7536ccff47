"""Reads tar files as a stream: ustar, pax and GNU headers of limited size; memory does not grow with the members.

:mod:`tarfile` is not used because it keeps every header, processes headers recursively, reads headers of any claimed
size into memory, and treats a damaged header as the end of the archive.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from pipeline.samples import SampleError
from pipeline.sources.archives.member import Member, Wants, bomb, damaged, too_many, truncated

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 20
_LONGEST_HEADER = 1 << 20  # maximum bytes of an extension header, which holds a name and some attributes
_EXTENSIONS = 32  # maximum extension headers of a member

_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"  # links, devices, directories, pipes: no data, whatever size they claim
_SOLARIS, _PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE, _DIRECTORY = b"XxgLKS5"


@dataclass(slots=True)
class _Entry:
    """A member's header, including the values of its extension headers."""

    name: bytes
    size: int
    kind: int
    sparse: bool = False

    @property
    def is_folder(self) -> bool:
        return self.kind == _DIRECTORY or (self.kind == 0 and self.name.endswith(b"/"))

    @property
    def is_file(self) -> bool:
        return self.kind in _REGULAR and not self.sparse


class _Reader:
    """Reads a stream sequentially and tracks its position."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._size = -1
        if stream.seekable():
            self._size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
        self.position = 0

    def some(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only at the end."""
        if self._size >= 0:
            size = min(size, self._size - self.position)
        data = self._stream.read(size)
        self.position += len(data)
        return data

    def exactly(self, size: int) -> bytes:
        data = self.some(size)
        if len(data) != size:
            raise truncated(f"it ends after {self.position} bytes")
        return data

    def skip(self, size: int) -> None:
        if self._size < 0:
            while size:
                size -= len(self.exactly(min(size, _CHUNK)))
        elif size > self._size - self.position:
            raise truncated(f"it ends after {self._size} bytes")
        else:
            self.position = self._stream.seek(size, io.SEEK_CUR)


def tar_members(stream: IO[bytes], max_members: int, wants: Wants) -> Iterator[Member]:
    """Yield the wanted files of a tar in order; read ``stream`` to its end, seeking if possible.

    Another tar after an end marker is read too (``cat a.tar b.tar``).

    Raises:
        SampleError: ``not_an_archive``, ``truncated_archive``, ``damaged_archive``, ``too_many_members``,
            ``archive_bomb``.
    """
    reader = _Reader(stream)
    count = 0
    block = reader.some(BLOCK)
    if len(block) < BLOCK or (block != _ZEROS and not _is_header(block)):
        raise SampleError("not_an_archive", "neither tar nor zip", retryable=True)
    while block:
        while block != _ZEROS:
            entry = _entry(block, reader)
            count += 1
            if count > max_members:
                raise too_many(max_members)
            yield from _member(entry, reader, wants)
            block = reader.some(BLOCK)
            if len(block) != BLOCK:
                raise truncated("there is no end marker")
        block = _after_end(reader)


def _member(entry: _Entry, reader: _Reader, wants: Wants) -> Iterator[Member]:
    """Yield the member if it is wanted, and skip to its end."""
    start, stored = reader.position, 0 if entry.kind in _WITHOUT_DATA else entry.size
    name = entry.name.decode("utf-8", "surrogateescape")
    wanted = None if entry.is_folder else wants(name, entry.size)
    if wanted is not None:
        member = Member(name, entry.size, start)
        if entry.is_file:
            member.data = reader.exactly(min(wanted, stored))
        else:
            member.error = SampleError("not_regular", "a link, device or sparse file")
        yield member
    reader.skip(start + stored + -stored % BLOCK - reader.position)


def _after_end(reader: _Reader) -> bytes:
    """The next header after an end marker; empty, with the stream read to its end, if there is none."""
    while (block := reader.some(BLOCK)) == _ZEROS:
        pass
    if _is_header(block):
        return block
    while reader.some(_CHUNK):  # verifies the checksum at the end of a compressed stream
        pass
    return b""


# ---- headers


def _entry(block: bytes, reader: _Reader) -> _Entry:
    """The header in ``block``; for an extension header, the member's header after it, with extensions applied."""
    said: dict[bytes, bytes] = {}
    for _ in range(_EXTENSIONS):
        entry = _parse(block)
        if entry.kind not in (_LONG_NAME, _LONG_LINK, _PAX, _SOLARIS, _PAX_GLOBAL):
            more = entry.kind == _SPARSE and block[482]
            while more:  # the map of an old GNU sparse file continues
                more = reader.exactly(BLOCK)[504]
            return _completed(entry, said)
        if entry.size > _LONGEST_HEADER:
            raise bomb(f"a header of {entry.size} bytes")
        data = reader.exactly(entry.size)
        reader.skip(-entry.size % BLOCK)
        if entry.kind == _LONG_NAME:
            said[b"path"] = data.partition(b"\0")[0]
        elif entry.kind in (_PAX, _SOLARIS):
            said.update(_records(data))
        block = reader.exactly(BLOCK)
    raise bomb(f"more than {_EXTENSIONS} headers of one member")


def _completed(entry: _Entry, said: dict[bytes, bytes]) -> _Entry:
    entry.name = said.get(b"GNU.sparse.name") or said.get(b"path") or entry.name
    if size := said.get(b"size"):
        if not size.isdigit() or len(size) > 20:
            raise damaged("a size is not a number")
        entry.size = int(size)
    entry.sparse = entry.kind == _SPARSE or any(key.startswith(b"GNU.sparse.") for key in said)
    return entry


def _parse(block: bytes) -> _Entry:
    if not _is_header(block):
        raise damaged("a header is damaged")
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":  # GNU headers store other fields there
        name = prefix + b"/" + name
    return _Entry(name, _number(block[124:136]), block[156])


def _is_header(block: bytes) -> bool:
    """Whether the checksum is correct; some old programs compute it from signed bytes."""
    if len(block) != BLOCK:
        return False
    try:
        expected = _number(block[148:156])
    except SampleError:
        return False
    field = 8 * ord(" ") - sum(block[148:156])
    if expected == sum(block) + field:
        return True
    found: bool = expected == sum(struct.unpack("148b8x356b", block)) + 8 * ord(" ")
    return found


def _number(field: bytes) -> int:
    """Parse octal digits or, for larger values, a binary number whose highest bit is set."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise damaged("a negative number in a header")
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.rstrip(b"\0 ")
    if not digits.isdigit():
        digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise damaged("a number in a header is none")
    return int(digits or b"0", 8)


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a pax header: ``<length> <key>=<value>\\n``, where the length covers the whole record."""
    at = 0
    data = data.rstrip(b"\0")
    while at < len(data):
        digits = data[at : at + 20].partition(b" ")[0]
        if not digits.isdigit():
            raise damaged("a pax header is malformed")
        stop = at + int(digits)
        key, equals, value = data[at + len(digits) + 1 : stop - 1].partition(b"=")
        if stop > len(data) or not equals or data[stop - 1 : stop] != b"\n":
            raise damaged("a pax header is malformed")
        yield key, value
        at = stop
