"""Columns of Arrow tables, which parquet, ipc and the formats of fixed size store next to the image."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from pipeline.formats.base import IMAGE, Format
from pipeline.samples import Row, Schema

_TYPES = {"str": pa.string(), "int": pa.int64(), "json": pa.string(), "bytes": pa.large_binary()}
_TYPES["jpeg"] = _TYPES["bytes"]
WIDE = ("bytes", "jpeg")
"""Types of columns whose values may be large."""


def ordered(schema: Schema) -> list[str]:
    """Order columns so that small ones are adjacent in a file: small values, then bytes, then the image."""
    return sorted(schema, key=lambda name: (schema[name] in WIDE, name == IMAGE, name))


def arrow_schema(schema: Schema, names: Iterable[str]) -> pa.Schema:
    """Arrow schema of the columns ``names``; ``json`` is stored as text."""
    return pa.schema([(name, _TYPES[schema[name]]) for name in names])


def arrow_table(rows: Sequence[Row], schema: Schema, names: Sequence[str]) -> pa.Table:
    """Arrow table with the columns ``names`` of ``rows``."""
    fields = arrow_schema(schema, names)
    columns = [pa.array([stored(schema[name], row[name]) for row in rows], fields.field(name).type) for name in names]
    return pa.table(columns, fields)


def stored(kind: str, value: Any) -> Any:
    """Convert a value of type ``kind`` for Arrow."""
    return json.dumps(value, ensure_ascii=False) if kind == "json" else value


_FEATURES = {"str": "string", "json": "string", "int": "int64", "jpeg": "image", "bytes": "large_binary"}


class TableFormat(Format):
    """A format whose files are tables with the columns of the schema."""

    def features(self, schema: Schema, classes: Sequence[str]) -> list[dict[str, Any]]:
        return [{"name": name, **feature(name, schema[name], classes)} for name in ordered(schema)]


def feature(name: str, kind: str, classes: Sequence[str]) -> dict[str, Any]:
    """Type of a column in the YAML form of the Hugging Face library; a label with class names becomes a class label."""
    if name == "label" and kind == "int" and classes:
        return {"dtype": {"class_label": {"names": {str(number): text for number, text in enumerate(classes)}}}}
    return {"dtype": _FEATURES[kind]}


class Columns:
    """Columns in memory, for fast access to single rows."""

    def __init__(self, table: pa.Table, schema: Schema) -> None:
        self._values: dict[str, Any] = {}
        self._kinds = {name: schema[name] for name in table.column_names}
        for name in table.column_names:
            column = table[name].combine_chunks()
            if isinstance(column, pa.ChunkedArray):  # without rows
                column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
            self._values[name] = column.to_numpy(zero_copy_only=False) if schema[name] == "int" else column

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def __getitem__(self, name: str) -> Any:
        """The whole column: int64 (n,) for integers, otherwise an Arrow array."""
        return self._values[name]

    def value(self, name: str, number: int) -> Any:
        """The value of row ``number``.

        Raises:
            ValueError: it is not valid JSON, or there is no such row.
        """
        kind = self._kinds[name]
        try:
            value = self._values[name][number]
        except IndexError:
            raise ValueError(f"there is no row {number}") from None
        if kind == "int":
            return int(value)
        found = value.as_py()
        return json.loads(found) if kind == "json" else found

    def integers(self, name: str) -> npt.NDArray[Any]:
        """An ``int`` column, int64 (n,)."""
        values: npt.NDArray[Any] = self._values[name]
        return values
