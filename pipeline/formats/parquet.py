"""Parquet with row groups of a few MiB. Bytes columns are stored uncompressed, so that values can be read in place.

pyarrow's writer is not used because it copies each value five times and does not report positions in the file: with it,
stage=shard takes 2.1 times as long (benchmarks/parquet_writer.py, 133 kB JPEGs, in memory). The format
(https://parquet.apache.org) consists of pages of values, each after its header, and a footer with their positions.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.formats import thrift
from pipeline.formats.base import Create, FileReader, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.formats.columns import WIDE, Columns, TableFormat, arrow_schema, ordered, stored
from pipeline.formats.thrift import I32, I64
from pipeline.registry import formats
from pipeline.samples import Row, Schema
from pipeline.storage import Folder, HashedFile

_GROUP_BYTES = 16 << 20
_GROUP_ROWS = 4096
_PAGE_BYTES = 1 << 20
_MAGIC = b"PAR1"
_INT64, _BYTE_ARRAY = I32(2), I32(6)
_PLAIN, _RLE = I32(0), I32(3)
_OPTIONAL = I32(1)
_TEXT = {6: I32(0), 10: {1: {}}}
"""Marks a field as UTF-8, both as ConvertedType and as LogicalType."""
_CODECS = {"": I32(0), "zstd": I32(6)}


class ParquetWriter(Writer):
    def __init__(self, create: Create, schema: Schema, shard_bytes: int) -> None:
        self._create = create
        self._schema = schema
        self._names = ordered(schema)
        self._limit = shard_bytes
        self._rows: list[Row] = []
        self._size = self._written = 0
        self._files = 0
        self._file: HashedFile | None = None
        self._groups: list[dict[int, Any]] = []
        self._count = 0
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        size = sum(len(value) for value in row.values() if isinstance(value, (bytes, str)))
        if self._rows and self._written + self._size + size > self._limit:
            self._finish()
        elif self._rows and (self._size + size > _GROUP_BYTES or len(self._rows) == _GROUP_ROWS):
            self._flush()
        self._rows.append(row)
        self._size += size

    def _flush(self) -> None:
        """Write the collected rows as a row group."""
        if self._file is None:
            self._file = self._create(f"samples.{self._files:05d}.parquet")
            self._file.write(_MAGIC)
            self._files += 1
        start = self._file.tell()
        chunks = [self._chunk(name, self._file) for name in self._names]
        size = sum(chunk[3][6] for chunk in chunks)
        group = {1: chunks, 2: I64(size), 3: I64(len(self._rows)), 5: I64(start), 6: I64(self._file.tell() - start)}
        self._groups.append(group)
        self._count += len(self._rows)
        self._written += self._size
        self._rows, self._size = [], 0

    def _chunk(self, name: str, file: HashedFile) -> dict[int, Any]:
        """Write a column of the row group; return its entry in the footer."""
        start, kind = file.tell(), self._schema[name]
        values = [stored(kind, row[name]) for row in self._rows]
        codec, unpacked = "", 0
        if kind in WIDE:
            places = []
            for page in _pages(values):
                places += _write_page(page, file)
            if name == self._names[-1]:
                self._locations += [(file.name, at, length) for at, length in places]
        else:
            codec = "zstd"
            unpacked = _write_packed(values, kind, file)
        packed = file.tell() - start
        about = {
            1: _INT64 if kind == "int" else _BYTE_ARRAY,
            2: [_PLAIN, _RLE],
            3: [name],
            4: _CODECS[codec],
            5: I64(len(values)),
            6: I64(unpacked or packed),
            7: I64(packed),
            9: I64(start),
        }
        return {2: I64(0), 3: about}

    def _footer(self) -> bytes:
        fields = [
            {1: _INT64 if kind == "int" else _BYTE_ARRAY, 3: _OPTIONAL, 4: name, **({} if kind in _BARE else _TEXT)}
            for name, kind in ((name, self._schema[name]) for name in self._names)
        ]
        types = base64.b64encode(arrow_schema(self._schema, self._names).serialize()).decode()
        return thrift.packed(
            {
                1: I32(2),
                2: [{4: "schema", 5: I32(len(fields))}, *fields],
                3: I64(self._count),
                4: self._groups,
                5: [{1: "ARROW:schema", 2: types}],
                6: "latentmill",
            }
        )

    def _finish(self) -> None:
        if self._rows:
            self._flush()
        if self._file is not None:
            footer = self._footer()
            self._file.write(footer + len(footer).to_bytes(4, "little") + _MAGIC)
            self._file.close()
            self._file = None
        self._written = self._count = 0
        self._groups = []

    def close(self) -> list[Location]:
        self._finish()
        return self._locations


_BARE = ("int", *WIDE)
"""Types of columns that are not text."""


def _pages(values: Sequence[bytes | None]) -> Iterator[list[bytes | None]]:
    page: list[bytes | None] = []
    size = 0
    for value in values:
        length = 4 + len(value or b"")
        if page and size + length > _PAGE_BYTES:
            yield page
            page, size = [], 0
        page.append(value)
        size += length
    yield page


def _write_page(values: Sequence[bytes | None], file: HashedFile) -> list[tuple[int, int]]:
    """Write an uncompressed page of bytes; return position and length of each value."""
    levels = _levels(values)
    size = len(levels) + sum(4 + len(value) for value in values if value is not None)
    file.write(_header(len(values), size, size) + levels)
    places = []
    for value in values:
        if value is not None:
            file.write(len(value).to_bytes(4, "little"))
        places.append((file.tell(), len(value or b"")))
        if value is not None:
            file.write(value)
    return places


def _write_packed(values: Sequence[Any], kind: str, file: HashedFile) -> int:
    """Write a compressed page of short values; return its uncompressed size, including the header."""
    there = [value for value in values if value is not None]
    if kind == "int":
        plain = np.array(there, np.int64).tobytes()
    else:
        plain = b"".join(len(data).to_bytes(4, "little") + data for data in (text.encode() for text in there))
    plain = _levels(values) + plain
    packed = pa.compress(plain, "zstd", asbytes=True)
    header = _header(len(values), len(plain), len(packed))
    file.write(header + packed)
    return len(header) + len(plain)


def _levels(values: Sequence[Any]) -> bytes:
    """Definition levels (whether a value is not null), run-length encoded, after their size."""
    runs = b"".join(
        thrift.varint(sum(1 for _ in run) << 1) + bytes([there])
        for there, run in groupby(value is not None for value in values)
    )
    return len(runs).to_bytes(4, "little") + runs


def _header(count: int, size: int, packed: int) -> bytes:
    if size >= 2**31:
        raise ValueError(f"a page of {size} bytes does not fit into Parquet: choose another format")
    return thrift.packed({1: I32(0), 2: I32(size), 3: I32(packed), 5: {1: I32(count), 2: _PLAIN, 3: _RLE, 4: _RLE}})


class ParquetReader(FileReader):
    """Keeps small columns in memory, reads the image in place, and other bytes columns by row group."""

    def __init__(self, data: BlockFile, schema: Schema) -> None:
        self._data = data
        self._schema = schema
        names = ordered(schema)
        self._last = names[-1]
        self._wide = [name for name in names[:-1] if schema[name] in WIDE]
        file = self._file()
        groups = file.metadata
        self._starts = np.cumsum([0, *(groups.row_group(i).num_rows for i in range(groups.num_row_groups))])
        self._columns = self._read(file, None, [name for name in names[:-1] if name not in self._wide])
        self._group = -1
        self._others: Columns | None = None

    def _file(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._data.file())
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self._data.name}: {error}") from None

    def _read(self, file: pq.ParquetFile, group: int | None, names: list[str]) -> Columns:
        try:
            table = (
                file.read(names, use_threads=False)
                if group is None
                else file.read_row_group(group, names, use_threads=False)
            )
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self._data.name}: {error}") from None
        return Columns(table.select(names), self._schema)

    def view(self, number: int, offset: int, length: int) -> npt.NDArray[Any] | bytes:
        return self._data.view(offset, length)

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        row: Row = {}
        for name in self._schema if columns is None else columns:
            if name == self._last:
                row[name] = self._data.bytes(offset, length)
            elif name in self._wide:
                group = int(np.searchsorted(self._starts, number, "right")) - 1
                if group != self._group or self._others is None:
                    self._group, self._others = group, self._read(self._file(), group, self._wide)
                row[name] = self._others.value(name, number - int(self._starts[group]))
            else:
                row[name] = self._columns.value(name, number)
        return row


@formats.register("parquet")
class Parquet(TableFormat):
    name = "parquet"
    pattern = "samples.*.parquet"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return ParquetWriter(create, schema, shard_bytes)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return ParquetReader(open(name), schema)
