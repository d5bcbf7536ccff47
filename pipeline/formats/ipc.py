"""Arrow IPC files with one record batch each, memory-mapped, so that reading an image only copies its bytes."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.formats.base import BufferedWriter, Create, FileReader, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.formats.columns import WIDE, Columns, TableFormat, arrow_schema, arrow_table, ordered
from pipeline.registry import formats
from pipeline.samples import Row, Schema
from pipeline.storage import Folder, HashedFile


class IpcWriter(BufferedWriter):
    """Writes one record batch per file."""

    def __init__(self, create: Create, schema: Schema, shard_bytes: int) -> None:
        super().__init__(create, shard_bytes)
        self._schema = schema
        self._names = ordered(schema)

    def _flush(self, number: int) -> list[Location]:
        last = self._names[-1]
        values = [row[last] for row in self._rows]
        sizes = [len(value) for value in values]
        fields = arrow_schema(self._schema, self._names)
        table = arrow_table(self._rows, self._schema, self._names[:-1])
        name = f"samples.{number:05d}.arrow"
        with self._create(name) as file:
            splice = _Splice(file, values, sum(sizes))
            batch = pa.record_batch(
                [*(column.combine_chunks() for column in table), splice.column(sizes)], schema=fields
            )
            with pa.ipc.new_file(splice, fields) as writer:
                writer.write_batch(batch)
                end = file.tell()  # end of the last column's data, padded to 8 bytes
        at = end - sum(sizes) - -sum(sizes) % 8
        return [(name, at + start, size) for start, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False)]


class _Splice:
    """A file for Arrow that avoids concatenating the values of a column, which Arrow expects in one buffer.

    Arrow gets a buffer of memory that is never touched, and the values are written in its place.
    """

    def __init__(self, file: HashedFile, values: Sequence[bytes], size: int) -> None:
        self._file = file
        self._values = values
        self._hole = mmap.mmap(-1, max(size, 1), prot=mmap.PROT_READ)
        self._size = size
        self._address = pa.py_buffer(self._hole).address
        self.closed = False

    def column(self, sizes: Sequence[int]) -> pa.Array:
        """The column, with untouched memory for its bytes."""
        ends = pa.py_buffer(np.cumsum([0, *sizes], dtype=np.int64))
        data = pa.py_buffer(memoryview(self._hole)[: self._size])
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(sizes), [None, ends, data])

    def write(self, data: Any) -> int:
        if self._size and pa.py_buffer(data).address == self._address:
            return sum(map(self._file.write, self._values))
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """Do nothing: data need not be on disk before the end."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


class IpcReader(FileReader):
    """Keeps small columns in memory and reads values of type bytes directly from the file."""

    def __init__(self, data: BlockFile, schema: Schema) -> None:
        self._data = data
        self._schema = schema
        small = [number for number, name in enumerate(ordered(schema)) if schema[name] not in WIDE]
        try:  # the file object checks footer, metadata and small columns
            checked = pa.ipc.open_file(
                pa.PythonFile(data.file(), mode="r"), options=pa.ipc.IpcReadOptions(included_fields=small)
            )
            self._columns = Columns(pa.Table.from_batches([checked.get_batch(0)]), schema)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{data.name}: {error}") from None
        self._wide = self._spans()

    def _spans(self) -> dict[str, tuple[int, npt.NDArray[Any]]]:
        """Start of the data of each bytes column in the file, and the offsets (n + 1,) of its values."""
        whole = pa.py_buffer(self._data.unchecked())
        batch = pa.ipc.open_file(whole).get_batch(0)
        spans = {}
        for name in batch.schema.names:
            if self._schema[name] in WIDE:
                _, offsets, values = batch.column(name).buffers()
                self._data.check(offsets.address - whole.address, offsets.size)
                spans[name] = (values.address - whole.address, np.frombuffer(offsets, np.int64, len(batch) + 1))
        return spans

    def view(self, number: int, offset: int, length: int) -> npt.NDArray[Any] | bytes:
        return self._data.view(offset, length)

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        row: Row = {}
        for name in self._schema if columns is None else columns:
            if name in self._wide:
                base, offsets = self._wide[name]
                row[name] = self._data.bytes(base + int(offsets[number]), int(offsets[number + 1] - offsets[number]))
            else:
                row[name] = self._columns.value(name, number)
        return row


@formats.register("ipc")
class Ipc(TableFormat):
    name = "ipc"
    pattern = "samples.*.arrow"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return IpcWriter(create, schema, shard_bytes)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return IpcReader(open(name), schema)
