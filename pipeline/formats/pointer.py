"""Pointers: ``samples.jsonl`` says which sample of the upstream each row is; the bytes stay there, in its format."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from pipeline.formats.base import Create, FileReader, Format, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.samples import Row, SampleError, Schema
from pipeline.storage import Folder

if TYPE_CHECKING:
    from pipeline.partitions.dataset import RandomAccess


class PointerWriter(Writer):
    """A row needs ``key`` and ``place``: its position among all samples that the upstream ever kept."""

    def __init__(self, create: Create) -> None:
        self._file = create("samples.jsonl")
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        start = self._file.tell()
        self._file.write(json.dumps({"key": row["key"], "place": row["place"]}).encode() + b"\n")
        self._locations.append((self._file.name, start, self._file.tell() - start))

    def close(self) -> list[Location]:
        self._file.close()
        return self._locations


class PointerReader(FileReader):
    def __init__(self, data: BlockFile, origin: Folder | None) -> None:
        self._data = data
        self._origin = origin
        self._upstream: RandomAccess | None = None

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        """Raises SampleError ``missing`` or ``changed_since_plan`` if the upstream is not what was recorded."""
        from pipeline.partitions.dataset import Dataset, RandomAccess, Unfinished

        pointer = self.copied(number, offset, length)
        if self._origin is None:
            raise SampleError("missing", "the dataset directory that the samples lie in is gone", retryable=True)
        try:
            if self._upstream is None:
                self._upstream = RandomAccess(Dataset(self._origin), taken=True)
            row = self._upstream.stored(pointer["place"]).read()
        except Unfinished as error:
            raise SampleError("missing", str(error), retryable=True) from None
        except IndexError:
            raise SampleError("changed_since_plan", "the upstream has no such sample") from None
        if row["key"] != pointer["key"]:
            raise SampleError("changed_since_plan", f"the upstream has {row['key']} in the place of {pointer['key']}")
        return row

    def copied(self, number: int, offset: int, length: int) -> Row:
        return json.loads(self._data.bytes(offset, length))  # type: ignore[no-any-return]


class Pointer(Format):
    name = "pointer"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return PointerWriter(create)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None) -> FileReader:
        return PointerReader(open(name), origin)


FORMAT = Pointer()
