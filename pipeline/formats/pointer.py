"""Pointers: ``samples.jsonl`` refers to samples of the upstream, where the bytes stay in its format.

A row may add or replace columns, such as rewritten captions.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from pipeline.formats.base import Create, FileReader, Format, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.registry import formats
from pipeline.samples import Row, SampleError, Schema
from pipeline.storage import Folder

if TYPE_CHECKING:
    from pipeline.partitions.dataset import RandomAccess


_LINES = 1024  # lines written at once
_encode = json.JSONEncoder().encode


class PointerWriter(Writer):
    """A row needs ``key`` and ``place``, its position among all samples that the upstream ever kept. Other columns
    replace those of the sample or are added to them."""

    def __init__(self, create: Create) -> None:
        self._file = create("samples.jsonl")
        self._locations: list[Location] = []
        self._size = 0
        self._lines: list[bytes] = []

    def write(self, row: Row) -> None:
        line = _encode({"key": row["key"], "place": row["place"], **row}).encode() + b"\n"
        self._locations.append((self._file.name, self._size, len(line)))
        self._size += len(line)
        self._lines.append(line)
        if len(self._lines) == _LINES:
            self._flush()

    def _flush(self) -> None:
        self._file.write(b"".join(self._lines))
        self._lines = []

    def close(self) -> list[Location]:
        self._flush()
        self._file.close()
        return self._locations


class PointerReader(FileReader):
    def __init__(self, data: BlockFile, origin: Folder | None) -> None:
        self._data = data
        self._origin = origin
        self._upstream: RandomAccess | None = None

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        """Raise SampleError ``missing`` or ``changed_since_plan`` if the upstream is missing or has changed."""
        from pipeline.partitions.dataset import Dataset, RandomAccess, Unfinished

        pointer = self.copied(number, offset, length)
        if self._origin is None:
            raise SampleError("missing", "the dataset directory that the samples lie in is gone", retryable=True)
        try:
            if self._upstream is None:
                self._upstream = RandomAccess(Dataset(self._origin), taken=True)
            wanted = None if columns is None else {"key", *columns} - {*pointer} | {"key"}
            row = self._upstream.stored(pointer["place"]).read(wanted)
        except Unfinished as error:
            raise SampleError("missing", str(error), retryable=True) from None
        except IndexError:
            raise SampleError("changed_since_plan", "the upstream has no such sample") from None
        if row["key"] != pointer["key"]:
            raise SampleError("changed_since_plan", f"the upstream has {row['key']} in the place of {pointer['key']}")
        del pointer["place"]
        return row | pointer

    def copied(self, number: int, offset: int, length: int) -> Row:
        return json.loads(self._data.bytes(offset, length))  # type: ignore[no-any-return]


@formats.register("pointer")
class Pointer(Format):
    name = "pointer"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return PointerWriter(create)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None) -> FileReader:
        return PointerReader(open(name), origin)
