"""Custom storage formats: define how samples are packed into the bytes of a file, and how they are unpacked.

Partitions, commits, hashes, ledgers, resuming, random access and verification work for every format.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy.typing as npt
import pyarrow as pa

from pipeline.formats.base import IMAGE, MASK, BufferedWriter, Create, FileReader, Format, Location, Open, Writer
from pipeline.formats.blocks import BlockFile
from pipeline.formats.columns import Columns, arrow_table
from pipeline.formats.fixed import FixedReader, FixedWriter
from pipeline.samples import Row, Schema
from pipeline.storage import Folder

_UNPACKED = 4  # files whose unpacked content each process keeps in memory


def columns_file(number: int) -> str:
    """Name of the file with the non-array columns of data file ``number``."""
    return f"columns.{number:05d}.arrow"


def write_columns(create: Create, number: int, table: pa.Table) -> None:
    with create(columns_file(number)) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_columns(open: Open, name: str, schema: Schema) -> Columns:
    """Read the columns that belong to the data file ``name``; raises ValueError if they are damaged."""
    number = int(name.split(".")[1])
    try:
        table = pa.ipc.open_file(pa.PythonFile(open(columns_file(number)).file(), mode="r")).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: {error}") from None
    return Columns(table, schema)


class FixedFiles(Format):
    """A format of fixed size: a file holds the arrays of some samples; their other columns are stored next to it.

    Subclasses set ``name`` and ``suffix``. Instances must be the same in every process: let them have no state.
    """

    fixed = True
    suffix: str = ".bin"
    """Suffix of the data files."""

    @abstractmethod
    def pack(self, arrays: dict[str, npt.NDArray[Any]]) -> bytes:
        """Return the bytes of a file. ``jpg`` holds the images, (n, h, w) or (n, h, w, c), and ``mask``, if there is
        one, the dense labels, (n, h, w, c). Equal arrays must give equal bytes."""

    @abstractmethod
    def unpack(self, data: bytes) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that were given to :meth:`pack`; raise ValueError for bytes that it did not write."""

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return _FixedFilesWriter(self, create, schema, shard_bytes)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return _FixedFilesReader(self, open, name, schema)


class _FixedFilesWriter(FixedWriter):
    def __init__(self, format: FixedFiles, create: Create, schema: Schema, shard_bytes: int) -> None:
        super().__init__(create, schema, shard_bytes)
        self._format = format

    def write_file(self, number: int, arrays: dict[str, npt.NDArray[Any]], rows: list[Row]) -> list[Location]:
        write_columns(self.create, number, arrow_table(rows, self.schema, self.small))
        data = self._format.pack(arrays)
        name = f"arrays.{number:05d}{self._format.suffix}"
        with self.create(name) as file:
            file.write(data)
        return [(name, 0, len(data))] * len(rows)


class FlexibleFiles(Format):
    """A format of flexible size: a file holds some samples, with the bytes of their image files.

    Subclasses set ``name`` and ``suffix``. Instances must be the same in every process: let them have no state.
    """

    suffix: str = ".bin"
    """Suffix of the data files."""

    @abstractmethod
    def pack(self, rows: Sequence[Row]) -> bytes:
        """Return the bytes of a file; equal rows must give equal bytes."""

    @abstractmethod
    def unpack(self, data: bytes) -> Sequence[Row]:
        """Return the rows that were given to :meth:`pack`; raise ValueError for bytes that it did not write."""

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return _FlexibleFilesWriter(self, create, shard_bytes)

    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None = None) -> FileReader:
        return _FlexibleFilesReader(self, open(name), schema)


class _FlexibleFilesWriter(BufferedWriter):
    def __init__(self, format: FlexibleFiles, create: Create, shard_bytes: int) -> None:
        super().__init__(create, shard_bytes)
        self._format = format

    def _flush(self, number: int) -> list[Location]:
        data = self._format.pack(self._rows)
        name = f"rows.{number:05d}{self._format.suffix}"
        with self._create(name) as file:
            file.write(data)
        return [(name, 0, len(data))] * len(self._rows)


class _Content:
    """Unpacked content of a file, kept in memory while it is among the last ones loaded."""

    _kept: ClassVar[deque[_Content]] = deque()

    def __init__(self, format: FixedFiles | FlexibleFiles, data: BlockFile) -> None:
        self._format = format
        self._data = data
        self._content: Any = None

    def get(self) -> Any:
        """Raises ValueError if the file is damaged."""
        content = self._content
        if content is None:
            try:
                content = self._format.unpack(self._data.bytes(0, len(self._data)))
            except Exception as error:  # a custom format may raise any exception
                raise ValueError(f"{self._data.name}: {type(error).__name__}: {error}") from error
            self._content = content
            self._kept.append(self)
            while len(self._kept) > _UNPACKED:
                self._kept.popleft()._content = None
        return content


class _FixedFilesReader(FixedReader):
    def __init__(self, format: FixedFiles, open: Open, name: str, schema: Schema) -> None:
        super().__init__(read_columns(open, name, schema), schema)
        self._content = _Content(format, open(name))

    def array(self, number: int, offset: int, length: int) -> npt.NDArray[Any]:
        return self._of(IMAGE, number)

    def mask(self, number: int) -> npt.NDArray[Any]:
        return self._of(MASK, number)

    def _of(self, column: str, number: int) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self._content.get()[column][number]
        return found


class _FlexibleFilesReader(FileReader):
    def __init__(self, format: FlexibleFiles, data: BlockFile, schema: Schema) -> None:
        self._content = _Content(format, data)
        self._schema = schema

    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        row = self._content.get()[number]
        return {name: row[name] for name in (self._schema if columns is None else columns)}
