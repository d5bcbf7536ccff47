"""References: ``samples.jsonl`` holds everything but the image bytes, which stay in the folder they came from."""

from __future__ import annotations

import json
import os

from pipeline.formats.base import Create, Format, Location, Writer
from pipeline.samples import Row, SampleError, Schema, content_hash, real_path
from pipeline.storage import GONE, Folder

_IMAGE = "jpg"


class ReferenceWriter(Writer):
    """A row needs ``path`` (below the origin) and ``hash`` (XXH3-128 of the file) in place of keeping ``jpg``."""

    def __init__(self, create: Create, schema: Schema) -> None:
        self._file = create("samples.jsonl")
        self._schema = schema
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        start = self._file.tell()
        kept = {name: row[name] for name in (*self._schema, "path", "hash") if name != _IMAGE}
        self._file.write(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        self._locations.append((self._file.name, start, self._file.tell() - start))

    def close(self) -> list[Location]:
        self._file.close()
        return self._locations


class Reference(Format):
    name = "reference"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int) -> Writer:
        return ReferenceWriter(create, schema)

    def copied(self, raw: bytes, schema: Schema, origin: Folder | None) -> Row:
        return json.loads(raw)  # type: ignore[no-any-return]

    def decode(self, raw: bytes, schema: Schema, origin: Folder | None) -> Row:
        """Raises SampleError ``missing`` or ``changed_since_plan`` if the file is not what was recorded."""
        row = json.loads(raw)
        path, expected = row.pop("path"), row.pop("hash")
        if origin is None:
            raise SampleError("missing", "the folder that the samples lie in is gone", retryable=True)
        try:
            with os.fdopen(origin.open_file(real_path(path)), "rb") as file:
                row[_IMAGE] = file.read()
        except OSError as error:
            reason = "missing" if error.errno in GONE else "unreadable"
            raise SampleError(reason, error.strerror or "", retryable=True) from None
        if content_hash(row[_IMAGE]) != expected:
            raise SampleError("changed_since_plan", "the file is not the one that was recorded", retryable=False)
        return row  # type: ignore[no-any-return]


FORMAT = Reference()
