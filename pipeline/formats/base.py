"""The interface of a storage format, and the formats by name.

A format turns rows into data files of a partition and says where each row went: file, offset, length. Readers open one
data file at a time and take rows out of it by that location, which costs one read in every format. Two families:

- *flexible* (tar, mds, parquet, ipc, reference): the image as the bytes it came as;
- *fixed* (memmap, hdf5): pixels of one size and mode. Their rows look the same from outside: the image is then a
  lossless PNG (``npy`` where a PNG cannot hold it), made when it is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from pipeline.config.schema import ConfigError
from pipeline.formats.blocks import BlockFile
from pipeline.samples import Row, Schema
from pipeline.storage import Folder, HashedFile

IMAGE = "jpg"
"""Column of the image's bytes; in rows for a fixed format, an array (h, w) or (h, w, c) in their place."""
MASK = "mask"
"""Column of the dense label's bytes, a PNG or ``.npy``; in rows for a fixed format, an array (h, w) or (h, w, c)."""

Location = tuple[str, int, int]
"""File in the partition's folder, offset and length in bytes: of the row, or of its image where columns lie apart."""

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
        """Finish all files; where each row lies, in the order of the writes."""


class FileReader(ABC):
    """Rows of one data file; made and used in one process at a time, but safe to carry over a fork."""

    @abstractmethod
    def row(self, number: int, offset: int, length: int, columns: Collection[str] | None = None) -> Row:
        """Row ``number`` of the file, which lies at ``offset``; of its ``columns`` only these (None: all).

        Raises:
            SampleError: what the row refers to, outside of the file, is gone or has changed.
            ValueError: the bytes are damaged, or no row.
        """

    def view(self, number: int, offset: int, length: int) -> np.ndarray | bytes:
        """The image's bytes as they lie in the file, uint8 (n,), where they lie in one piece; else a copy."""
        data: bytes = self.row(number, offset, length, (IMAGE,))[IMAGE]
        return data

    def copied(self, number: int, offset: int, length: int) -> Row:
        """The row as a writer of this format takes it, to write the same bytes again."""
        return self.row(number, offset, length)

    def array(self, number: int, offset: int, length: int) -> np.ndarray:
        """Pixels of a fixed format (h, w) or (h, w, c), without a copy where they are stored as they are."""
        raise TypeError("only formats of fixed size hold arrays")

    def mask(self, number: int) -> np.ndarray:
        """Dense label of row ``number`` in a format of fixed size, (h, w, c), likewise."""
        raise TypeError("only formats of fixed size hold arrays")


class Format(ABC):
    """One storage format: a maker of writers and readers, and what its own readers expect beside the data."""

    name: str
    fixed: bool = False
    """Whether it holds pixels, all of one size, in place of image files."""

    @abstractmethod
    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        """A writer of partition number ``partition`` that makes its files by ``create``.

        Args:
            shard_bytes: largest size of one data file, where the format has several.
            compression: of a format that knows one.
        """

    @abstractmethod
    def open(self, open: Open, name: str, schema: Schema, origin: Folder | None) -> FileReader:
        """A reader of the data file ``name``; ``origin`` is the folder that rows may refer to.

        Raises:
            ValueError: the file is damaged.
        """

    index_file: str = ""
    """Name of what the format's own readers expect in the root; most need nothing there."""

    pattern: str = ""
    """Glob of a partition's data files, where the Hugging Face library reads them; else empty."""

    def features(self, schema: Schema, classes: Sequence[str]) -> list[dict[str, Any]]:
        """The columns as that library's YAML describes them; ``classes`` are the names of the labels."""
        return []

    def index(self, schema: Schema, files: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        """Content of ``index_file``, in pieces; ``files`` has path, bytes, xxh3, samples, shard_bytes of each."""
        return iter(())


_MODULES = {
    "tar": "tar",
    "mds": "mds",
    "parquet": "parquet",
    "ipc": "ipc",
    "memmap": "memmap",
    "hdf5": "hdf5",
    "reference": "reference",
    "pointer": "pointer",
}


_ADDED: dict[str, Format] = {}
_ENTRY_POINTS = "latentmill.formats"


def register_format(format: Format) -> None:
    """Let ``format`` be known by its name in this process. An installed package makes its format known to all of
    Latentmill's commands with an entry point of the group ``latentmill.formats``.

    Raises:
        ConfigError: it has no name, or that of another format.
    """
    name = getattr(format, "name", "")
    other = _ADDED.get(name)
    if not name or not name.isidentifier():
        raise ConfigError(f"{type(format).__name__}.name={name!r}: expected letters, digits and _")
    if name in _MODULES or (other is not None and type(other).__qualname__ != type(format).__qualname__):
        raise ConfigError(f"{type(format).__name__}.name={name}: there is another format of this name")
    _ADDED[name] = format


def get_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        ConfigError: there is none.
    """
    from pipeline.config.cli import nearest

    if name in _MODULES:
        return import_module(f"pipeline.formats.{_MODULES[name]}").FORMAT  # type: ignore[no-any-return]
    if name not in _ADDED:
        for point in entry_points(group=_ENTRY_POINTS, name=name):
            found = point.load()
            register_format(found() if isinstance(found, type) else found)
    if name not in _ADDED:
        raise ConfigError(
            f"format={name}: {nearest(name, {**_MODULES, **_ADDED})}. One of your own is known where the module that "
            f"defines it was imported, or by an entry point of the group {_ENTRY_POINTS}"
        )
    return _ADDED[name]


def chunked(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Join small byte strings into pieces of about 1 MiB, to write a long text without holding all of it."""
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
    """Small neighbours as one piece; large ones are not copied."""
    joined: list[bytes] = []
    small: list[bytes] = []
    for piece in pieces:
        if len(piece) > _LARGE:
            joined += [b"".join(small), piece]
            small = []
        else:
            small.append(piece)
    return [*joined, b"".join(small)]
