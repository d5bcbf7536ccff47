"""A dataset directory as its readers see it: plans, slots, records, samples, and whether it is finished."""

from __future__ import annotations

import bisect
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import STAGES, ConfigError
from pipeline.formats.base import Format, get_format
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.ledger import read_ledger
from pipeline.partitions.plan import BUCKET, Partition, PartitionReader, Plan, read_plans
from pipeline.samples import TAKEN, Row, SampleError, Schema
from pipeline.storage import GONE, Folder, StorageError, digest

SUCCESS = "_SUCCESS"
RECORD = "record.json"
MANIFEST = "manifest.parquet"


class Unfinished(ConfigError):
    """A stage was asked to read a dataset directory that is missing or not complete."""


def open_root(path: str | Path) -> Folder:
    """The folder of a dataset directory.

    Raises:
        Unfinished: there is none.
    """
    try:
        return Folder.open(path)
    except FileNotFoundError:
        raise Unfinished(f"{path} does not exist") from None
    except NotADirectoryError:
        raise Unfinished(f"{path} is not a folder") from None


@dataclass(frozen=True, slots=True)
class Stored:
    """A kept sample of a dataset directory: how to find it, and how to get its bytes.

    Attributes:
        source: the partition, as path ``data/BBB/PPPPP`` below the dataset's root.
        offset: its place among the samples that were ever kept there. Unlike a position in bytes, this outlasts a
            repair or takedown of the partition.
        file, start, length: where its bytes lie in the partition's folder.
    """

    key: str
    source: str
    offset: int
    file: str
    start: int
    length: int
    reader: SlotReader

    def read(self) -> Row:
        """The sample as its format holds it.

        Raises:
            SampleError: what it refers to, outside of the dataset directory, is gone or has changed.
            StorageError: the dataset directory is damaged.
        """
        if not self.file:
            raise SampleError(TAKEN, "removed by stage=takedown")
        try:
            return self.reader.row(self.file, self.start, self.length)
        except (ValueError, KeyError, OSError) as error:
            raise StorageError(
                f"{self.reader.root}: sample {self.key} in {self.reader.path}/{self.file} is damaged "
                f"({type(error).__name__}: {error}): run stage=repair on {self.reader.root}"
            ) from error


class SlotReader:
    """Reads rows out of one committed partition; data files stay open between reads."""

    def __init__(self, dataset: Dataset, index: int) -> None:
        self.path = dataset.path_of(index)
        self.root = dataset.root.path
        self._dataset = dataset
        self._index = index
        try:
            self._folder = dataset.root.folder(self.path)
        except OSError as error:
            if error.errno in GONE:
                raise StorageError(f"{dataset.root.path / self.path} is missing: run stage=repair on it") from None
            raise
        self._files: dict[str, int] = {}

    def row(self, file: str, offset: int, length: int) -> Row:
        """The row whose bytes lie there."""
        return self._dataset.format.decode(self._raw(file, offset, length), self._dataset.schema, self._dataset.origin)

    def copied(self, file: str, offset: int, length: int) -> Row:
        """The row as the format's writer takes it, to write the same bytes again."""
        return self._dataset.format.copied(self._raw(file, offset, length), self._dataset.schema, self._dataset.origin)

    def _raw(self, file: str, offset: int, length: int) -> bytes:
        if file not in self._files:
            self._files[file] = self._folder.open_file(file)
        raw = os.pread(self._files[file], length, offset)
        if len(raw) != length:
            raise ValueError(f"{self.path}/{file} ends before byte {offset + length}")
        return raw

    def stored(self, taken: bool = False) -> list[Stored]:
        """The kept samples of the partition, in order; with ``taken`` also those that were, and have been taken down.

        Raises:
            StorageError: record or ledger are damaged.
        """
        columns = ["key", "container", "outcome", "reason", "file", "offset", "length"]
        table = self.ledger(columns).to_pydict()
        source = self._dataset.partition_path(self._index)
        places = count()
        stored = [
            Stored(key, source, next(places), file or "", start, length, self)
            for key, container, outcome, reason, file, start, length in zip(*(table[c] for c in columns), strict=True)
            if not container and (outcome == "kept" or (outcome == "dropped" and reason == TAKEN))
        ]
        return stored if taken else [sample for sample in stored if sample.file]

    def ledger(self, columns: list[str] | None = None) -> pa.Table:
        """The ledger, checked first: a changed byte in it could change a key or hide a sample without a sign.

        Raises:
            StorageError: record or ledger are damaged.
        """
        record = self._folder.read_sealed(RECORD)
        files = {file["name"]: file for file in (record or {"files": []})["files"]}
        try:
            if record is None or self._folder.digest_of(LEDGER) != files[LEDGER]["xxh3"]:
                raise StorageError(f"{self.root / self.path} is damaged: run stage=repair on {self.root}")
        except OSError as error:
            raise StorageError(
                f"{self.root / self.path / LEDGER} cannot be read ({error.strerror}): run stage=repair on {self.root}"
            ) from error
        return read_ledger(self._folder, columns)

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files = {}
        self._folder.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


class Dataset:
    """An opened dataset directory with at least one plan.

    Raises:
        Unfinished: there is no plan at the place.
    """

    def __init__(self, root: Folder, generations: int | None = None) -> None:
        """``generations``: see only the first so many."""
        self.root = root
        self.plans: list[Plan] = read_plans(root)[:generations]
        if not self.plans:
            raise Unfinished(f"{root.path} is not a dataset directory (no plan/ in it)")
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
        """The folder outside that rows refer to, if this dataset holds references."""
        try:
            return Folder.open(self.header["origin"]) if self.header.get("origin") else None
        except OSError:
            return None

    @cached_property
    def taken(self) -> dict[str, tuple[int, str]]:
        """Keys that were taken down → the partition of the newest row, and the reason that it has."""
        return {key: tuple(row) for plan in self.plans for key, row in plan.header.get("taken", {}).items()}

    @property
    def partitions(self) -> int:
        return self.plans[-1].stop

    # ---- partitions

    def planned_by(self, index: int) -> Plan:
        """The generation that introduced partition ``index``."""
        return self.plans[bisect.bisect_right(self._firsts, index) - 1]

    def counts_by(self, index: int) -> Plan:
        """The newest generation that (re)does partition ``index``: the one whose record counts."""
        redone = [plan for plan in self.plans if index in plan.redo]
        return redone[-1] if redone else self.planned_by(index)

    def slot(self, index: int) -> str:
        """Name of the partition's folder in its bucket; a name is never used again for other content."""
        plan = self.counts_by(index)
        return f"{index:05d}" if plan is self.planned_by(index) else f"{index:05d}.{plan.generation}"

    def bucket(self, index: int) -> str:
        return f"{index // BUCKET:03d}"

    def partition_path(self, index: int) -> str:
        """Name of the partition in ledgers: its folder's path as long as it is not done again."""
        return f"data/{self.bucket(index)}/{index:05d}"

    def path_of(self, index: int) -> str:
        return f"data/{self.bucket(index)}/{self.slot(index)}"

    def partition(self, index: int) -> Partition:
        generation = self.planned_by(index).generation
        return self._readers[generation][index]

    def record(self, index: int) -> dict[str, Any] | None:
        """The record of the committed partition; None if it is not committed.

        Raises:
            StorageError: the slot holds something that is not of this plan.
        """
        path = self.path_of(index)
        record = self.root.read_sealed(f"{path}/{RECORD}")
        if record is None:
            return None
        if record.get("plan") != self.counts_by(index).digest or record.get("partition") != index:
            raise StorageError(
                f"{self.root.path / path} was made for another plan: run stage=repair on {self.root.path}"
            )
        return record

    # ---- finished datasets

    @cached_property
    def success(self) -> dict[str, Any] | None:
        """What ``_SUCCESS`` says, if it speaks of all the generations that are planned; else None."""
        try:
            marker = self.root.read_sealed(SUCCESS)
        except StorageError:
            return None  # finishing again writes it anew
        if marker is None or marker.get("plans") != [plan.digest for plan in self.plans]:
            return None
        return marker

    def require_success(self) -> dict[str, Any]:
        """Raises Unfinished, saying what to run, if the dataset is not complete."""
        if self.success is None:
            raise Unfinished(
                f"{self.root.path} is not finished (no valid _SUCCESS): run stage={self.stage} again to its end first"
            )
        return self.success

    def require_columns(self, *names: str) -> None:
        missing = [name for name in names if name not in self.schema]
        if missing:
            raise ConfigError(f"{self.root.path} has no column {', '.join(missing)}; it has {', '.join(self.schema)}")

    @cached_property
    def kept(self) -> np.ndarray:
        """Kept samples per partition, int64 (partitions,).

        Raises:
            StorageError: the manifest is not the one that ``_SUCCESS`` speaks of.
        """
        return self._manifest_column("kept")

    @cached_property
    def places(self) -> np.ndarray:
        """Position of each partition's first sample among all that were ever kept, and their number at the end.

        int64 (partitions + 1,). Unlike :attr:`starts`, it stays the same when samples are taken down: plans use it.
        """
        taken = self._manifest_column("taken") if self.require_success()["counts"].get("taken") else 0
        return np.concatenate([[0], np.cumsum(self.kept + taken)]).astype(np.int64)

    def _manifest_column(self, name: str) -> np.ndarray:
        expected = self.require_success()["digests"][MANIFEST]
        with os.fdopen(self.root.open_file(MANIFEST), "rb") as file:  # opened once: it may be replaced meanwhile
            if digest(file.read()) != expected:
                raise StorageError(
                    f"{self.root.path / MANIFEST} is damaged, or was extended while we ran: run the same command again "
                    f"and, if that does not help, stage=repair on {self.root.path}"
                )
            file.seek(0)
            return np.asarray(pq.read_table(file, columns=[name])[name].to_numpy())

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of each partition's first kept sample, and the total at the end: int64 (partitions + 1,)."""
        return np.concatenate([[0], np.cumsum(self.kept)]).astype(np.int64)

    def __len__(self) -> int:
        """Kept samples in all."""
        return int(self.starts[-1])

    def samples(self, index: int) -> Iterator[Stored]:
        """What stages read: the samples that were ever kept in partition ``index``, in order.

        To read one that was taken down raises SampleError.
        """
        yield from SlotReader(self, index).stored(taken=True)


class RandomAccess:
    """Kept samples of a finished dataset by position; the partitions that were used last stay open.

    Args:
        open_partitions: how many; each holds the positions of its samples in memory.
        taken: positions are those of :attr:`Dataset.places`, of all samples that were ever kept.
    """

    def __init__(self, dataset: Dataset, open_partitions: int = 64, taken: bool = False) -> None:
        self.dataset = dataset
        self._taken = taken
        self._starts = dataset.places if taken else dataset.starts
        self._most = open_partitions
        self._open: OrderedDict[int, list[Stored]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def stored(self, position: int) -> Stored:
        """The sample at ``position`` of ``range(len(self))``."""
        starts = self._starts
        index = int(np.searchsorted(starts, position, "right")) - 1
        if index not in self._open:
            self._open[index] = SlotReader(self.dataset, index).stored(self._taken)
            if len(self._open) > self._most:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index][position - int(starts[index])]

    def rows(self, positions: Iterable[int]) -> list[Row]:
        """The samples at ``positions``, decoded from their storage format."""
        return [self.stored(int(position)).read() for position in positions]


def find_datasets(folder: Path) -> list[Dataset]:
    """Dataset directories below ``folder``, in the order of the main line; their insides are not searched."""
    found = []
    for place, folders, _ in os.walk(folder):
        if (Path(place) / "plan" / "plan.json").is_file():
            found.append(Dataset.open(place))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "logs")
    order = {stage: number for number, stage in enumerate(STAGES)}
    return sorted(found, key=lambda d: (str(d.root.path.parent), order.get(d.stage, 99), str(d.root.path)))
