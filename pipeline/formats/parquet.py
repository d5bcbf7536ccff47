"""Parquet: row groups of a few MiB. Images are stored plain, so that they can be taken from where they lie."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.formats.base import Create, FileReader, Format, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.formats.columns import WIDE, Columns, arrow_schema, arrow_table
from pipeline.formats.ipc import ordered
from pipeline.samples import Row, Schema
from pipeline.storage import Folder, HashedFile

_GROUP_BYTES = 16 << 20
_GROUP_ROWS = 4096


class _Tee:
    """Writes through to a file, and keeps what was written last."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self._start = 0
        self._kept: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> int:
        self._kept.append(bytes(data))
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def take(self) -> tuple[int, bytes]:
        """Where the bytes since the last call began, and these bytes."""
        start, data = self._start, b"".join(self._kept)
        self._start, self._kept = self._file.tell(), []
        return start, data


class ParquetWriter(Writer):
    def __init__(self, create: Create, schema: Schema, shard_bytes: int) -> None:
        self._create = create
        self._schema = schema
        self._names = ordered(schema)
        self._last = self._names[-1]
        self._limit = shard_bytes
        self._rows: list[Row] = []
        self._size = self._written = 0
        self._files = 0
        self._file: HashedFile | None = None
        self._tee: _Tee | None = None
        self._writer: pq.ParquetWriter | None = None
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
        """Write the rows so far as a row group, and find where the values of the last column lie in it."""
        if self._writer is None:
            self._file = self._create(f"samples.{self._files:05d}.parquet")
            self._tee = _Tee(self._file)
            plain = [name for name in self._names if self._schema[name] in WIDE]
            self._writer = pq.ParquetWriter(
                self._tee,
                arrow_schema(self._schema, self._names),
                compression={name: "none" if name in plain else "zstd" for name in self._names},
                use_dictionary=[name for name in self._names if name not in plain],
                write_statistics=False,
            )
            self._files += 1
        assert self._tee is not None and self._file is not None
        self._writer.write_table(arrow_table(self._rows, self._schema, self._names), row_group_size=len(self._rows))
        start, data = self._tee.take()
        at = 0
        for row in self._rows:
            value = row[self._last]
            found = data.index(len(value).to_bytes(4, "little") + value, at) + 4
            self._locations.append((self._file.name, start + found, len(value)))
            at = found + len(value)
        self._written += self._size
        self._rows, self._size = [], 0

    def _finish(self) -> None:
        if self._rows:
            self._flush()
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.close()
            self._writer = self._tee = self._file = None
        self._written = 0

    def close(self) -> list[Location]:
        self._finish()
        return self._locations


class ParquetReader(FileReader):
    """Small columns in memory; the image from where it lies; other columns of bytes by row group."""

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

    def view(self, number: int, offset: int, length: int) -> np.ndarray | bytes:
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


class Parquet(Format):
    name = "parquet"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return ParquetWriter(create, schema, shard_bytes)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return ParquetReader(open(name), schema)


FORMAT = Parquet()
