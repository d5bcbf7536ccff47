"""Common code of the formats of fixed size, which store images and masks as arrays and other columns separately."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.formats.base import IMAGE, MASK, BufferedWriter, Create, FileReader, Location
from pipeline.formats.columns import Columns
from pipeline.formats.pixel_arrays import to_bytes
from pipeline.samples import Row, Schema

ARRAYS = (IMAGE, MASK)


class FixedWriter(BufferedWriter):
    """Collects arrays up to ``shard_bytes`` and writes them to one file; all arrays of a file have the same shape."""

    def __init__(self, create: Create, schema: Schema, shard_bytes: int) -> None:
        super().__init__(create, shard_bytes)
        self.create = create
        self.schema = schema
        self.small = [name for name in schema if name not in ARRAYS]
        self.allocate = self.init_arrays
        self.store = self.write_file

    def write(self, row: Row) -> None:
        first = self._rows[0] if self._rows else row
        for name in ARRAYS:
            if name in row and (row[name].shape, row[name].dtype) != (first[name].shape, first[name].dtype):
                raise ValueError(f"{row['key']}: {name} is {row[name].shape}, but {first[name].shape} came before")
        super().write(row)

    def _size_of(self, row: Row) -> int:
        return sum(row[name].nbytes for name in ARRAYS if name in row)

    def _flush(self, number: int) -> list[Location]:
        arrays = self.allocate(len(self._rows), self._rows[0])
        for place, row in enumerate(self._rows):
            for name, array in arrays.items():
                array[place] = row[name]
        return self.store(number, arrays, self._rows)

    def init_arrays(self, count: int, first: Row) -> dict[str, npt.NDArray[Any]]:
        """Allocate arrays (count, h, w[, c]) for the samples of a file with the shapes and types of ``first``."""
        return {name: np.empty((count, *first[name].shape), first[name].dtype) for name in ARRAYS if name in first}

    @abstractmethod
    def write_file(self, number: int, arrays: dict[str, npt.NDArray[Any]], rows: list[Row]) -> list[Location]:
        """Write data file ``number`` and return the location of each row's image."""


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
