"""The plan of a stage: its partitions with their inputs, fixed before the work begins and committed as one folder.

Generation 0 is in ``plan/``; additions to a finished dataset (retries, samples that the upstream gained, repairs) are
in ``plan.1/``, ``plan.2/`` …, each committed in the same way. A folder contains ``plan.parquet``, with one row per new
partition, and ``plan.json``, which describes the run that was planned.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.storage import GONE, Folder, StorageError, commit, digest, seal

FORMAT_VERSION = 1
BUCKET = 1000
PARTITIONS = "plan.parquet"
TAKEDOWN = "takedown"
"""Kind of a generation that rewrites partitions without some of their samples."""
RELEASE = "release"
"""Kind of a generation that keeps only the ledgers and records of partitions."""
_GROUP_INPUTS = 50_000  # inputs per row group of plan.parquet, so that a rank reads little beyond its own range

_INPUT = pa.struct(
    [
        ("path", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("etag", pa.string()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("partition", pa.int64()),
        ("count", pa.int64()),
        ("supersedes", pa.int64()),
        ("inputs", pa.list_(_INPUT)),
        ("only", pa.list_(pa.string())),
    ]
)


class LeftOut(dict[str, dict[str, Any]]):
    """Files that look like data but are not samples of the plan: reason → count and some examples."""

    def add(self, reason: str, *examples: str) -> None:
        """Count ``examples``, and keep the first few."""
        if examples:
            entry = self.setdefault(reason, {"count": 0, "examples": []})
            entry["count"] += len(examples)
            entry["examples"] += [text[:200] for text in examples[: _EXAMPLES - len(entry["examples"])]]

    def told(self) -> list[str]:
        """A line for each reason."""
        return [f"{reason}: {found['count']}, as {', '.join(found['examples'])}" for reason, found in self.items()]


_EXAMPLES = 3


def stamp(path: str | Path) -> str:
    """Size and modification time of a file; empty if it does not exist."""
    try:
        state = os.stat(path)
    except OSError:
        return ""
    return f"{state.st_size} bytes at {state.st_mtime_ns} ns"


def file_state(path: str | Path) -> str:
    """State of a file, to detect changes: hash up to 64 MiB, :func:`stamp` above; empty if it does not exist."""
    try:
        if os.path.getsize(path) > _HASHED:
            return stamp(path)
        with open(path, "rb") as file:
            return f"xxh3:{xxhash.xxh3_128_hexdigest(file.read(_HASHED + 1))}"
    except OSError:
        return ""


_HASHED = 64 << 20  # size in bytes up to which a file is hashed


@dataclass(frozen=True, slots=True)
class Input:
    """One input: a file, a URL, or a range ``start:stop`` of the upstream's positions."""

    path: str = ""
    start: int = 0
    stop: int = 0
    size: int = -1
    mtime_ns: int = -1
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Partition:
    """The unit of work and of commit.

    Attributes:
        inputs: the inputs to read, in order.
        count: number of samples; -1 if it is only known after reading (archives).
        only: the keys to process (a retry of failures); None: all.
        supersedes: number of sample rows of earlier generations that the rows of this partition replace.
        index: its number, assigned by the engine.
    """

    inputs: tuple[Input, ...]
    count: int = -1
    only: frozenset[str] | None = None
    supersedes: int = 0
    index: int = -1

    def wants(self, key: str) -> bool:
        """Whether the sample ``key`` is to be processed."""
        return self.only is None or key in self.only


@dataclass(frozen=True)
class Plan:
    """One committed generation.

    Attributes:
        folder: name of its folder.
        header: content of plan.json.
        digest: digest of plan.json.
        redo: earlier partitions that this generation makes again. Partitions ``first … stop - 1`` are new.
    """

    folder: str
    header: dict[str, Any]
    digest: str
    redo: frozenset[int] = field(default_factory=frozenset)

    @property
    def generation(self) -> int:
        return int(self.header["generation"])

    @property
    def first(self) -> int:
        return int(self.header["first"])

    @property
    def stop(self) -> int:
        return self.first + int(self.header["partitions"])


def folder_name(generation: int) -> str:
    return "plan" if generation == 0 else f"plan.{generation}"


def generations(names: Iterable[str]) -> int:
    """Number of generations in a root folder that contains these names; they are numbered without gaps."""
    found = {0 if name == "plan" else int(name[5:]) for name in names if re.fullmatch(r"plan(\.\d+)?", name)}
    return next(n for n in itertools.count() if n not in found)


def read_plans(root: Folder) -> list[Plan]:
    """All committed generations, oldest first; empty if nothing is planned."""
    plans = []
    for generation in range(generations(root.listdir())):
        name = folder_name(generation)
        header = read_header(root, name)
        plans.append(Plan(name, header, digest(seal(header)), frozenset(_numbers(header["redo"]))))
    return plans


def spans(numbers: Iterable[int]) -> list[int | list[int]]:
    """``numbers`` in order, with runs as ``[start, stop]``: how :attr:`Plan.redo` is stored in a header."""
    found: list[int | list[int]] = []
    for _, group in itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        found.append(run[0] if len(run) == 1 else [run[0], run[-1] + 1])
    return found


def _numbers(spans: list[int | list[int]]) -> Iterator[int]:
    for span in spans:
        yield from (span,) if isinstance(span, int) else range(*span)


def read_header(root: Folder, name: str) -> dict[str, Any]:
    """plan.json of the generation in the folder ``name``.

    Raises:
        StorageError: it is missing, damaged, or of another format version.
    """
    try:
        header = root.read_sealed(f"{name}/plan.json")
    except StorageError:
        header = root.read_json(f"{name}/plan.json")  # another format version may be sealed differently
        if header is None or header.get("format_version") == FORMAT_VERSION:
            raise
    if header is None:
        raise StorageError(f"{root.path / name}/plan.json is missing: run stage=repair on {root.path}")
    if header.get("format_version") != FORMAT_VERSION:
        raise StorageError(
            f"{root.path / name}: format_version {header.get('format_version')}, this program reads {FORMAT_VERSION}; "
            "use the version of Latentmill that wrote it, or another output="
        )
    return header


def commit_plan(root: Folder, header: dict[str, Any], partitions: Iterable[Partition]) -> bool:
    """Write and commit a generation; False if another one with this number was first, or ``gc`` removed this one.

    ``header`` needs ``generation``, ``first`` and ``kind``; counts, an id and a digest are added here. The buckets of
    ``data/`` are created before the plan becomes visible, because nothing else may create them.
    """
    name = folder_name(header["generation"])
    made = uuid.uuid4().hex
    attempt = f".{name}.{made}"
    root.mkdir(attempt)
    try:
        with root.folder(attempt) as folder:
            totals = write_partitions(folder, header["first"], partitions)
            complete = {"format_version": FORMAT_VERSION, "id": made, "redo": [], **header, **totals}
            with folder.create("plan.json") as file:
                file.write(seal(complete))
        _make_buckets(root, header["first"] + totals["partitions"])
        won = commit(root, attempt, name, "plan.json")
    except OSError as error:
        if error.errno not in GONE or root.exists(attempt):
            raise
        won = False
    finally:
        with suppress(OSError):
            root.trash(attempt)
    return won


def write_partitions(folder: Folder, first: int, partitions: Iterable[Partition]) -> dict[str, Any]:
    """Write plan.parquet into ``folder``, numbered from ``first``; returns its counts and digests for the header."""
    count = 0
    expected = 0
    known = True
    superseded = 0
    content = xxhash.xxh3_128()
    with folder.create(PARTITIONS) as file, pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        for group in _groups(partitions):
            writer.write_table(_table(group, first + count))
            count += len(group)
            known = known and all(p.count >= 0 for p in group)
            expected += sum(max(p.count, 0) for p in group)
            superseded += sum(p.supersedes for p in group)
            _hash(group, content)
    return {
        "partitions": count,
        "expected": expected if known else -1,
        "supersedes": superseded,
        "partitions_digest": file.digest,
        "inputs_digest": content.hexdigest(),
    }


def inputs_digest(partitions: Iterable[Partition]) -> str:
    """XXH3-128 of the content of partitions: unlike that of plan.parquet, it does not depend on pyarrow's version."""
    content = xxhash.xxh3_128()
    for group in _groups(partitions):
        _hash(group, content)
    return content.hexdigest()


def _hash(group: list[Partition], content: xxhash.xxh3_128) -> None:
    said = [
        (
            p.count,
            p.supersedes,
            None if p.only is None else sorted(p.only),
            [(i.path, i.start, i.stop, i.size, i.mtime_ns, i.etag) for i in p.inputs],
        )
        for p in group
    ]
    content.update(json.dumps(said).encode())


def _groups(partitions: Iterable[Partition]) -> Iterator[list[Partition]]:
    group: list[Partition] = []
    inputs = 0
    for partition in partitions:
        group.append(partition)
        inputs += len(partition.inputs) + len(partition.only or ())
        if len(group) == BUCKET or inputs >= _GROUP_INPUTS:
            yield group
            group, inputs = [], 0
    if group:
        yield group


def _table(group: list[Partition], first: int) -> pa.Table:
    flat = [i for p in group for i in p.inputs]
    offsets = [0, *itertools.accumulate(len(p.inputs) for p in group)]
    arrays = [pa.array([getattr(i, f.name) for i in flat], f.type) for f in _INPUT]
    inputs = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(arrays, fields=list(_INPUT))
    )
    return pa.table(
        [
            pa.array(range(first, first + len(group)), pa.int64()),
            pa.array([p.count for p in group], pa.int64()),
            pa.array([p.supersedes for p in group], pa.int64()),
            inputs,
            pa.array([None if p.only is None else sorted(p.only) for p in group], pa.list_(pa.string())),
        ],
        schema=_SCHEMA,
    )


def _make_buckets(root: Folder, partitions: int) -> None:
    root.mkdir("data", exist_ok=True)
    with root.folder("data") as data:
        present = set(data.listdir())
        for bucket in range(-(-partitions // BUCKET)):
            if f"{bucket:03d}" not in present:
                data.mkdir(f"{bucket:03d}", exist_ok=True)
        data.sync()


class PartitionReader:
    """Reads partitions from plan.parquet by row group; the last group is kept, since ranks read in order."""

    def __init__(self, root: Folder, plan: Plan) -> None:
        self._root = root
        self._plan = plan
        self._firsts: list[int] = []
        self._group = -1
        self._table: pa.Table | None = None
        self._file: pq.ParquetFile | None = None
        self._newest: dict[int, Partition] = {}

    def _open(self) -> pq.ParquetFile:
        with self._root.folder(self._plan.folder) as folder:
            file = pq.ParquetFile(os.fdopen(folder.open_file(PARTITIONS), "rb"))
        for group in range(file.metadata.num_row_groups):
            self._firsts.append(file.metadata.row_group(group).column(0).statistics.min)
        return file

    def __getitem__(self, index: int) -> Partition:
        if index not in self._newest:
            self._newest = {**dict(list(self._newest.items())[-1:]), index: self._read(index)}
        return self._newest[index]

    def _read(self, index: int) -> Partition:
        try:
            row = self._row(index)
        except (OSError, IndexError, ValueError, TypeError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno not in (*GONE, None):  # pyarrow's own errors have no errno
                raise
            raise StorageError(
                f"{self._root.path}: {self._plan.folder}/{PARTITIONS} is missing or damaged ({type(error).__name__} at "
                f"partition {index}): run stage=repair on {self._root.path}"
            ) from error
        only = None if row["only"] is None else frozenset(row["only"])
        inputs = tuple(Input(**values) for values in row["inputs"])
        return Partition(inputs, row["count"], only, row["supersedes"], index)

    def _row(self, index: int) -> dict[str, Any]:
        if self._file is None:
            self._file = self._open()
        group = bisect.bisect_right(self._firsts, index) - 1
        if group != self._group:
            self._table = self._file.read_row_group(group, use_threads=False)
            self._group = group
        assert self._table is not None
        row: dict[str, Any] = self._table.slice(index - self._firsts[group], 1).to_pylist()[0]
        if row["partition"] != index:
            raise ValueError(f"row {row['partition']}")
        return row
