"""References: ``samples.jsonl`` holds everything except the image bytes, which stay in their original folder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection

from pipeline.formats.base import IMAGE, Create, FileReader, Format, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.registry import formats
from pipeline.samples import Row, SampleError, Schema, content_hash, real_path
from pipeline.storage import GONE, Folder


class ReferenceWriter(Writer):
    """A row needs ``path`` (below the origin) and ``hash`` (XXH3-128 of the file) instead of keeping ``jpg``."""

    def __init__(self, create: Create, schema: Schema) -> None:
        self._file = create("samples.jsonl")
        self._schema = schema
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        start = self._file.tell()
        kept = {name: row[name] for name in (*self._schema, "path", "hash") if name != IMAGE}
        self._file.write(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        self._locations.append((self._file.name, start, self._file.tell() - start))

    def close(self) -> list[Location]:
        self._file.close()
        return self._locations


class ReferenceReader(FileReader):
    def __init__(self, data: BlockFile, origin: Folder | None) -> None:
        self._data = data
        self._origin = origin

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        """Raise SampleError ``missing``, ``unreadable`` or ``changed_since_plan`` if the file is not as recorded."""
        row: Row = json.loads(self._data.bytes(offset, length))
        path, expected = row.pop("path"), row.pop("hash")
        if columns is None or IMAGE in columns:
            row[IMAGE] = self._image(path, expected)
        return row

    def copied(self, number: int, offset: int, length: int) -> Row:
        return json.loads(self._data.bytes(offset, length))  # type: ignore[no-any-return]

    def _image(self, path: str, expected: str) -> bytes:
        if self._origin is None:
            raise SampleError("missing", "the folder that the samples lie in is gone", retryable=True)
        try:
            with os.fdopen(self._origin.open_file(real_path(path)), "rb") as file:
                data = file.read()
        except OSError as error:
            reason = "missing" if error.errno in GONE else "unreadable"
            raise SampleError(reason, error.strerror or "", retryable=True) from None
        if content_hash(data) != expected:
            raise SampleError("changed_since_plan", "the file is not the one that was recorded", retryable=False)
        return data


@formats.register("reference")
class Reference(Format):
    name = "reference"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return ReferenceWriter(create, schema)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return ReferenceReader(open(name), origin)
