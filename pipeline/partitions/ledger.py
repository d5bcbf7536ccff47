"""The ledger: one row per input sample of a partition, and one per container (archive) that was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipeline.samples import TAKEN, Outcome
from pipeline.storage import Folder, HashedFile

FILE = "ledger.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("container", pa.bool_()),
        ("outcome", pa.dictionary(pa.int8(), pa.string())),
        ("reason", pa.dictionary(pa.int32(), pa.string())),
        ("detail", pa.string()),
        ("retryable", pa.bool_()),
        ("source", pa.string()),  # file of the input, relative to the stage's input
        ("member", pa.string()),
        ("source_offset", pa.int64()),
        ("source_bytes", pa.int64()),
        ("source_hash", pa.string()),  # XXH3-128 of the input's bytes
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("count", pa.int64()),  # containers: samples found inside
        ("complete", pa.bool_()),  # containers: the end marker was seen
        ("file", pa.dictionary(pa.int32(), pa.string())),  # file of a kept sample in the partition's folder
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)

LOOKS = (pa.field("source_pixels", pa.int64()), pa.field("phash", pa.string()))
"""Additional columns of stages that decode images: width times height of the original, and its perceptual hash."""


class LedgerError(RuntimeError):
    """The outcomes of a partition do not add up: a bug in the stage, never bad data."""


_PLACE = {"file": pa.string(), "offset": pa.int64(), "length": pa.int64()}
_ATTRIBUTES = {"outcome": "status", "source_offset": "offset"}
"""Columns that have another name in :class:`Outcome`."""
_PACKED = pa.schema(
    pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type)
    for f in (*SCHEMA, *LOOKS)
    if f.name not in _PLACE
)
_GETTERS = [attrgetter(_ATTRIBUTES.get(f.name, f.name)) for f in _PACKED]
_NOWHERE = (None, -1, -1)
_CHUNK = 8192


class Ledger:
    """Collects the outcomes of one partition, checks that they balance, and writes them.

    Outcomes are converted to Arrow as they arrive, since an archive may contain millions.

    Args:
        expected: planned number of samples; -1 if unknown.
        with_rows: whether kept outcomes include their rows.
    """

    def __init__(self, partition: int, expected: int, *, with_rows: bool = True) -> None:
        self._partition = partition
        self._expected = expected
        self._with_rows = with_rows
        self._length = 0
        self._newest: list[Outcome] = []
        self._packed: list[pa.RecordBatch] = []
        self._containers: list[Outcome] = []
        self._looked = False
        self._keys: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._length

    def add(self, outcome: Outcome) -> None:
        name = xxhash.xxh3_128_intdigest(outcome.key, seed=int(outcome.container))
        if name in self._keys:
            raise LedgerError(f"partition {self._partition}: key {outcome.key!r} comes twice")
        self._keys.add(name)
        has_row = outcome.status == "kept" and not outcome.container and self._with_rows
        if (outcome.row is not None) != has_row:
            has = "a row" if outcome.row is not None else "no row"
            raise LedgerError(f"partition {self._partition}: {outcome.key!r} is {outcome.status} and has {has}")
        if outcome.row is not None and outcome.row.get("key") != outcome.key:
            raise LedgerError(f"partition {self._partition}: {outcome.key!r} has the row of {outcome.row.get('key')!r}")
        outcome.row = None  # the writer has the bytes; keep only what the ledger stores
        self._keep(outcome)
        kind = "containers_" if outcome.container else ""
        self.counts[kind + outcome.status] += 1
        self.counts["containers" if outcome.container else "in"] += 1
        if outcome.retryable and outcome.status == "failed":
            self.counts["retryable"] += 1
        if outcome.status == "dropped" and outcome.reason == TAKEN:
            self.counts["taken"] += 1
        if outcome.status != "kept":
            self.reasons[f"{outcome.status}:{outcome.reason}"] += 1

    def _keep(self, outcome: Outcome) -> None:
        self._length += 1
        self._looked = self._looked or bool(outcome.source_pixels)
        if outcome.container:
            self._containers.append(outcome)
        self._newest.append(outcome)
        if len(self._newest) == _CHUNK:
            self._pack()

    def _pack(self) -> None:
        columns = [pa.array(list(map(get, self._newest)), f.type) for f, get in zip(_PACKED, _GETTERS, strict=True)]
        self._packed.append(pa.record_batch(columns, schema=_PACKED))
        self._newest = []

    def check(self, written: int) -> None:
        """Raises LedgerError unless in = kept + dropped + failed = what was planned or found in the containers."""
        samples = self.counts["in"]
        if written != self.counts["kept"]:
            raise LedgerError(f"partition {self._partition}: {written} samples written, {self.counts['kept']} kept")
        if 0 <= self._expected != samples:
            raise LedgerError(f"partition {self._partition}: {samples} outcomes for {self._expected} inputs")
        found = sum(row.count for row in self._containers)
        if self._expected < 0 and found != samples:
            raise LedgerError(f"partition {self._partition}: {samples} outcomes for {found} samples in its containers")
        for row in self._containers:
            if row.status == "kept" and not row.complete:
                raise LedgerError(f"partition {self._partition}: {row.key!r} counts as read, but its end was not seen")
            if row.status == "failed" and row.retryable and samples:
                # it is read again as a whole: samples from this attempt would then exist twice
                raise LedgerError(f"partition {self._partition}: {row.key!r} is to be tried again, but gave samples")

    def write(self, file: HashedFile | IO[bytes], locations: Sequence[tuple[str, int, int]]) -> None:
        """Write all rows; ``locations`` contains (file, offset, length) of each kept sample, in order."""
        self._pack()
        table = pa.Table.from_batches(self._packed, _PACKED).combine_chunks()
        kept = pc.and_(pc.equal(table["outcome"], "kept"), pc.invert(table["container"])).to_pylist()
        following = iter(locations)
        places = [next(following) if there else _NOWHERE for there in kept]
        columns = {name: table[name] for name in table.column_names}
        columns |= {name: pa.array([p[n] for p in places], kind) for n, (name, kind) in enumerate(_PLACE.items())}
        schema = pa.schema([*SCHEMA, *LOOKS]) if self._looked else SCHEMA
        arrays = {
            f.name: pc.dictionary_encode(columns[f.name]).cast(f.type)
            if pa.types.is_dictionary(f.type)
            else columns[f.name]
            for f in schema
        }
        pq.write_table(pa.table(arrays, schema=schema), file, compression="zstd")


def read_ledger(folder: Folder, columns: list[str] | None = None) -> pa.Table:
    """The ledger of the partition in ``folder``; dictionary columns are decoded to strings."""
    return parse_ledger(folder.read(FILE), columns)


def parse_ledger(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The ledger from the bytes of its file; dictionary columns are decoded to strings."""
    table = pq.ParquetFile(pa.BufferReader(data)).read(
        columns, use_threads=False
    )  # no threads: the process may fork or exit

    plain = pa.schema(
        [pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in table.schema]
    )
    return table.cast(plain)
