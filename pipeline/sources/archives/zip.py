"""Reads zip files by streaming the central directory; memory does not grow with the number of members.

:mod:`zipfile` is not used because it keeps every entry and rejects the whole archive if one name is not UTF-8.
"""

from __future__ import annotations

import bz2
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from pipeline.samples import SampleError
from pipeline.sources.archives.compression import Decoder, Inflate, decode
from pipeline.sources.archives.member import Member, Wants, bomb, damaged, too_many, truncated

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_ELSEWHERE = 0xFFFFFFFF  # the value is in the zip64 extra field
_CHUNK = 1 << 16

_ENCRYPTED, _UTF8 = 0x1, 0x800
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12
_UNIX = (3, 19)  # systems (Unix, macOS) that store a file's mode
_REGULAR_MODES = (0, 0o10)  # not set, regular


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the central directory."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    start: int
    mode: int

    @property
    def error(self) -> SampleError | None:
        """Why the member cannot be read; None if it can."""
        if self.flags & _ENCRYPTED:
            return SampleError("encrypted")
        if self.mode not in _REGULAR_MODES:
            return SampleError("not_regular", "a link or device")
        if self.method not in (_STORED, _DEFLATED, _BZIP2):
            return SampleError("unsupported_compression", f"method {self.method}")
        return None


@dataclass(frozen=True, slots=True)
class _Directory:
    """Position of the central directory and its declared number of entries (possibly modulo 65,536)."""

    start: int
    size: int
    entries: int


def zip_members(file: IO[bytes], max_members: int, most: int, wants: Wants) -> Iterator[Member]:
    """Yield the wanted files of a zip in the order of its directory; all files may unpack to at most ``most`` bytes.

    Raises:
        SampleError: ``truncated_archive``, ``damaged_archive``, ``too_many_members``, ``archive_bomb``.
    """
    end = file.seek(0, io.SEEK_END)
    directory = _directory(file, end)
    count = packed = size = 0
    for entry in _entries(file, directory):
        count += 1
        packed += entry.packed + _LOCAL.size
        size += entry.size
        if count > max_members:
            raise too_many(max_members)
        if size > most:
            raise bomb(f"unpacks to more than {most} bytes")
        if packed > directory.start:
            raise bomb("its members overlap")
        wanted = None if entry.name.endswith("/") else wants(entry.name, entry.size)
        if wanted is not None:
            yield _member(file, entry, wanted, directory.start)
    if count & 0xFFFF != directory.entries & 0xFFFF:
        raise damaged(f"{count} entries in the central directory, not as many as it says")


def _directory(file: IO[bytes], end: int) -> _Directory:
    """Find the central directory from the end record of the file, or from the zip64 end record before it."""
    tail_start = max(0, end - _END.size - _LONGEST_COMMENT)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise truncated("there is no central directory")
    _, disk, first_disk, _, entries, size, start, _ = _END.unpack_from(tail, at)
    if disk != first_disk:
        raise damaged("one part of several")
    position = tail_start + at
    file.seek(max(0, position - _LOCATOR.size - _END64.size))
    before = file.read(_LOCATOR.size + _END64.size)
    if before[_END64.size :][:4] == b"PK\6\7" and before[:4] == b"PK\6\6":
        *_, entries, size, start = _END64.unpack_from(before)
        position -= _LOCATOR.size + _END64.size
    if start + size > position:
        raise damaged("the central directory is not where it should be")
    return _Directory(start, size, entries)


def _entries(file: IO[bytes], directory: _Directory) -> Iterator[_Entry]:
    """Yield the entries of the central directory; the caller may seek in ``file`` between entries."""
    position, stop = directory.start, directory.start + directory.size
    while position < stop:
        file.seek(position)
        fixed = file.read(_ENTRY.size)
        if len(fixed) < _ENTRY.size or fixed[:4] != b"PK\1\2":
            raise damaged("the central directory is damaged")
        fields = _ENTRY.unpack(fixed)
        lengths = fields[10:13]
        position += _ENTRY.size + sum(lengths)
        text = file.read(lengths[0])
        extra = file.read(lengths[1])
        if position > stop or len(text) + len(extra) != lengths[0] + lengths[1]:
            raise damaged("the central directory is damaged")
        yield _entry(fields, text, extra)


def _entry(fields: tuple[int, ...], text: bytes, extra: bytes) -> _Entry:
    made_by, _, flags, method, _, _, crc = fields[1:8]
    size, packed, start = _long((fields[9], fields[8], fields[16]), extra)
    mode = fields[15] >> 28 if made_by >> 8 in _UNIX else 0
    name = _name(text, flags)
    return _Entry(name, flags, method, crc, packed, size, start, mode if not name.endswith("/") else 0)


def _long(values: tuple[int, int, int], extra: bytes) -> tuple[int, int, int]:
    """Replace values that do not fit into 32 bits by those of the zip64 extra field, in this order."""
    at = 0
    numbers: list[int] = []
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            numbers = [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            break
        at += 4 + length
    if len(numbers) < values.count(_ELSEWHERE):
        raise damaged("a zip64 field is missing")
    long = iter(numbers)
    size, packed, start = [next(long) if value == _ELSEWHERE else value for value in values]
    return size, packed, start


def _name(text: bytes, flags: int) -> str:
    """Decode a name: UTF-8 with or without the UTF-8 flag; otherwise, without the flag, MS-DOS code page 437."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("utf-8", "surrogateescape") if flags & _UTF8 else text.decode("cp437")


def _member(file: IO[bytes], entry: _Entry, wanted: int, end: int) -> Member:
    member = Member(entry.name, entry.size, error=entry.error)
    try:
        member.offset = _data_start(file, entry, end)
        if not member.error:
            file.seek(member.offset)
            member.data = _read(file, entry, min(wanted, entry.size))
    except SampleError as error:
        member.error = member.error or SampleError("damaged_member", error.detail)
    return member


def _data_start(file: IO[bytes], entry: _Entry, end: int) -> int:
    """Position of the member's data, after its local header; the data must end before ``end``."""
    file.seek(min(entry.start, end))
    local = file.read(_LOCAL.size)
    if len(local) < _LOCAL.size or local[:4] != b"PK\3\4":
        raise damaged("it is not where it should be")
    start: int = entry.start + _LOCAL.size + sum(_LOCAL.unpack(local)[-2:])
    if start + entry.packed > end:
        raise damaged("it is longer than the archive")
    return start


def _read(file: IO[bytes], entry: _Entry, wanted: int) -> bytes:
    """The first ``wanted`` bytes of a member; the checksum is verified if that is the whole member."""
    if entry.method == _STORED:
        data = file.read(min(wanted, entry.packed))
    else:
        decoder: Decoder = Inflate(-zlib.MAX_WBITS) if entry.method == _DEFLATED else bz2.BZ2Decompressor()
        data = _inflated(file, decoder, entry.packed, wanted)
    if len(data) != wanted:
        raise damaged("it is shorter than it says")
    if wanted == entry.size and zlib.crc32(data) != entry.crc:
        raise damaged("its checksum is wrong")
    return data


def _inflated(file: IO[bytes], decoder: Decoder, packed: int, wanted: int) -> bytes:
    parts: list[bytes] = []
    while wanted and not decoder.eof:
        chunk = file.read(min(_CHUNK, packed)) if decoder.needs_input else b""
        packed -= len(chunk)
        starved = decoder.needs_input and not chunk
        parts.append(decode(decoder, chunk, wanted))
        wanted -= len(parts[-1])
        if starved and not parts[-1]:
            break
    return b"".join(parts)
