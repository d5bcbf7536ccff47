"""Checks a dataset directory against its records and lists what is wrong in each partition."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import xxhash

from pipeline.partitions.dataset import RECORD, SUCCESS, Dataset, Released, SlotReader
from pipeline.partitions.finalize import Tally, Unbalanced, check_balance, records
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.plan import PARTITIONS
from pipeline.samples import SampleError
from pipeline.storage import BLOCK, GONE, Folder, StorageError, digest


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong in a dataset directory.

    Attributes:
        partition: -1 if it concerns the dataset as a whole.
        inside: the bytes are those that were written, but their content is wrong.
    """

    partition: int
    what: str
    file: str = ""
    key: str = ""
    inside: bool = False

    def __str__(self) -> str:
        place = f"partition {self.partition}" if self.partition >= 0 else "dataset"
        return ": ".join(part for part in (place, self.file, self.key and f"sample {self.key}", self.what) if part)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def verify(dataset: Dataset, partitions: Iterator[list[Finding]] | None = None) -> Iterator[Finding]:
    """Check records, folder contents, sizes, hashes and counts of every partition, then the totals.

    Of an unfinished dataset, the committed partitions are checked; that it is unfinished is one of the findings.

    Args:
        partitions: the findings of each partition in order, if they are computed elsewhere.
    """
    success = dataset.success
    if success is None:
        yield Finding(-1, "not finished: no _SUCCESS for the current plan")
    for plan in dataset.plans:
        yield from _verify_digest(dataset.root, f"{plan.folder}/{PARTITIONS}", plan.header["partitions_digest"])
    sound = True
    if partitions is None:
        partitions = (list(verify_partition(dataset, index)) for index in range(dataset.partitions))
    for findings in partitions:
        sound = sound and not findings
        yield from findings
    if success is not None:
        for name, expected in success["digests"].items():
            yield from _verify_digest(dataset.root, name, expected)
        if sound:
            yield from _verify_totals(dataset, success)


def _verify_digest(root: Folder, name: str, expected: str) -> Iterator[Finding]:
    try:
        if root.digest_of(name) != expected:
            yield Finding(-1, "its bytes have changed", name)
    except OSError as error:
        yield Finding(-1, f"cannot be read: {error.strerror}", name)


def verify_partition(dataset: Dataset, index: int) -> Iterator[Finding]:
    """Check one partition."""
    path = dataset.path_of(index)
    try:
        record = dataset.record(index)
        if record is None:
            yield Finding(index, "is not committed" if not dataset.root.exists(path) else f"has no {RECORD}")
            return
        with dataset.root.folder(path) as folder:
            expected = {f["name"]: f for f in record["files"]}
            for name in record["released"] if index in dataset.released else ():
                del expected[name]
            for name in sorted({*folder.listdir()} - {*expected, RECORD}):
                yield Finding(index, "does not belong here", name)
            healthy = True
            for name, file in expected.items():
                check = _verify_ledger_bytes if name == LEDGER else partial(_verify_file, folder=folder, name=name)
                for finding in check(dataset, index, file):
                    healthy = False
                    yield finding
            if healthy:
                yield from _verify_ledger(dataset, index, record["counts"])
    except (OSError, StorageError, KeyError, ValueError, pa.ArrowException) as error:
        yield Finding(index, f"cannot be read: {type(error).__name__}: {error}")


def _verify_ledger_bytes(dataset: Dataset, index: int, file: dict[str, object]) -> Iterator[Finding]:
    """Check that the ledger, in its folder or in a pack, matches the record."""
    try:
        data = dataset.small_file(index, LEDGER)
    except OSError as error:
        yield Finding(index, f"cannot be read: {error.strerror}", LEDGER)
        return
    if data is None:
        yield Finding(index, "is missing", LEDGER)
    elif len(data) != file["bytes"]:
        yield Finding(index, f"has {len(data)} bytes instead of {file['bytes']}", LEDGER)
    elif digest(data) != file["xxh3"]:
        blocks: list[str] = list(file["blocks"])  # type: ignore[call-overload]
        parts = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
        bad = [str(n) for n, part in enumerate(parts) if digest(part) != blocks[n]]
        yield Finding(index, f"its bytes have changed in block {', '.join(bad) or '?'} of {BLOCK >> 20} MiB", LEDGER)


def _verify_file(
    dataset: Dataset, index: int, file: dict[str, object], *, folder: Folder, name: str
) -> Iterator[Finding]:
    try:
        fd = folder.open_file(name)
    except OSError as error:
        yield Finding(index, "is missing" if error.errno in GONE else f"cannot be read: {error.strerror}", name)
        return
    whole = xxhash.xxh3_128()
    bad: list[int] = []
    size = 0
    blocks: list[str] = list(file["blocks"])  # type: ignore[call-overload]
    with os.fdopen(fd, "rb", buffering=0) as data:
        for number in range(max(len(blocks), 1)):
            block = data.read(BLOCK)
            size += len(block)
            whole.update(block)
            if number >= len(blocks) or xxhash.xxh3_128_hexdigest(block) != blocks[number]:
                bad.append(number)
        size += len(data.read(1))
    if size != file["bytes"]:
        yield Finding(index, f"has {size} bytes instead of {file['bytes']}", name)
    elif whole.hexdigest() != file["xxh3"]:
        keys = _keys_in(dataset, index, name, bad)
        at = f"its bytes have changed in block {', '.join(map(str, bad)) or '?'} of {BLOCK >> 20} MiB"
        yield Finding(index, at, name, ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""))


def _keys_in(dataset: Dataset, index: int, name: str, blocks: list[int]) -> list[str]:
    """Keys of the samples that overlap damaged ``blocks`` of a data file."""
    try:
        table = SlotReader(dataset, index).ledger(["key", "file", "offset", "length"]).to_pylist()
    except (OSError, StorageError, pa.ArrowException):
        return []
    spans = [(number * BLOCK, (number + 1) * BLOCK) for number in blocks]
    return [
        row["key"]
        for row in table
        if row["file"] == name
        and any(row["offset"] < stop and row["offset"] + row["length"] > start for start, stop in spans)
    ]


def _verify_ledger(dataset: Dataset, index: int, counts: dict[str, int]) -> Iterator[Finding]:
    """Check that the ledger's rows agree with the record, and that the first kept sample decodes."""
    table = SlotReader(dataset, index).ledger().to_pylist()
    samples = [row for row in table if not row["container"]]
    for outcome in ("kept", "dropped", "failed"):
        found = sum(row["outcome"] == outcome for row in samples)
        if found != counts.get(outcome, 0):
            yield Finding(index, f"{found} rows {outcome}, the record says {counts.get(outcome, 0)}", LEDGER)
    if len({row["key"] for row in samples}) != len(samples):
        yield Finding(index, "a key occurs twice", LEDGER)
    first = next((row for row in samples if row["outcome"] == "kept"), None)
    if first is not None and index not in dataset.released:
        try:
            reader = SlotReader(dataset, index, "never").open(first["file"])
            row = reader.row(0, first["offset"], first["length"])
            if row["key"] != first["key"]:
                yield Finding(
                    index, f"holds {row['key']} where the ledger says {first['key']}", first["file"], first["key"]
                )
        except Released:
            return  # the dataset that the rows refer to was released
        except (ValueError, SampleError) as error:
            yield Finding(index, f"does not decode: {error}", first["file"], first["key"])


def _verify_totals(dataset: Dataset, success: dict[str, Any]) -> Iterator[Finding]:
    tally = Tally(dataset)
    for record in records(dataset):
        tally.add(record)
    tally.close_generations(dataset.partitions)
    try:
        check_balance(dataset, tally.totals(), 1.0)
    except Unbalanced as error:
        yield Finding(-1, str(error))
    if tally.content_digest != success["content_digest"] or tally.totals() != success["counts"]:
        yield Finding(-1, "the partitions differ from those that were counted", SUCCESS)
