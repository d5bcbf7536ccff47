"""Read access to a dataset directory: plans, slots, records, samples, and whether it is finished."""

from __future__ import annotations

import bisect
import mmap
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import stores
from pipeline.config.schema import STAGES, ConfigError
from pipeline.formats.base import FileReader, Format, get_format
from pipeline.formats.blocks import BlockFile, Verify, blocks_of
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.ledger import parse_ledger
from pipeline.partitions.packs import Packs
from pipeline.partitions.plan import BUCKET, RELEASE, TAKEDOWN, Partition, PartitionReader, Plan, read_plans
from pipeline.samples import TAKEN, Row, SampleError, Schema
from pipeline.storage import GONE, Folder, StorageError, digest, unsealed

SUCCESS = "_SUCCESS"
RECORD = "record.json"
MANIFEST = "manifest.parquet"
Value = TypeVar("Value")


class Unfinished(ConfigError):
    """A dataset directory that is to be read is missing or not complete."""


class Released(StorageError):
    """The data were removed on purpose, because the output made from them is complete."""

    def __init__(self, root: Path, stage: str) -> None:
        super().__init__(
            f"{root}: its data were removed (keep_raw=false, keep=latents); ledgers are kept. "
            f"stage={stage} restore=true restores the data"
        )


def open_root(path: str | Path) -> Folder:
    """Open the root folder of a dataset directory, on disk or in an object store.

    Raises:
        Unfinished: there is no such folder.
        StoreError: the store cannot be reached.
    """
    try:
        return stores.open_folder(path) if stores.is_url(path) else Folder.open(path)
    except FileNotFoundError:
        raise Unfinished(f"{path} does not exist") from None
    except NotADirectoryError:
        raise Unfinished(f"{path} is not a folder") from None


@dataclass(frozen=True, slots=True)
class Stored:
    """A kept sample of a dataset directory: how to find it, and how to read it.

    Attributes:
        source: the partition, as the path ``data/BBB/PPPPP`` relative to the dataset's root.
        offset: its position among all samples ever kept in the partition. Unlike a position in bytes, it stays the
            same after a repair or takedown of the partition.
        file, start, length: data file in the partition's folder, first byte and number of bytes.
        number: its row in the file.
    """

    key: str
    source: str
    offset: int
    file: str
    start: int
    length: int
    number: int
    reader: SlotReader

    def read(self, columns: Collection[str] | None = None) -> Row:
        """The sample's row, with only these columns (None: all).

        Raises:
            SampleError: a file that it refers to, outside the dataset directory, is gone or has changed; or the sample
                was taken down.
            StorageError: the dataset directory is damaged.
        """
        if not self.file:
            raise SampleError(TAKEN, "removed by stage=takedown")
        try:
            return self.reader.open(self.file).row(self.number, self.start, self.length, columns)
        except DAMAGE as error:
            raise self._damaged(error) from error

    def copied(self) -> Row:
        """The row in the form that the format's writer accepts, to write the same bytes again.

        Raises:
            StorageError: the dataset directory is damaged.
        """
        try:
            return self.reader.open(self.file).copied(self.number, self.start, self.length)
        except DAMAGE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> StorageError:
        return damaged(self.reader.root, f"{self.reader.path}/{self.file}", self.key, error)


DAMAGE = (ValueError, KeyError, IndexError, OSError)


def damaged(root: Path, source: str, key: str, error: Exception) -> StorageError:
    """The error to raise for a damaged sample, which names its key and its file."""
    return StorageError(
        f"{root}: sample {key} in {source} is damaged ({type(error).__name__}: {error}): run stage=repair on {root}"
    )


@dataclass(frozen=True, slots=True)
class Index:
    """Locations of the kept samples of a partition, in order; small enough to keep those of many samples in memory."""

    names: list[str]
    """Data files."""
    files: npt.NDArray[Any]
    """Each sample's file, as an index into ``names``, int16 (n,)."""
    numbers: npt.NDArray[Any]
    """Row in the file, int32 (n,)."""
    offsets: npt.NDArray[Any]
    """First byte in the file, int64 (n,)."""
    lengths: npt.NDArray[Any]
    """Number of bytes, int64 (n,)."""


class SlotReader:
    """Reads rows of one committed partition; data files stay open between reads.

    Args:
        verify: when blocks of data files are checked against their hashes, see :class:`BlockFile`.
        seen: one byte for each block of all files, in the record's order; not 0 if the block has been checked.
    """

    def __init__(self, dataset: Dataset, index: int, verify: Verify = "first", seen: memoryview | None = None) -> None:
        self.path = dataset.path_of(index)
        self.root = dataset.root.path
        self._dataset = dataset
        self._index = index
        self._verify = verify
        self._seen = seen
        try:
            self._folder = dataset.root.folder(self.path)
        except OSError as error:
            if error.errno in GONE:
                raise StorageError(f"{dataset.root.path / self.path} is missing: run stage=repair on it") from None
            raise
        self._readers: dict[str, FileReader] = {}

    @cached_property
    def record(self) -> dict[str, Any]:
        """The content of record.json."""
        return unsealed(self.record_bytes(), self.root / self.path / RECORD)

    def record_bytes(self) -> bytes:
        """The bytes of record.json; raises StorageError if there is none."""
        data = self._dataset.small_file(self._index, RECORD)
        if data is None:
            raise StorageError(f"{self.root / self.path} is damaged: run stage=repair on {self.root}")
        return data

    @cached_property
    def _files(self) -> dict[str, dict[str, Any]]:
        return {file["name"]: file for file in self.record["files"]}

    def open(self, file: str) -> FileReader:
        """The reader of a data file.

        Raises:
            KeyError, OSError, ValueError: the file does not exist or is damaged.
            Released: it was removed on purpose.
        """
        if file not in self._readers:
            if self._index in self._dataset.released:
                raise Released(self.root, self._dataset.stage)
            dataset = self._dataset
            self._readers[file] = dataset.format.open(self._blocks, file, dataset.schema, dataset.origin)
        return self._readers[file]

    def _blocks(self, file: str) -> BlockFile:
        entry = self._files[file]
        seen = None
        if self._seen is not None:
            before = sum(len(other["blocks"]) for other in self.record["files"] if other["name"] < file)
            seen = self._seen[before : before + len(entry["blocks"])]
        fd = self._folder.open_file(file)
        place = str(self._folder.path / file)
        return BlockFile(fd, f"{self.path}/{file}", entry["bytes"], entry["blocks"], self._verify, seen, place)

    def stored(self, taken: bool = False) -> list[Stored]:
        """The kept samples of the partition, in order; with ``taken``, also those that were taken down later.

        Raises:
            StorageError: the record or the ledger is damaged.
        """
        columns = ["key", "container", "outcome", "reason", "file", "offset", "length"]
        table = self.ledger(columns).to_pydict()
        source = self._dataset.partition_path(self._index)
        numbers: Counter[str] = Counter()
        stored: list[Stored] = []
        for key, container, outcome, reason, file, start, length in zip(*(table[c] for c in columns), strict=True):
            if not container and (outcome == "kept" or (outcome == "dropped" and reason == TAKEN)):
                name = file or ""
                stored.append(Stored(key, source, len(stored), name, start, length, numbers[name], self))
                numbers[name] += 1
        return stored if taken else [sample for sample in stored if sample.file]

    def index(self) -> Index:
        """The locations of the kept samples; raises StorageError if the record or the ledger is damaged."""
        table = self._kept(["file", "offset", "length"])
        encoded = table["file"].combine_chunks().dictionary_encode()
        files = np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int16)
        numbers = np.zeros(len(files), np.int32)
        for file in range(len(encoded.dictionary)):
            mine = files == file
            numbers[mine] = np.arange(mine.sum())
        return Index(
            encoded.dictionary.to_pylist(),
            files,
            numbers,
            table["offset"].to_numpy(),
            table["length"].to_numpy(),
        )

    def keys(self) -> list[str]:
        """The keys of the kept samples, in order."""
        keys: list[str] = self._kept(["key"])["key"].to_pylist()
        return keys

    def _kept(self, columns: list[str]) -> pa.Table:
        table = self.ledger([*columns, "container", "outcome"])
        kept = pc.and_(pc.equal(table["outcome"], "kept"), pc.invert(table["container"]))
        return table.filter(kept).select(columns)

    def ledger(self, columns: list[str] | None = None) -> pa.Table:
        """The ledger, after a check of its hash: a changed byte could silently change a key or hide a sample.

        Raises:
            StorageError: the record or the ledger is damaged.
        """
        return parse_ledger(self.ledger_bytes(), columns)

    def ledger_bytes(self) -> bytes:
        """The bytes of the ledger; raises StorageError if they do not match the record."""
        try:
            data = self._dataset.small_file(self._index, LEDGER)
        except OSError as error:
            raise StorageError(
                f"{self.root / self.path / LEDGER} cannot be read ({error.strerror}): run stage=repair on {self.root}"
            ) from error
        if data is None:
            raise StorageError(f"{self.root / self.path / LEDGER} is missing: run stage=repair on {self.root}")
        if digest(data) != self._files[LEDGER]["xxh3"]:
            raise StorageError(f"{self.root / self.path} is damaged: run stage=repair on {self.root}")
        return data


class Dataset:
    """An opened dataset directory with at least one plan.

    Raises:
        Unfinished: the folder has no plan.
    """

    def __init__(self, root: Folder, generations: int | None = None) -> None:
        """``generations``: number of generations to read (None: all)."""
        self.root = root
        self.plans: list[Plan] = read_plans(root)[:generations]
        if not self.plans:
            raise Unfinished(
                f"{root.path} is not a dataset directory (no plan/ in it): "
                f"stage=download{' source=mds' if root.exists('index.json') else ''} makes one of images, tars of "
                "WebDataset, Parquet or Arrow files, or MDS"
            )
        self.packs = Packs(root)
        self._readers = [PartitionReader(root, plan) for plan in self.plans]
        self._firsts = [plan.first for plan in self.plans]

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        return cls(open_root(path))

    @property
    def header(self) -> dict[str, Any]:
        """plan.json of the first generation: stage, config, schema, format."""
        return self.plans[0].header

    @property
    def stage(self) -> str:
        return str(self.header["stage"])

    @cached_property
    def schema(self) -> Schema:
        return dict(self.header["schema"])

    @cached_property
    def format(self) -> Format:
        return get_format(self.header["format"])

    @cached_property
    def origin(self) -> Folder | None:
        """The folder outside this dataset that its rows refer to, if its format stores references."""
        try:
            return Folder.open(self.header["origin"]) if self.header.get("origin") else None
        except OSError:
            return None

    @cached_property
    def taken(self) -> dict[str, tuple[int, str]]:
        """Keys that were taken down → the partition of the key's newest row, and the reason in that row."""
        return {key: tuple(row) for plan in self.plans for key, row in plan.header.get("taken", {}).items()}

    @cached_property
    def released(self) -> frozenset[int]:
        """Partitions of which only the ledger and the record are left."""
        numbers: set[int] = set()
        for plan in self.plans:
            if plan.header["kind"] == RELEASE:
                numbers |= plan.redo
            elif plan.header["kind"] != TAKEDOWN:  # a takedown does not restore data
                numbers -= plan.redo
        return frozenset(numbers)

    @property
    def partitions(self) -> int:
        return self.plans[-1].stop

    # ---- partitions

    def planned_by(self, index: int) -> Plan:
        """The generation that introduced partition ``index``."""
        return self.plans[bisect.bisect_right(self._firsts, index) - 1]

    def counts_by(self, index: int) -> Plan:
        """The newest generation that makes partition ``index``, again or for the first time: its record counts."""
        redone = [plan for plan in self.plans if index in plan.redo]
        return redone[-1] if redone else self.planned_by(index)

    def slot(self, index: int) -> str:
        """Name of the partition's folder in its bucket; a name is never reused for different content."""
        plan = self.counts_by(index)
        return f"{index:05d}" if plan is self.planned_by(index) else f"{index:05d}.{plan.generation}"

    def bucket(self, index: int) -> str:
        return f"{index // BUCKET:03d}"

    def partition_path(self, index: int) -> str:
        """Name of the partition in ledgers: the path of its folder before any repair or takedown."""
        return f"data/{self.bucket(index)}/{index:05d}"

    def path_of(self, index: int) -> str:
        return f"data/{self.bucket(index)}/{self.slot(index)}"

    def partition(self, index: int) -> Partition:
        generation = self.planned_by(index).generation
        return self._readers[generation][index]

    def record(self, index: int) -> dict[str, Any] | None:
        """The record of the committed partition; None if it is not committed.

        Raises:
            StorageError: the slot holds a partition of another plan.
        """
        path = self.path_of(index)
        data = self.small_file(index, RECORD)
        if data is None:
            return None
        record = unsealed(data, self.root.path / path / RECORD)
        if record.get("plan") != self.counts_by(index).digest or record.get("partition") != index:
            raise StorageError(
                f"{self.root.path / path} was made for another plan: run stage=repair on {self.root.path}"
            )
        return record

    def small_file(self, index: int, name: str) -> bytes | None:
        """The record or ledger of a partition, from its folder or from a pack; None if neither has it.

        Raises:
            StorageError: it may have been in a pack that is damaged.
        """
        return self.packs.read(index // BUCKET, self.slot(index), name)

    # ---- finished datasets

    @cached_property
    def success(self) -> dict[str, Any] | None:
        """The content of ``_SUCCESS`` if it covers all planned generations; otherwise None."""
        try:
            marker = self.root.read_sealed(SUCCESS)
        except StorageError:
            return None  # finishing the dataset again rewrites it
        if marker is None or marker.get("plans") != [plan.digest for plan in self.plans]:
            return None
        return marker

    def require_success(self) -> dict[str, Any]:
        """The content of ``_SUCCESS``; raises Unfinished, saying what to run, if the dataset is not complete."""
        if self.success is None:
            raise Unfinished(
                f"{self.root.path} is not finished (no valid _SUCCESS): run stage={self.stage} again to its end first"
            )
        return self.success

    def require_data(self) -> None:
        """Raises ConfigError if data of the dataset were removed on purpose."""
        if self.released:
            raise ConfigError(str(Released(self.root.path, self.stage)))

    def require_columns(self, *names: str) -> None:
        missing = [name for name in names if name not in self.schema]
        if missing:
            raise ConfigError(f"{self.root.path} has no column {', '.join(missing)}; it has {', '.join(self.schema)}")

    @cached_property
    def kept(self) -> npt.NDArray[Any]:
        """Kept samples per partition, int64 (partitions,).

        Raises:
            StorageError: the manifest is not the one that ``_SUCCESS`` refers to.
        """
        return self._manifest_column("kept")

    @cached_property
    def places(self) -> npt.NDArray[Any]:
        """Position of each partition's first sample among all samples ever kept, then their total number.

        int64 (partitions + 1,). Unlike :attr:`starts`, it does not change when samples are taken down: plans use it.
        """
        taken = self._manifest_column("taken") if self.require_success()["counts"].get("taken") else 0
        found: npt.NDArray[Any] = np.concatenate([[0], np.cumsum(self.kept + taken)]).astype(np.int64)
        return found

    def blocks(self) -> npt.NDArray[Any]:
        """Number of blocks of files before each partition, then their total number: int64 (partitions + 1,)."""
        files = self._manifest("files")
        counts = blocks_of(files.values.field("bytes").to_numpy())
        found: npt.NDArray[Any] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)[files.offsets.to_numpy()]
        return found

    def _manifest_column(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(self._manifest(name).to_numpy())

    def _manifest(self, name: str) -> Any:
        """A column of the manifest, as an Arrow array."""
        expected = self.require_success()["digests"][MANIFEST]
        with os.fdopen(self.root.open_file(MANIFEST), "rb") as file:  # opened once: it may be replaced
            if digest(file.read()) != expected:
                raise StorageError(
                    f"{self.root.path / MANIFEST} is damaged, or was extended while we ran: run the same command again "
                    f"and, if that does not help, stage=repair on {self.root.path}"
                )
            file.seek(0)
            column = pq.ParquetFile(file).read([name], use_threads=False)[name].combine_chunks()
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

    @cached_property
    def starts(self) -> npt.NDArray[Any]:
        """Position of each partition's first kept sample, then the total number: int64 (partitions + 1,)."""
        found: npt.NDArray[Any] = np.concatenate([[0], np.cumsum(self.kept)]).astype(np.int64)
        return found

    def __len__(self) -> int:
        """Total number of kept samples."""
        return int(self.starts[-1])

    def samples(self, index: int) -> Iterator[Stored]:
        """All samples ever kept in partition ``index``, in order: the input of the next stage.

        Reading one that was taken down raises SampleError.
        """
        yield from SlotReader(self, index).stored(taken=True)


def before_redone(dataset: Dataset, index: int) -> Dataset:
    """``dataset`` as it was before the generation that makes partition ``index`` again."""
    before = Dataset(dataset.root, dataset.counts_by(index).generation)
    before.packs = dataset.packs  # already open
    return before


def _opened(path: str, verify: Verify, open_files: int, taken: bool) -> RandomAccess:
    return RandomAccess(Dataset.open(Path(path)), verify, open_files, taken)


class RandomAccess:
    """Access to the kept samples of a finished dataset by position. Safe to use after a fork.

    Args:
        verify: when blocks of data files are checked against their hashes, see :class:`BlockFile`.
        open_files: number of data files that stay open; the least recently used ones are closed.
        taken: positions are those of :attr:`Dataset.places`, among all samples ever kept (only for :meth:`stored`).
    """

    most_samples = 1 << 25
    """Samples whose locations are kept in memory, at 22 bytes each. Beyond that, the oldest partitions are evicted."""

    def __init__(self, dataset: Dataset, verify: Verify = "first", open_files: int = 256, taken: bool = False) -> None:
        self.dataset = dataset
        self._verify = verify
        self._most_files = open_files
        self._taken = taken
        self._starts: list[int] = (dataset.places if taken else dataset.starts).tolist()
        self._index: OrderedDict[int, Index] = OrderedDict()
        self._indexed = 0
        self._slots: OrderedDict[int, SlotReader] = OrderedDict()
        self._readers: OrderedDict[tuple[int, int], FileReader] = OrderedDict()
        self._keys: OrderedDict[int, list[str]] = OrderedDict()
        self._blocks: list[int] = []
        self._seen: memoryview | None = None
        if verify == "first":  # shared with processes forked later, so that each block is checked only once
            self._blocks = dataset.blocks().tolist()
            self._seen = memoryview(mmap.mmap(-1, max(1, self._blocks[-1])))
        self._stored: OrderedDict[int, list[Stored]] = OrderedDict()
        self._required: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> Any:
        """Pickle for worker processes, which open the dataset themselves."""
        return _opened, (str(self.dataset.root.path), self._verify, self._most_files, self._taken)

    def _place(self, position: int) -> tuple[int, int, Index]:
        """Partition of the sample at ``position``, its position there, and the partition's :class:`Index`."""
        if not 0 <= position < self._starts[-1]:
            raise IndexError(f"there is no sample {position}: {self.dataset.root.path} has {self._starts[-1]}")
        number = bisect.bisect_right(self._starts, position) - 1
        index = self._index.get(number)
        if index is None:
            index = self._index[number] = self._slot(number).index()
            self._indexed += len(index.files)
            while self._indexed > self.most_samples and len(self._index) > 1:
                self._indexed -= len(self._index.popitem(last=False)[1].files)
        return number, position - self._starts[number], index

    def _slot(self, number: int) -> SlotReader:
        return _recent(self._slots, number, 64, lambda: self._opened(number))

    def _opened(self, number: int) -> SlotReader:
        seen = None if self._seen is None else self._seen[self._blocks[number] : self._blocks[number + 1]]
        return SlotReader(self.dataset, number, self._verify, seen)

    def _reader(self, number: int, index: Index, file: int) -> FileReader:
        key = (number, file)
        reader = self._readers.get(key)
        if reader is not None:
            return reader
        # a separate slot for each file: its files are closed when the least recently used file is evicted
        slot = self._opened(number)
        return _recent(self._readers, key, self._most_files, lambda: slot.open(index.names[file]))

    def key(self, position: int) -> str:
        """The key of the sample at ``position``."""
        number, local, _ = self._place(position)
        return _recent(self._keys, number, 64, lambda: self._slot(number).keys())[local]

    def require(self, positions: Iterable[int]) -> None:
        """Start to download the files that contain these samples, if the dataset is in an object store."""
        root = self.dataset.root
        if isinstance(root, stores.StoreFolder):
            for number in sorted({bisect.bisect_right(self._starts, position) - 1 for position in positions}):
                _recent(self._required, number, 64, lambda n=number: root.fetch(lambda: self._files_of(n)))  # type: ignore[misc]

    def _files_of(self, number: int) -> list[str]:
        files = SlotReader(self.dataset, number).record["files"]
        return [f"{self.dataset.path_of(number)}/{file['name']}" for file in files if file["samples"]]

    def stored(self, position: int) -> Stored:
        """The sample at ``position`` of ``range(len(self))``."""
        number = bisect.bisect_right(self._starts, position) - 1
        samples = _recent(self._stored, number, 64, lambda: self._slot(number).stored(self._taken))
        return samples[position - self._starts[number]]

    def row(self, position: int, columns: Collection[str] | None = None) -> Row:
        """The row of the sample at ``position``, with only these columns (None: all).

        Raises:
            IndexError: there is no such sample.
            SampleError: a file that it refers to, outside the dataset directory, is gone or has changed.
            StorageError: the dataset directory is damaged; the message names the file and the sample.
        """
        return self._take(position, lambda reader, number, start, size: reader.row(number, start, size, columns))

    def view(self, position: int, target: str = "") -> tuple[npt.NDArray[Any] | bytes, Any]:
        """The image's bytes, without a copy if the format allows it, and the value of the column ``target``."""

        def take(reader: FileReader, number: int, start: int, size: int) -> tuple[npt.NDArray[Any] | bytes, Any]:
            row = reader.row(number, start, size, (target,)) if target else {}
            return reader.view(number, start, size), row.get(target)

        return self._take(position, take)

    def array(self, position: int) -> npt.NDArray[Any]:
        """Pixels of a sample in a fixed-size format, (h, w) or (h, w, c); raises what :meth:`row` raises."""
        return self._take(position, lambda reader, *place: reader.array(*place))

    def mask(self, position: int) -> npt.NDArray[Any]:
        """Dense label of a sample in a fixed-size format, (h, w, c); raises what :meth:`row` raises."""
        return self._take(position, lambda reader, number, *_: reader.mask(number))

    def _take(self, position: int, take: Callable[[FileReader, int, int, int], Value]) -> Value:
        """Call ``take`` with the reader of the sample's file and the sample's row number, offset and length in it."""
        number, local, index = self._place(position)
        try:
            reader = self._reader(number, index, index.files.item(local))
            return take(reader, index.numbers.item(local), index.offsets.item(local), index.lengths.item(local))
        except DAMAGE as error:
            raise self._damaged(position, error) from error

    def _damaged(self, position: int, error: Exception) -> StorageError:
        number, local, index = self._place(position)
        source = f"{self.dataset.path_of(number)}/{index.names[index.files[local]]}"
        return damaged(self.dataset.root.path, source, self.key(position), error)

    def rows(self, positions: Iterable[int], columns: Collection[str] | None = None) -> list[Row]:
        """The rows of the samples at ``positions``."""
        return [self.row(int(position), columns) for position in positions]


def _recent(cache: OrderedDict[Any, Value], key: Any, most: int, make: Callable[[], Value]) -> Value:
    """The value of ``key``, made if it is missing; ``cache`` keeps the ``most`` most recently used values."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def find_datasets(folder: Path) -> list[Dataset]:
    """Dataset directories below ``folder``, in the order of the stages; their subfolders are not searched."""
    found = []
    for place, folders, _ in os.walk(folder):
        if (Path(place) / "plan" / "plan.json").is_file():
            found.append(Dataset.open(place))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "logs")
    order = {stage: number for number, stage in enumerate(STAGES)}
    return sorted(found, key=lambda d: (str(d.root.path.parent), order.get(d.stage, 99), str(d.root.path)))
