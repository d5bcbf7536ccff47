"""Pointers: ``samples.jsonl`` says which sample of the upstream each row is; the bytes stay there, in its format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from pipeline.formats.base import Create, Format, Location, Writer
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


class Pointer(Format):
    name = "pointer"

    def __init__(self) -> None:
        self._upstreams: WeakKeyDictionary[Folder, RandomAccess] = WeakKeyDictionary()

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int) -> Writer:
        return PointerWriter(create)

    def copied(self, raw: bytes, schema: Schema, origin: Folder | None) -> Row:
        return json.loads(raw)  # type: ignore[no-any-return]

    def decode(self, raw: bytes, schema: Schema, origin: Folder | None) -> Row:
        """Raises SampleError ``missing`` or ``changed_since_plan`` if the upstream is not what was recorded."""
        from pipeline.partitions.dataset import Dataset, RandomAccess, Unfinished

        pointer = json.loads(raw)
        if origin is None:
            raise SampleError("missing", "the dataset directory that the samples lie in is gone", retryable=True)
        try:
            if origin not in self._upstreams:
                self._upstreams[origin] = RandomAccess(Dataset(origin), taken=True)
            upstream = self._upstreams[origin]
            row = upstream.stored(pointer["place"]).read()
        except Unfinished as error:
            raise SampleError("missing", str(error), retryable=True) from None
        except IndexError:
            raise SampleError("changed_since_plan", "the upstream has no such sample") from None
        if row["key"] != pointer["key"]:
            raise SampleError("changed_since_plan", f"the upstream has {row['key']} in the place of {pointer['key']}")
        return row


FORMAT = Pointer()
