"""Samples with images in MDS folders (``index.json`` and shards), as mosaicml-streaming's MDSWriter writes them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import Outcome, SampleError
from pipeline.samples.captions import repaired
from pipeline.sources.lists import ListRow
from pipeline.sources.parquet_rows import roles_of, row_outcomes
from pipeline.sources.trees import Tree
from pipeline.sources.webdataset import WebDataset, refuse_own

_INDEX = "index.json"
_CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli"}
"""pyarrow's names of compression formats, by the suffix of the shard."""
_LARGEST_INDEX = 1 << 30
_LARGEST_SHARD = 1 << 32  # maximum bytes: offsets have 32 bits
_BLOCK = 1 << 20


@sources.register("mds")
class Mds(WebDataset):
    """Shards whose rows are samples, one partition per shard, in the order of the index.

    A folder of such folders, as several writers create before their indexes are merged, is read as one dataset.
    """

    suffixes = (".mds", *(f".mds.{end}" for end in _CODECS))
    reads = ("mds",)

    def _below(self, tree: Tree) -> list[str]:
        if not tree.is_folder:
            return super()._below(tree)
        refuse_own(tree)
        indexes = _indexes(tree)
        if not indexes:
            raise ConfigError(f"{tree.said}: no {_INDEX} in it or below: its writer did not finish")
        return [shard for index in indexes for shard in _shards(tree, index)]

    def _used(self) -> set[str]:
        return set(_indexes(self.tree))

    def watched(self) -> dict[str, str]:
        """Includes the indexes, which determine the shards and their order."""
        indexes = _indexes(self.tree) if self.config.input and self.tree.is_folder else []
        return super().watched() | {index: self.tree.state(index) for index in indexes}

    def read(self, planned: Input, file: IO[bytes], context: Context) -> Iterator[Outcome]:
        """Raise SampleError ``damaged_mds`` or ``no_column`` before the first outcome."""
        shard = Shard(_unpacked(planned.path, file, self.config.max_archive_bytes), self.config.max_members)
        roles = roles_of(self.config, list(shard.columns))
        rows = shard.rows(roles.wanted)
        return row_outcomes(planned.path, rows, roles, self.config, self.annotations.columns)


def _indexes(tree: Tree) -> list[str]:
    if tree.has(_INDEX):
        return [_INDEX]
    return [name for name in tree.ending([_INDEX]) if name.endswith(f"/{_INDEX}")]


def _shards(tree: Tree, name: str) -> list[str]:
    """Return the files that an index names, all of which must exist.

    Raises:
        ConfigError: a file is missing, or the index is not a valid MDS index.
    """
    index, folder = tree.place(name), name.removesuffix(_INDEX)
    try:
        if tree.size(name) > _LARGEST_INDEX:
            raise ConfigError(f"{index}: larger than {_LARGEST_INDEX >> 20} MiB")
        shards = json.loads(tree.read(name))["shards"]
        names = [[part["basename"] for part in (shard["raw_data"], shard["zip_data"]) if part] for shard in shards]
        kinds = {shard["format"] for shard in shards}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index} is not an index of MDS shards ({type(error).__name__}: {error})") from None
    if kinds - {"mds"}:
        raise ConfigError(f"{index}: its shards are {', '.join(sorted(map(str, kinds)))}, not mds")
    found, missing = [], []
    for either in names:
        if any(not isinstance(n, str) or ".." in PurePosixPath(n).parts or n.startswith("/") for n in either):
            raise ConfigError(f"{index} names the shard {either[0]!r}, which is not below its folder")
        there = [folder + name for name in either if tree.has(folder + name)]
        found += there[:1]
        missing += [] if there else either[:1]
    if missing:
        raise ConfigError(f"{index}: {len(missing)} of {len(names)} shards are not there, such as {missing[0][:200]!r}")
    return found


def _unpacked(name: str, file: IO[bytes], most: int) -> IO[bytes]:
    """Decompress a shard. Raises SampleError if it is damaged or unpacks to more than ``most`` bytes."""
    codec = _CODECS.get(name.rpartition(".")[2])
    if not codec:
        return file
    data = io.BytesIO()
    try:
        with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec) as stream:
            while block := stream.read(_BLOCK):
                data.write(block)
                if data.tell() > min(most, _LARGEST_SHARD):
                    raise SampleError("too_many_bytes", f"more than {min(most, _LARGEST_SHARD)} bytes come out of it")
    except (pa.ArrowException, OSError) as error:
        raise SampleError("damaged_mds", type(error).__name__, retryable=True) from None
    return data


class Shard:
    """An MDS shard: the number of samples, their offsets (uint32), the columns as JSON, and the samples.

    A sample consists of the sizes (uint32) of its variable-size columns, followed by the data of all columns.
    See https://docs.mosaicml.com/projects/streaming/en/stable/preparing_datasets/dataset_format.html.

    Raises:
        SampleError: ``damaged_mds``.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            count = int(np.frombuffer(file.read(4), "<u4")[0])
            if count > most:
                raise ValueError(f"{count} samples")
            self._offsets = np.frombuffer(file.read(4 * (count + 1)), "<u4").astype(np.int64)
            head = 4 * (count + 2)
            if len(self._offsets) != count + 1 or self._offsets[0] < head or (np.diff(self._offsets) < 0).any():
                raise ValueError("offsets")
            if self._offsets[-1] != size:
                raise ValueError(f"{size} bytes instead of {self._offsets[-1]}")
            config: Mapping[str, Any] = json.loads(file.read(int(self._offsets[0]) - head))
            names, kinds, sizes = (config[f"column_{part}"] for part in ("names", "encodings", "sizes"))
            self.columns: dict[str, tuple[str, int | None]] = {
                str(name): (str(kind), None if fixed is None else int(fixed))
                for name, kind, fixed in zip(names, kinds, sizes, strict=True)
            }
            if any(fixed is not None and fixed < 0 for _, fixed in self.columns.values()):
                raise ValueError("a negative size")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise SampleError("damaged_mds", str(error)[:100], retryable=True) from None

    def rows(self, wanted: list[str]) -> Iterator[ListRow]:
        """Yield all rows with the ``wanted`` columns; an invalid row is yielded with an error."""
        for start, stop in zip(self._offsets[:-1].tolist(), self._offsets[1:].tolist(), strict=True):
            self._file.seek(start)
            data = self._file.read(stop - start)
            try:
                values = dict(self._values(data, wanted))
            except ValueError as error:
                yield ListRow(error=str(error)[:200])
            else:
                yield ListRow(values)

    def _values(self, data: bytes, wanted: list[str]) -> Iterator[tuple[str, Any]]:
        variable = sum(fixed is None for _, fixed in self.columns.values())
        if len(data) < 4 * variable:
            raise ValueError("the sample ends in its head")
        sizes = iter(np.frombuffer(data, "<u4", variable).tolist())
        at = 4 * variable
        for name, (kind, fixed) in self.columns.items():
            size = next(sizes) if fixed is None else fixed
            if at + size > len(data):
                raise ValueError(f"column {name} reaches beyond its sample")
            if name in wanted:
                try:
                    yield name, _decoded(kind, data[at : at + size])
                except ValueError as error:
                    raise ValueError(f"column {name}: {error}") from None
            at += size


def _decoded(kind: str, data: bytes) -> Any:
    """Decode a value of the encoding ``kind``. Raises ValueError if it is invalid or the encoding is not supported."""
    base = kind.partition(":")[0]
    if base in _NUMBERS:
        if len(data) != np.dtype(_NUMBERS[base]).itemsize:
            raise ValueError(f"{len(data)} bytes are not a {kind}")
        return np.frombuffer(data, _NUMBERS[base])[0].item()
    if base not in _DECODERS:
        why = "pickled objects are not read: they can run code" if base == "pkl" else "this encoding is not read"
        raise ValueError(f"encoding {kind}: {why}")
    try:
        return _DECODERS[base](data)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _png(data: bytes) -> bytes:
    """Convert the encoding ``pil`` to PNG.

    It consists of width, height and length of the mode's name (uint32 each), the name, and the pixels.
    """
    from PIL import Image

    if len(data) < 12:
        raise ValueError("no image")
    width, height, length = np.frombuffer(data, "<u4", 3).tolist()
    mode = data[12 : 12 + length].decode("ascii")
    if mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"):
        raise ValueError(f"pixels of mode {mode[:20]!r} are not read")
    file = io.BytesIO()
    Image.frombytes(mode, (width, height), data[12 + length :]).save(file, "PNG")
    return file.getvalue()


_NUMBERS = {
    "int": "<i8",
    **{
        f"{sign}int{bits}": f"<{letter}{bits // 8}"
        for sign, letter in (("", "i"), ("u", "u"))
        for bits in (8, 16, 32, 64)
    },
    **{f"float{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "jpeg": bytes,
    "png": bytes,
    "pil": _png,
    "str": repaired,
    "str_int": lambda data: int(data.decode()),
    "str_float": lambda data: float(data.decode()),
    "str_decimal": lambda data: data.decode(),
    "json": json.loads,
}
