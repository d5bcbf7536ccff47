"""The interface of a storage format, and the formats by name.

A format turns rows into data files of a partition and says where each row went: file, offset, length. Those bytes
alone give the row back, so that reading a sample at random costs one read in every format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from pipeline.config import ConfigError
from pipeline.samples import Row, Schema
from pipeline.storage import Folder, HashedFile

Location = tuple[str, int, int]
"""File in the partition's folder, offset and length in bytes."""

Create = Callable[[str], HashedFile]
"""Makes a data file of the partition being written."""


class Writer(ABC):
    """Writes the kept samples of one partition, in order."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Add one sample."""

    @abstractmethod
    def close(self) -> list[Location]:
        """Finish all files; where each row lies, in the order of the writes."""


class Format(ABC):
    """One storage format: a maker of writers, a decoder of rows, and what its own readers expect beside the data."""

    name: str

    @abstractmethod
    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int) -> Writer:
        """A writer of partition number ``partition`` that makes its files by ``create``."""

    @abstractmethod
    def decode(self, raw: bytes, schema: Schema, origin: Folder | None) -> Row:
        """The row in the ``raw`` bytes of its location; ``origin`` is the folder that rows may refer to.

        Raises:
            SampleError: what the row refers to is gone or has changed.
            ValueError: the bytes are no row.
        """

    def copied(self, raw: bytes, schema: Schema, origin: Folder | None) -> Row:
        """The row in ``raw`` as a writer takes it, to write the same bytes again."""
        return self.decode(raw, schema, origin)

    index_file: str = ""
    """Name of what the format's own readers expect in the root; most need nothing there."""

    def index(self, schema: Schema, files: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        """Content of ``index_file``, in pieces; ``files`` has path, bytes, xxh3, samples, shard_bytes of each."""
        return iter(())


_MODULES = {"pointer": "pointer", "tar": "tar", "mds": "mds", "reference": "reference"}


def get_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        ConfigError: there is none.
    """
    from pipeline.cli import nearest

    if name not in _MODULES:
        raise ConfigError(f"format={name}: {nearest(name, _MODULES)}")
    return import_module(f"pipeline.formats.{_MODULES[name]}").FORMAT  # type: ignore[no-any-return]


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
