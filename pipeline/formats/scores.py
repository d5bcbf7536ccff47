"""Scores: a Parquet file per partition with a column for each score, without images.

Additional column types: ``float`` (float64) and ``vector:<n>`` (n float16 numbers).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.formats.base import Create, FileReader, Format, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.registry import formats
from pipeline.samples import Row, Schema
from pipeline.storage import Folder

FILE = "scores.parquet"
VECTOR = "vector:"
_GROUP = 1 << 14  # rows
_TYPES = {"float": pa.float64(), "int": pa.int64(), "str": pa.string()}


def arrow_type(kind: str) -> pa.DataType:
    """The Arrow type of a column of type ``kind``."""
    return pa.list_(pa.float16(), int(kind[len(VECTOR) :])) if kind.startswith(VECTOR) else _TYPES[kind]


class ScoresWriter(Writer):
    """Rows hold numbers, texts and float16 vectors (n,); None if there is no score."""

    def __init__(self, create: Create, schema: Schema) -> None:
        self._create = create
        self._schema = schema
        self._rows: list[Row] = []
        self._batches: list[pa.RecordBatch] = []
        self._count = 0

    def write(self, row: Row) -> None:
        self._rows.append(row)
        self._count += 1
        if len(self._rows) == _GROUP:
            self._pack()

    def _pack(self) -> None:
        columns = {name: _column([row[name] for row in self._rows], kind) for name, kind in self._schema.items()}
        self._batches.append(pa.RecordBatch.from_pydict(columns))
        self._rows = []

    def close(self) -> list[Location]:
        if not self._count:
            return []
        self._pack()
        file = self._create(FILE)
        table = pa.Table.from_batches([batch for batch in self._batches if batch.num_rows])
        pq.write_table(table, file, compression="zstd", row_group_size=_GROUP, use_dictionary=False)
        file.close()
        return [(file.name, number, 0) for number in range(self._count)]


def _column(values: list[Any], kind: str) -> pa.Array:
    if not kind.startswith(VECTOR):
        return pa.array(values, arrow_type(kind))
    width = int(kind[len(VECTOR) :])
    there = np.array([value is not None for value in values], bool)
    flat = np.zeros((len(values), width), np.float16)
    for number in np.flatnonzero(there):
        flat[number] = values[number]
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), width, mask=pa.array(~there))


class ScoresReader(FileReader):
    def __init__(self, data: BlockFile, schema: Schema) -> None:
        self._data = data
        self._schema = schema
        self._columns: dict[str, Any] = {}

    def table(self, columns: Collection[str] | None = None) -> pa.Table:
        """Read columns of all rows.

        Raises:
            ValueError: the file is damaged.
        """
        self._data.check(0, len(self._data))
        try:
            file = pq.ParquetFile(self._data.file())
            return file.read(list(self._schema if columns is None else columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self._data.name}: {error}") from None

    def vectors(self, column: str) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """Read the vectors of a column, (n, d), and whether each is present and nonzero, (n,).

        Raises:
            ValueError: the file is damaged.
        """
        width = int(self._schema[column].removeprefix(VECTOR))
        found = self.table([column])[column].combine_chunks()
        there = np.asarray(found.is_valid())
        flat = found.fill_null([0.0] * width) if not there.all() else found
        vectors = flat.flatten().to_numpy(zero_copy_only=False).astype(np.float16).reshape(-1, width)
        return vectors, there & vectors.any(1)

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        names = list(self._schema if columns is None else columns)
        missing = [name for name in names if name not in self._columns]
        if missing:
            table = self.table(missing)
            self._columns |= {name: table[name].combine_chunks() for name in missing}
        return {name: self._value(name, number) for name in names}

    def _value(self, name: str, number: int) -> Any:
        value = self._columns[name][number]
        if not self._schema[name].startswith(VECTOR) or not value.is_valid:
            return value.as_py()
        return np.asarray(value.values, np.float16)


@formats.register("scores")
class Scores(Format):
    name = "scores"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return ScoresWriter(create, schema)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> ScoresReader:
        return ScoresReader(open(name), schema)
