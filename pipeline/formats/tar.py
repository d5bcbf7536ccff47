"""WebDataset tar: ``<key>.<image extension>``, ``<key>.txt`` (caption) and ``<key>.json`` (all other columns)."""

from __future__ import annotations

import io
import json
import tarfile

from pipeline.formats.base import Create, Format, Location, Writer
from pipeline.samples import EXTENSIONS, Row, Schema
from pipeline.storage import Folder

_IMAGE = "jpg"


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    header = info.tobuf(tarfile.PAX_FORMAT)
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


class TarWriter(Writer):
    """One tar per partition; members carry no times or owners, so that equal samples give equal bytes."""

    def __init__(self, create: Create, partition: int, schema: Schema) -> None:
        self._file = create(f"{partition:05d}.tar")
        self._schema = schema
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        start = self._file.tell()
        key = row["key"]
        extension = EXTENSIONS.get(row["format"], "bin")
        self._file.write(_member(f"{key}.{extension}", row[_IMAGE]))
        self._file.write(_member(f"{key}.txt", row["caption"].encode()))
        rest = {name: row[name] for name in self._schema if name != _IMAGE}
        self._file.write(_member(f"{key}.json", json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()))
        self._locations.append((self._file.name, start, self._file.tell() - start))

    def close(self) -> list[Location]:
        end = 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end + -(self._file.tell() + end) % tarfile.RECORDSIZE))
        self._file.close()
        return self._locations


class Tar(Format):
    name = "tar"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int) -> Writer:
        return TarWriter(create, partition, schema)

    def decode(self, raw: bytes, schema: Schema, origin: Folder | None = None) -> Row:
        row: Row = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    data = file.read() if file else b""
                    if member.name.endswith(".json"):
                        row |= json.loads(data)
                    elif not member.name.endswith(".txt"):
                        row[_IMAGE] = data
        except (tarfile.TarError, TypeError) as error:
            raise ValueError(f"not a tar sample: {error}") from None
        if row.keys() != schema.keys():
            raise ValueError(f"a tar sample has the columns {sorted(row)}, not {sorted(schema)}")
        return row


FORMAT = Tar()
