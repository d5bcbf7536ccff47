"""The interface of a storage format, and the formats by name.

A format writes rows into the data files of a partition and returns the location of each row: file, offset and length.
Readers open one data file at a time and read rows by their location, which costs one read in every format. There are
two families:

- *flexible* (tar, mds, parquet, ipc, reference): store the bytes of the image file;
- *fixed* (memmap, hdf5): pixels of one size and mode. Their readers return the same rows: the image is encoded on
  request as a lossless PNG (``npy`` if a PNG cannot hold it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy.typing as npt

from pipeline.formats.blocks import BlockFile
from pipeline.registry import formats
from pipeline.samples import Row, Schema
from pipeline.storage import Folder, HashedFile

IMAGE = "jpg"
"""Column of the image's bytes; in rows for a fixed format, an array (h, w) or (h, w, c) in their place."""
MASK = "mask"
"""Column of the dense label's bytes, a PNG or ``.npy``; in rows for a fixed format, an array (h, w) or (h, w, c)."""

Location = tuple[str, int, int]
"""File in the partition's folder, offset and length in bytes: of the row, or of its image if stored separately."""

Create = Callable[[str], HashedFile]
"""Makes a data file of the partition being written."""

Open = Callable[[str], BlockFile]
"""Opens a data file of the partition being read."""


class Writer(ABC):
    """Writes the kept samples of one partition, in order."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Add one sample."""

    @abstractmethod
    def close(self) -> list[Location]:
        """Finish all files and return the location of each row, in the order in which they were written."""


class BufferedWriter(Writer):
    """Collects rows up to ``shard_bytes`` and writes them to one file."""

    def __init__(self, create: Create, shard_bytes: int) -> None:
        self._create = create
        self._limit = shard_bytes
        self._rows: list[Row] = []
        self._size = 0
        self._files = 0
        self._locations: list[Location] = []

    def write(self, row: Row) -> None:
        size = self._size_of(row)
        if self._rows and self._size + size > self._limit:
            self._write_file()
        self._rows.append(row)
        self._size += size

    def close(self) -> list[Location]:
        if self._rows:
            self._write_file()
        return self._locations

    def _write_file(self) -> None:
        self._locations += self._flush(self._files)
        self._rows, self._size, self._files = [], 0, self._files + 1

    def _size_of(self, row: Row) -> int:
        """Approximate size of a row in bytes."""
        return sum(len(value) for value in row.values() if isinstance(value, (bytes, str)))

    @abstractmethod
    def _flush(self, number: int) -> list[Location]:
        """Write the collected rows as data file ``number`` and return the location of each row."""


class FileReader(ABC):
    """Rows of one data file. A reader is created and used in one process at a time, but may be inherited by a forked
    process."""

    @abstractmethod
    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        """Return row ``number`` of the file, which is stored at ``offset``, with these ``columns`` (None: all).

        Raises:
            SampleError: The row refers to data outside of the file that are missing or have changed.
            ValueError: The bytes are damaged, or are not a row.
        """

    def view(self, number: int, offset: int, length: int) -> npt.NDArray[Any] | bytes:
        """The bytes of the image, uint8 (n,): a view of the file if they are contiguous, otherwise a copy."""
        data: bytes = self.row(number, offset, length, (IMAGE,))[IMAGE]
        return data

    def copied(self, number: int, offset: int, length: int) -> Row:
        """The row in the form that a writer of this format accepts, to write the same bytes again."""
        return self.row(number, offset, length)

    def array(self, number: int, offset: int, length: int) -> npt.NDArray[Any]:
        """Pixels of a fixed format, (h, w) or (h, w, c); a view of the file if they are stored uncompressed."""
        raise TypeError("only formats of fixed size hold arrays")

    def mask(self, number: int) -> npt.NDArray[Any]:
        """Dense label of row ``number`` in a format of fixed size, (h, w, c); a view of the file if it is stored
        uncompressed."""
        raise TypeError("only formats of fixed size hold arrays")


class Format(ABC):
    """One storage format: creates writers and readers, and the index file that the format's own readers expect."""

    name: str
    fixed: bool = False
    """Whether it stores pixels of one size instead of image files."""

    @abstractmethod
    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        """Return a writer for partition number ``partition`` that creates its files with ``create``.

        Args:
            shard_bytes: Largest size of one data file, for formats that write several.
            compression: For formats that support it.
        """

    @abstractmethod
    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None) -> FileReader:
        """Return a reader of the data file ``name``; ``origin`` is the folder that rows may refer to.

        Raises:
            ValueError: the file is damaged.
        """

    index_file: str = ""
    """Name of the file that the format's own readers expect in the root; empty if they need none."""

    pattern: str = ""
    """Glob of a partition's data files if the Hugging Face library can read them, otherwise empty."""

    def features(self, schema: Schema, classes: Sequence[str]) -> list[dict[str, Any]]:
        """The columns in the YAML form of the Hugging Face library; ``classes`` are the names of the labels."""
        return []

    def index(self, schema: Schema, files: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        """Yield the content of ``index_file`` in pieces; ``files`` has path, bytes, xxh3, samples, shard_bytes of each
        file."""
        return iter(())


def register_format(format: Format) -> None:
    """Register ``format`` under its name in this process. To make a format known to all commands of Latentmill, an
    installed package declares an entry point in the group ``latentmill.formats``.

    Raises:
        ConfigError: It has no name, or the name of another format.
    """
    formats.add(getattr(format, "name", ""), format)


def get_format(name: str) -> Format:
    """Return the format called ``name``.

    Raises:
        ConfigError: There is no such format.
    """
    found = formats.get(name)
    if not isinstance(found, type):
        return found  # type: ignore[no-any-return]
    made: Format = _FORMATS.setdefault(found, found())
    return made


_FORMATS: dict[type, Format] = {}
"""One instance per class, as formats have no state."""


def chunked(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Join small byte strings into pieces of about 1 MiB, to write a long text without holding all of it in memory."""
    pieces: list[bytes] = []
    size = 0
    for part in parts:
        pieces.append(part)
        size += len(part)
        if size >= 1 << 20:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join(pieces)


_LARGE = 4096


def joined(pieces: Sequence[bytes]) -> list[bytes]:
    """Join neighbouring small pieces; large ones are not copied."""
    joined: list[bytes] = []
    small: list[bytes] = []
    for piece in pieces:
        if len(piece) > _LARGE:
            joined += [b"".join(small), piece]
            small = []
        else:
            small.append(piece)
    return [*joined, b"".join(small)]
