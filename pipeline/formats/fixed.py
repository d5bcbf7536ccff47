"""What the formats of fixed size share: images, and masks where there are some, as arrays; the rest as columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import numpy as np

from pipeline.formats.base import IMAGE, MASK, Create, FileReader, Location, Writer
from pipeline.formats.columns import Columns
from pipeline.formats.pixels import to_bytes
from pipeline.samples import Row, Schema

ARRAYS = (IMAGE, MASK)


class FixedWriter(Writer):
    """Collects arrays up to ``shard_bytes`` and writes them as one file; the arrays of a file have one shape."""

    def __init__(self, create: Create, schema: Schema, shard_bytes: int) -> None:
        self.create = create
        self.schema = schema
        self.small = [name for name in schema if name not in ARRAYS]
        self.allocate = self.init_arrays
        self.store = self.write_file
        self._limit = shard_bytes
        self._rows: list[Row] = []
        self._size = 0
        self._files = 0
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        first = self._rows[0] if self._rows else row
        for name in ARRAYS:
            if name in row and (row[name].shape, row[name].dtype) != (first[name].shape, first[name].dtype):
                raise ValueError(f"{row['key']}: {name} is {row[name].shape}, but {first[name].shape} came before")
        size = sum(row[name].nbytes for name in ARRAYS if name in row)
        if self._rows and self._size + size > self._limit:
            self._flush()
        self._rows.append(row)
        self._size += size

    def _flush(self) -> None:
        arrays = self.allocate(len(self._rows), self._rows[0])
        for number, row in enumerate(self._rows):
            for name, array in arrays.items():
                array[number] = row[name]
        self._locations += self.store(self._files, arrays, self._rows)
        self._files += 1
        self._rows, self._size = [], 0

    def init_arrays(self, count: int, first: Row) -> dict[str, np.ndarray]:
        """Arrays (count, h, w[, c]) for the samples of one file, of which ``first`` is one."""
        return {name: np.empty((count, *first[name].shape), first[name].dtype) for name in ARRAYS if name in first}

    @abstractmethod
    def write_file(self, number: int, arrays: dict[str, np.ndarray], rows: list[Row]) -> list[Location]:
        """Write data file ``number``; where the image of each row lies."""

    def close(self) -> list[Location]:
        if self._rows:
            self._flush()
        return self._locations


class FixedReader(FileReader):
    def __init__(self, columns: Columns, schema: Schema) -> None:
        self.columns = columns
        self.schema = schema

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        row: Row = {}
        for name in self.schema if columns is None else columns:
            if name == IMAGE:
                row[name] = to_bytes(self.array(number, offset, length))[0]
            elif name == MASK:
                row[name] = to_bytes(self.mask(number))[0]
            else:
                row[name] = self.columns.value(name, number)
        return row

    def copied(self, number: int, offset: int, length: int) -> Row:
        arrays = {IMAGE: self.array(number, offset, length)}
        if MASK in self.schema:
            arrays[MASK] = self.mask(number)
        return self.row(number, offset, length, self.columns.names) | arrays
