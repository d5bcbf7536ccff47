"""MDS, the format of mosaicml-streaming: StreamingDataset can read a finished dataset directory directly.

A shard consists of ``uint32 n``, ``uint32 offset[n + 1]``, its config as JSON, and the samples. A sample consists of
the uint32 sizes of its variable-size columns, followed by all columns, sorted by name (layout version 2).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.formats.base import IMAGE, Create, FileReader, Format, Location, Open, Writer, chunked, joined
from pipeline.formats.blocks import BlockFile
from pipeline.registry import formats
from pipeline.samples import Row, Schema
from pipeline.storage import Folder

_SIZES = {"int": 8}
_HASH = "xxh3_128"


def _encode(kind: str, value: Any) -> bytes:
    if kind == "str":
        return value.encode()  # type: ignore[no-any-return]
    if kind == "int":
        return np.int64(value).tobytes()
    if kind == "json":
        return json.dumps(value, ensure_ascii=False).encode()
    return bytes(value)


def _decode(kind: str, data: bytes) -> Any:
    if kind == "str":
        return data.decode()
    if kind == "int":
        return int(np.frombuffer(data, np.int64)[0])
    return json.loads(data) if kind == "json" else data


def shard_config(schema: Schema, shard_bytes: int) -> dict[str, Any]:
    """The part of a shard's description that all shards of a dataset share."""
    names = sorted(schema)
    return {
        "column_encodings": [schema[name] for name in names],
        "column_names": names,
        "column_sizes": [_SIZES.get(schema[name]) for name in names],
        "compression": None,
        "format": "mds",
        "hashes": [_HASH],
        "size_limit": shard_bytes,
        "version": 2,
    }


class MdsWriter(Writer):
    """Collects samples up to ``shard_bytes`` and writes them as a shard, because the header depends on all of them."""

    def __init__(self, create: Create, schema: Schema, shard_bytes: int) -> None:
        self._create = create
        self._columns = [(name, schema[name]) for name in sorted(schema)]
        self._config = json.dumps(shard_config(schema, shard_bytes), sort_keys=True).encode()
        self._limit = shard_bytes
        self._samples: list[list[bytes]] = []
        self._lengths = [0]
        self._size = self._empty_size = 8 + len(self._config)
        self._shards = 0
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        columns = [(kind, _encode(kind, row[name])) for name, kind in self._columns]
        sizes = np.array([len(data) for kind, data in columns if kind not in _SIZES], np.uint32)
        sample = joined([sizes.tobytes(), *(data for _, data in columns)])
        length = sum(map(len, sample))
        if self._samples and self._size + length + 4 > self._limit:
            self._flush()
        self._samples.append(sample)
        self._lengths.append(length)
        self._size += length + 4

    def _flush(self) -> None:
        name = f"shard.{self._shards:05d}.mds"
        count = len(self._samples)
        offsets = np.array(self._lengths, np.int64).cumsum() + 4 + 4 * (count + 1) + len(self._config)
        if offsets[-1] >= 2**32:
            raise ValueError(f"{name}: {offsets[-1]} bytes do not fit an MDS shard; lower shard_bytes=")
        with self._create(name) as file:
            file.write(np.uint32(count).tobytes() + offsets.astype(np.uint32).tobytes() + self._config)
            for sample in self._samples:
                for piece in sample:
                    file.write(piece)
        self._locations += [(name, o, n) for o, n in zip(offsets.tolist(), self._lengths[1:], strict=False)]
        self._shards += 1
        self._samples, self._lengths, self._size = [], [0], self._empty_size

    def close(self) -> list[Location]:
        if self._samples:
            self._flush()
        return self._locations


class MdsReader(FileReader):
    def __init__(self, data: BlockFile, schema: Schema) -> None:
        self._data = data
        self._columns = [(name, schema[name], _SIZES.get(schema[name])) for name in sorted(schema)]
        self._head = struct.Struct(f"<{sum(size is None for _, _, size in self._columns)}I")

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        row: Row = {}
        for name, kind, at, size in self._spans(offset, length):
            if columns is None or name in columns:
                row[name] = _decode(kind, self._data.bytes(at, size))
        return row

    def view(self, number: int, offset: int, length: int) -> npt.NDArray[Any] | bytes:
        return next(self._data.view(at, size) for name, _, at, size in self._spans(offset, length) if name == IMAGE)

    def _spans(self, offset: int, length: int) -> list[tuple[str, str, int, int]]:
        """Name, type, position and size of each column of the sample at ``offset``."""
        sizes = iter(self._data.unpack(self._head, offset))
        at = offset + self._head.size
        spans = []
        for name, kind, size in self._columns:
            size = next(sizes) if size is None else size
            spans.append((name, kind, at, size))
            at += size
        if at != offset + length:
            raise ValueError(f"an MDS sample of {length} bytes says that it has {at - offset}")
        return spans


@formats.register("mds")
class Mds(Format):
    name = "mds"
    index_file = "index.json"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return MdsWriter(create, schema, shard_bytes)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return MdsReader(open(name), schema)

    def index(self, schema: Schema, files: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        """``index.json``, which names every shard by its path below the root."""
        return chunked(self._index_parts(schema, files))

    def _index_parts(self, schema: Schema, files: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        yield b'{"shards": ['
        for number, file in enumerate(files):
            shard = {
                **shard_config(schema, file["shard_bytes"]),
                "raw_data": {"basename": file["path"], "bytes": file["bytes"], "hashes": {_HASH: file["xxh3"]}},
                "samples": file["samples"],
                "zip_data": None,
            }
            yield (b",\n" if number else b"") + json.dumps(shard, sort_keys=True).encode()
        yield b'], "version": 2}\n'
