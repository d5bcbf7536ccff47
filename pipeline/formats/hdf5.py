"""HDF5: ``images`` and ``masks`` with one chunk per sample, optionally compressed; other columns as datasets.

Pixels are read directly from the chunk's position in the file, so that processes share no handle of the HDF5 library.
"""

from __future__ import annotations

import zlib
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config.schema import ConfigError
from pipeline.formats.base import IMAGE, MASK, Create, FileReader, Format, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.formats.columns import Columns, arrow_schema, arrow_table
from pipeline.formats.fixed import FixedReader, FixedWriter
from pipeline.registry import formats
from pipeline.samples import Row, Schema
from pipeline.storage import Folder

COMPRESSIONS = ("", "gzip")
_GROWTH = 16 << 20  # increment in bytes of a file in memory
_NAMES = {IMAGE: "images", MASK: "masks"}


class Hdf5Writer(FixedWriter):
    """Builds each file in memory, because HDF5 does not write sequentially."""

    def __init__(self, create: Create, schema: Schema, shard_bytes: int, compression: str) -> None:
        super().__init__(create, schema, shard_bytes)
        if compression not in COMPRESSIONS:
            raise ConfigError(f"compression={compression}: HDF5 knows {', '.join(filter(None, COMPRESSIONS))}")
        self._compression = compression or None

    def write_file(self, number: int, arrays: dict[str, npt.NDArray[Any]], rows: list[Row]) -> list[Location]:
        name = f"images.{number:05d}.h5"
        with h5py.File(name, "w", driver="core", backing_store=False, block_size=_GROWTH) as file:
            for column in self.small:  # first, so that they are adjacent
                _add_column(file, column, self.schema, rows)
            for column, array in arrays.items():
                file.create_dataset(
                    _NAMES[column], data=array, chunks=(1, *array.shape[1:]), compression=self._compression
                )
            chunks = [file[_NAMES[IMAGE]].id.get_chunk_info(n) for n in range(len(rows))]
            file.flush()
            image = file.id.get_file_image()
        with self.create(name) as data:
            data.write(image)
        return [(name, chunk.byte_offset, chunk.size) for chunk in chunks]


def _add_column(file: h5py.File, name: str, schema: Schema, rows: list[Row]) -> None:
    if schema[name] == "int":
        file.create_dataset(name, data=np.array([row[name] for row in rows], np.int64))
    elif schema[name] in ("bytes", "jpeg"):
        values = np.empty(len(rows), object)
        values[:] = [np.frombuffer(row[name], np.uint8) for row in rows]
        file.create_dataset(name, data=values, dtype=h5py.vlen_dtype(np.uint8))
    else:
        texts = [text.replace("\0", "\ufffd") for text in arrow_table(rows, schema, [name])[name].to_pylist()]
        file.create_dataset(name, data=texts, dtype=h5py.string_dtype())


class Hdf5Reader(FixedReader):
    def __init__(self, data: BlockFile, schema: Schema) -> None:
        small = [name for name in schema if name not in _NAMES]
        try:
            with h5py.File(data.file(), "r") as file:
                values = {}
                for name in small:
                    kind = schema[name]
                    column = file[name]
                    plain = column[:] if kind == "int" else column.asstr()[:] if kind in ("str", "json") else None
                    values[name] = plain if plain is not None else [bytes(value) for value in column[:]]
                self._layout = {name: _Chunks(file[_NAMES[name]]) for name in _NAMES if name in schema}
        except (OSError, KeyError, RuntimeError) as error:
            raise ValueError(f"{data.name}: {error}") from None
        fields = arrow_schema(schema, small)
        arrays = [pa.array(list(values[name]), fields.field(name).type) for name in small]
        super().__init__(Columns(pa.table(arrays, fields), schema), schema)
        self._data = data

    def array(self, number: int, offset: int, length: int) -> npt.NDArray[Any]:
        return self._layout[IMAGE].take(self._data, number)

    def mask(self, number: int) -> npt.NDArray[Any]:
        return self._layout[MASK].take(self._data, number)


class _Chunks:
    """Positions of the items of an HDF5 dataset in the file."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._shape, self._dtype = dataset.shape[1:], dataset.dtype
        self._compressed = dataset.compression is not None
        spans: list[tuple[int, int]] = [(0, 0)] * len(dataset)

        def note(chunk: h5py.h5d.StoreInfo) -> None:
            spans[chunk.chunk_offset[0]] = (chunk.byte_offset, chunk.size)

        dataset.id.chunk_iter(note)
        self._spans = np.array(spans, np.int64).reshape(-1, 2)

    def take(self, data: BlockFile, number: int) -> npt.NDArray[Any]:
        offset, size = self._spans[number].tolist()
        raw: memoryview | bytes = data.view(offset, size).data
        if self._compressed:
            try:
                raw = zlib.decompress(raw)
            except zlib.error as error:
                raise ValueError(f"{data.name}: {error}") from None
        return np.frombuffer(raw, self._dtype).reshape(self._shape)


@formats.register("hdf5")
class Hdf5(Format):
    name = "hdf5"
    fixed = True

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return Hdf5Writer(create, schema, shard_bytes, compression)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return Hdf5Reader(open(name), schema)
