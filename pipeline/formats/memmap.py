"""Standard ``.npy`` files: ``np.load(…, mmap_mode="r")`` reads the images, masks and labels of a partition."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.formats.base import IMAGE, MASK, Create, FileReader, Format, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.formats.columns import arrow_table
from pipeline.formats.extension import read_columns, write_columns
from pipeline.formats.fixed import FixedReader, FixedWriter
from pipeline.registry import formats
from pipeline.samples import Row, Schema
from pipeline.storage import Folder

_LABEL = "label"
_MAX_HEADER = 4096


def _header(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue()


class MemmapWriter(FixedWriter):
    """Writes ``images.<n>.npy``, ``masks.<n>.npy`` and ``labels.<n>.npy`` if there are any, and an Arrow file."""

    def write_file(self, number: int, arrays: dict[str, npt.NDArray[Any]], rows: list[Row]) -> list[Location]:
        table = arrow_table(rows, self.schema, self.small)
        write_columns(self.create, number, table)
        labels = {_LABEL: table[_LABEL].to_numpy()} if self.schema.get(_LABEL) == "int" else {}
        for name, array in {**arrays, **labels}.items():
            header = _header(array)
            with self.create(f"{_FILES[name]}.{number:05d}.npy") as file:
                file.write(header)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        images = arrays[IMAGE]
        start, size = len(_header(images)), images[0].nbytes
        return [(f"{_FILES[IMAGE]}.{number:05d}.npy", start + n * size, size) for n in range(len(rows))]


_FILES = {IMAGE: "images", MASK: "masks", _LABEL: "labels"}


class _Array:
    """The array in a ``.npy`` file; items are read without copying."""

    def __init__(self, data: BlockFile) -> None:
        head = io.BytesIO(data.bytes(0, min(_MAX_HEADER, len(data))))
        np.lib.format.read_magic(head)
        shape, _, self._dtype = np.lib.format.read_array_header_1_0(head)
        self._shape = shape[1:]
        self._start = head.tell()
        self._size = int(np.prod(self._shape)) * self._dtype.itemsize
        self._data = data

    def __getitem__(self, number: int) -> npt.NDArray[Any]:
        view = self._data.view(self._start + number * self._size, self._size)
        return np.frombuffer(view, self._dtype).reshape(self._shape)


class MemmapReader(FixedReader):
    def __init__(self, open: Open, name: str, schema: Schema) -> None:
        super().__init__(read_columns(open, name, schema), schema)
        number = int(name.split(".")[1])
        self._images = _Array(open(name))
        self._masks = _Array(open(f"{_FILES[MASK]}.{number:05d}.npy")) if MASK in schema else None

    def array(self, number: int, offset: int, length: int) -> npt.NDArray[Any]:
        return self._images[number]

    def mask(self, number: int) -> npt.NDArray[Any]:
        assert self._masks is not None
        return self._masks[number]


@formats.register("memmap")
class Memmap(Format):
    name = "memmap"
    fixed = True

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return MemmapWriter(create, schema, shard_bytes)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return MemmapReader(open, name, schema)
