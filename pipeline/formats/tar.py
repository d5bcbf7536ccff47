"""WebDataset tar: ``<key>.<image extension>``, ``<key>.txt`` (caption) and ``<key>.json`` (all other columns)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy.typing as npt

from pipeline.formats.base import IMAGE, Create, FileReader, Format, Location, Open, Writer, joined
from pipeline.formats.blocks import BlockFile
from pipeline.formats.columns import WIDE, feature
from pipeline.registry import formats
from pipeline.samples import EXTENSIONS, Row, Schema
from pipeline.storage import Folder


def _member(name: str, data: bytes) -> Sequence[bytes]:
    """Header, data and padding of a member."""
    return _header(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)


def _header(name: str, size: int) -> bytes:
    """The same header as that of the standard library, which takes 30 times as long."""
    text = name.encode()
    if len(text) > 100 or not name.isascii() or size >= 8**11:
        return _slow_header(name, size)
    head = bytearray(_EMPTY)
    head[: len(text)] = text
    head[124:135] = b"%011o" % size
    head[148:156] = b"%06o\0 " % (_EMPTY_SUM + sum(text) + sum(head[124:135]))
    return bytes(head)


def _slow_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


_EMPTY = _slow_header("", 0)
_EMPTY_SUM = sum(_EMPTY) - sum(_EMPTY[124:135]) - sum(_EMPTY[148:156]) + sum(b" " * 8)  # checksum field as blanks
_as_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def _binary_columns(schema: Schema) -> list[str]:
    """Bytes columns other than the image; each is a separate member, ``<key>.<column>.<extension>``."""
    return sorted(name for name, kind in schema.items() if kind in WIDE and name != IMAGE)


def _binary_extension(name: str, data: bytes) -> str:
    return f"{name}.{'png' if data.startswith(_PNG) else 'npy' if data.startswith(_NPY) else 'bin'}"


_PNG, _NPY = b"\x89PNG", b"\x93NUMPY"


class TarWriter(Writer):
    """Writes one tar per partition; members have no times or owners, so that equal samples give equal bytes."""

    def __init__(self, create: Create, partition: int, schema: Schema) -> None:
        self._file = create(f"{partition:05d}.tar")
        self._schema = schema
        self._binary = _binary_columns(schema)
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        start = self._file.tell()
        key = row["key"]
        extension = EXTENSIONS.get(row["format"], "bin")
        parts = [*_member(f"{key}.{extension}", row[IMAGE]), *_member(f"{key}.txt", row["caption"].encode())]
        for name in self._binary:
            parts += _member(f"{key}.{_binary_extension(name, row[name])}", row[name])
        rest = {name: row[name] for name, kind in self._schema.items() if kind not in WIDE}
        for piece in joined([*parts, *_member(f"{key}.json", _as_json(rest).encode())]):
            self._file.write(piece)
        self._locations.append((self._file.name, start, self._file.tell() - start))

    def close(self) -> list[Location]:
        end = 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end + -(self._file.tell() + end) % tarfile.RECORDSIZE))
        self._file.close()
        return self._locations


class TarReader(FileReader):
    """Reads the members of a sample; headers are parsed here, as the standard library takes longer than the read."""

    def __init__(self, data: BlockFile, schema: Schema) -> None:
        self._data = data
        self._schema = schema
        self._binary = _binary_columns(schema)

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        wanted = set(self._schema if columns is None else columns)
        row: Row = {}
        for name, start, size in self._members(offset, offset + length):
            if wanted <= row.keys():
                break
            if name.endswith(".json"):
                row |= json.loads(self._data.bytes(start, size))
            elif (column := self._column_of(name)) in wanted:
                row[column] = self._data.bytes(start, size)
        if not wanted <= row.keys():
            raise ValueError(f"a tar sample has the columns {sorted(row)}, not {sorted(wanted)}")
        return row if columns is None else {name: row[name] for name in wanted}

    def view(self, number: int, offset: int, length: int) -> npt.NDArray[Any] | bytes:
        for name, start, size in self._members(offset, offset + length):
            if self._column_of(name) == IMAGE:
                return self._data.view(start, size)
        raise ValueError("a tar sample without an image")

    def _column_of(self, member: str) -> str:
        """The bytes column that a member holds; empty for the caption and the JSON member."""
        stem, _, extension = member.rpartition(".")
        if extension in ("json", "txt"):
            return ""
        return next((column for column in self._binary if stem.endswith(f".{column}")), IMAGE)

    def _members(self, at: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Name, start and size of the data of each regular member."""
        block = tarfile.BLOCKSIZE
        while at < stop:
            header = self._data.bytes(at, block)
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
            kind = header[156:157]
            if kind in (b"x", b"g"):  # a long name in an extended header
                yield from self._long(at, stop)
                return
            yield header[:100].rstrip(b"\0").decode("utf-8", "replace"), at + block, size
            at += block + size + -size % block

    def _long(self, at: int, stop: int) -> Iterator[tuple[str, int, int]]:
        try:
            with tarfile.open(fileobj=io.BytesIO(self._data.bytes(at, stop - at)), mode="r:") as archive:
                for member in archive:
                    yield member.name, at + member.offset_data, member.size
        except tarfile.TarError as error:
            raise ValueError(f"not a tar sample: {error}") from None


@formats.register("tar")
class Tar(Format):
    name = "tar"
    pattern = "*.tar"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return TarWriter(create, partition, schema)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return TarReader(open(name), schema)

    def features(self, schema: Schema, classes: Sequence[str]) -> list[dict[str, Any]]:
        """One feature per kind of member; an image is in the column of its extension, and the others are null."""
        images = [{"name": extension, "dtype": "image"} for extension in EXTENSIONS.values()]
        masks = [{"name": f"{name}.{end}", "dtype": kind} for name in _binary_columns(schema) for end, kind in _ENDS]
        rest = [
            {"name": name, **({"list": "string"} if name == "captions" else _within(name, kind, classes))}
            for name, kind in sorted(schema.items())
            if kind not in WIDE
        ]
        texts = [{"name": name, "dtype": "string"} for name in ("__key__", "__url__", "txt")]
        return [*texts, *images, *masks, {"name": "json", "struct": rest}]


_ENDS = (("png", "image"), ("bin", "binary"))


def _within(name: str, kind: str, classes: Sequence[str]) -> dict[str, Any]:
    return {"dtype": "json"} if kind == "json" else feature(name, kind, classes)
