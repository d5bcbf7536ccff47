"""Finishes a dataset whose partitions are all committed: checks counts, writes manifest, index and ``_SUCCESS``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.imaging.buckets import buckets_in
from pipeline.partitions import bucket_index, dataset_card
from pipeline.partitions.dataset import MANIFEST, SUCCESS, Dataset, SlotReader
from pipeline.partitions.plan import BUCKET, FORMAT_VERSION
from pipeline.storage import GONE, Folder, StorageError, json_bytes, seal
from pipeline.stores.folder import FINISH

_FILE = pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("samples", pa.int64()), ("xxh3", pa.string())])
_COUNTS = ("in", "kept", "dropped", "failed", "retryable", "containers", "taken")
_SCHEMA = pa.schema(
    [
        ("partition", pa.int64()),
        ("path", pa.string()),
        *((name, pa.int64()) for name in _COUNTS),
        ("supersedes", pa.int64()),
        ("files", pa.list_(_FILE)),
    ]
)
_SOFTWARE = ("latentmill", "numpy", "pyarrow", "pillow", "simplejpeg", "torch", "diffusers", "open-clip-torch")


class Incomplete(RuntimeError):
    """Some partitions are not committed; ``missing`` lists them."""

    def __init__(self, missing: list[int]) -> None:
        super().__init__(f"not committed: partitions {missing[:10]}")
        self.missing = missing


class Overtaken(RuntimeError):
    """Another process is finishing the dataset, or it has gained a generation: open it again."""


class Unbalanced(StorageError):
    """The counts of a stage do not add up, or too many samples failed."""


@cache
def software() -> dict[str, str]:
    """Versions of the software that results may depend on."""
    versions = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def records(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The records of all partitions in order.

    Raises:
        Incomplete: some are missing; raised at the end, after all of them were checked.
    """
    missing: list[int] = []
    for index in range(dataset.partitions):
        record = dataset.record(index)
        if record is None:
            missing.append(index)
        elif not missing:
            yield record
    if missing:
        raise Incomplete(missing)


class Tally:
    """Totals and the content digest, computed in one pass over the records.

    The content digest covers the names, sizes and hashes of data files and ledgers in partition order, and does not
    depend on attempts, hosts or times: equal work gives an equal digest.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.superseded = 0
        self.containers_superseded = 0
        self.bytes = 0
        self.released = 0
        self.generations: list[dict[str, Any]] = []
        self._hash = xxhash.xxh3_128()
        self._stops = [plan.stop for plan in dataset.plans]
        self._dataset = dataset

    def add(self, record: dict[str, Any]) -> None:
        index = record["partition"]
        self.close_generations(index)
        self.counts.update(record["counts"])
        self.reasons.update(record["reasons"])
        self.noted.update(record.get("notes", {}).get("noted", {}))
        self.superseded += record["supersedes"]
        if self._dataset.planned_by(index).header["kind"] == "retry":
            self.containers_superseded += record["counts"].get("containers", 0)
        for file in record["files"]:
            self.bytes += file["bytes"]
            self.released += file["bytes"] * (file["name"] in record.get("released", ()))
            self._hash.update(f"{index} {file['name']} {file['bytes']} {file['xxh3']}\n")

    def close_generations(self, index: int) -> None:
        """Store the digest and the kept count before partition ``index`` for each generation that ends there."""
        while len(self.generations) < len(self._stops) and self._stops[len(self.generations)] <= index:
            self.generations.append(
                {
                    "partitions": self._stops[len(self.generations)],
                    "kept": self.counts["kept"],
                    "content_digest": self._hash.hexdigest(),
                }
            )

    @property
    def content_digest(self) -> str:
        return str(self.generations[-1]["content_digest"])

    def totals(self) -> dict[str, int]:
        """The counts, in which every key counts once, by its newest row."""
        counts = self.counts
        rare = {"taken": counts["taken"], "released": self.released}
        return {
            **{name: count for name, count in rare.items() if count},
            "in": counts["in"] - self.superseded,
            "kept": counts["kept"],
            "dropped": counts["dropped"],
            "failed": counts["failed"] - self.superseded,
            "containers": counts["containers"] - self.containers_superseded,
            "containers_failed": counts["containers_failed"] - self.containers_superseded,
            "bytes": self.bytes,
        }


def finalize(dataset: Dataset, max_failed_fraction: float = 1.0) -> dict[str, Any]:
    """Finish the dataset if all partitions are committed. Idempotent; any process may do it.

    All files are written into a temporary folder and moved into place at the end, ``_SUCCESS`` last. A process that
    was paused while a later generation was finished cannot overwrite that generation's files with older ones.

    Returns:
        The content of ``_SUCCESS``.

    Raises:
        Incomplete: partitions are missing.
        Unbalanced: in ≠ kept + dropped + failed, or more failed than ``max_failed_fraction`` allows.
        Overtaken: another process is finishing the dataset, or it has gained a generation.
    """
    root = dataset.root
    made = uuid.uuid4().hex
    attempt = f"{FINISH}{made}"
    root.mkdir(attempt)
    try:
        with root.folder(attempt) as folder:
            success, digests = _write(dataset, folder, max_failed_fraction, made)
        _fence(root, attempt)
        current = Dataset(root)
        if [plan.digest for plan in current.plans] != success["plans"]:
            raise Overtaken(f"{root.path} has gained a generation")
        if current.success is not None:
            return current.success
        for name, digest in digests.items():
            if name == SUCCESS:
                root.sync()
            root.replace(f"{attempt}/{name}", name, digest)
        root.sync()
    except OSError as error:
        if error.errno in GONE and not root.exists(attempt):
            raise Overtaken(f"{root.path}: another process finishes it") from None
        raise
    finally:
        with suppress(OSError):
            root.trash(attempt)
    return success


def _fence(root: Folder, attempt: str) -> None:
    """Remove the temporary folders of other finishing processes, so that they can no longer replace anything.

    A paused process may know fewer generations. One that starts later finds our ``_SUCCESS``, or removes our folder.
    """
    for name in root.listdir():
        if name.startswith(FINISH) and name != attempt:
            root.trash(name)


def _write(
    dataset: Dataset, folder: Folder, max_failed_fraction: float, attempt: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the files at the root of a finished dataset into ``folder``.

    Returns the content of ``_SUCCESS``, and the digest of each file in the order in which to move them into place.
    """
    tally = Tally(dataset)
    digests: dict[str, str] = {}
    unchecked: dict[str, str] = {}  # files that people may change, which are not verified
    with folder.create(MANIFEST) as file:
        _write_manifest(dataset, tally, file)
    digests[MANIFEST] = file.digest
    tally.close_generations(dataset.partitions)
    totals = tally.totals()
    check_balance(dataset, totals, max_failed_fraction)
    _check_samples(dataset, totals, tally)
    index = dataset.format.index_file
    if index:
        with folder.create(index) as file:
            for part in dataset.format.index(dataset.schema, _index_entries(dataset, folder)):
                file.write(part)
        digests[index] = file.digest
    if buckets := buckets_in(dataset.header["extra"]):
        with folder.create(bucket_index.NAME) as file:
            there = (record for record in records(dataset) if record["partition"] not in dataset.released)
            bucket_index.write(file, buckets, there)
        digests[bucket_index.NAME] = file.digest
    text = dataset_card.card(dataset, totals["kept"], (entry["path"] for entry in _index_entries(dataset, folder)))
    if text and dataset_card.is_ours(dataset.root):
        with folder.create(dataset_card.NAME) as file:
            file.write(text.encode())
        unchecked[dataset_card.NAME] = file.digest
    success = {
        "format_version": FORMAT_VERSION,
        "stage": dataset.stage,
        "plans": [plan.digest for plan in dataset.plans],
        "partitions": dataset.partitions,
        "generations": tally.generations,
        "content_digest": tally.content_digest,
        "counts": totals,
        "reasons": dict(tally.reasons),
        "format": dataset.format.name,
        "schema": dataset.schema,
    }
    manifest = {**success, "config": dataset.header["config"], "software": software(), **dataset.header["extra"]}
    manifest |= {"noted": dict(tally.noted)} if tally.noted else {}
    left_out = dataset.header.get("left_out")
    manifest |= {"left_out": left_out} if left_out else {}
    with folder.create("manifest.json") as file:
        file.write(json_bytes(manifest))
    digests["manifest.json"] = file.digest
    success["headers"] = [plan.header for plan in dataset.plans]  # to restore a damaged plan.json from
    success["digests"] = dict(digests)
    success |= {"attempt": attempt} if dataset.root.links else {}
    with folder.create(SUCCESS) as file:
        file.write(seal(success))
    return success, {**unchecked, **digests, SUCCESS: file.digest}


def _write_manifest(dataset: Dataset, tally: Tally, file: Any) -> None:
    with pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for record in records(dataset):
            tally.add(record)
            counts = {name: record["counts"].get(name, 0) for name in _COUNTS}
            files = [{name: f[name] for name in ("name", "bytes", "samples", "xxh3")} for f in record["files"]]
            path = dataset.root.place(dataset.path_of(record["partition"]))
            rows.append(
                {
                    "partition": record["partition"],
                    "path": path,
                    **counts,
                    "supersedes": record["supersedes"],
                    "files": files,
                }
            )
            if len(rows) == BUCKET:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))


def manifest_rows(folder: Folder) -> Iterator[dict[str, Any]]:
    """The rows of the manifest in ``folder``, in partition order, with one bucket in memory at a time."""
    with os.fdopen(folder.open_file(MANIFEST), "rb") as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.metadata.num_row_groups):
            yield from parquet.read_row_group(group, use_threads=False).to_pylist()


def _index_entries(dataset: Dataset, folder: Folder) -> Iterable[dict[str, Any]]:
    shard_bytes = dataset.header["config"].get("shard_bytes", 0)
    for row in manifest_rows(folder):
        if row["partition"] in dataset.released:
            continue
        for file in row["files"]:
            if file["samples"]:
                yield {**file, "path": f"{row['path']}/{file['name']}", "shard_bytes": shard_bytes}


def check_balance(dataset: Dataset, totals: dict[str, int], max_failed_fraction: float) -> None:
    """Raises Unbalanced unless every input sample is accounted for once and at most ``max_failed_fraction`` failed."""
    place = dataset.root.path
    if totals["in"] != totals["kept"] + totals["dropped"] + totals["failed"]:
        raise Unbalanced(f"{place}: {totals['in']} samples came in, but kept + dropped + failed differ: {totals}")
    expected = [plan.header["expected"] for plan in dataset.plans]
    planned = sum(expected) - sum(plan.header["supersedes"] for plan in dataset.plans)
    if min(expected) >= 0 and totals["in"] != planned:
        raise Unbalanced(f"{place}: {totals['in']} samples came in, but {planned} were planned")
    upstream = dataset.plans[-1].header.get("upstream")
    if upstream and totals["in"] != upstream["kept"]:
        raise Unbalanced(f"{place}: {totals['in']} samples came in, but the upstream kept {upstream['kept']}")
    for failed, all_, what in (
        (totals["failed"], totals["in"], "samples"),
        (totals["containers_failed"], totals["containers"], "archives"),
    ):
        if all_ and failed / all_ > max_failed_fraction:
            raise Unbalanced(
                f"{place}: {failed} of {all_} {what} failed, more than "
                f"max_failed_fraction={max_failed_fraction:g} allows: {common_failures(dataset)}. If that can pass, "
                "retry_failed=true tries again; max_failed_fraction= allows more"
            )


def _check_samples(dataset: Dataset, totals: dict[str, int], tally: Tally) -> None:
    """Raises Unbalanced if archives were read but none contains a sample: they are probably the wrong ones."""
    whole = totals["containers"] - totals["containers_failed"]
    if whole and not totals["in"]:
        noted = ", ".join(f"{reason}: {count}" for reason, count in sorted(tally.noted.items()))
        raise Unbalanced(
            f"{dataset.root.path}: none of the {whole} archives or tables has a sample ({noted or 'they are empty'})"
        )


_SHOWN = 3  # reasons in a message


def common_failures(dataset: Dataset) -> str:
    """The most common reasons for failures in committed partitions, with the count and an example of each."""
    counts: Counter[str] = Counter()
    where: dict[str, int] = {}
    for index in range(dataset.partitions):
        for reason, count in (dataset.record(index) or {"reasons": {}})["reasons"].items():
            if reason.startswith("failed:"):
                counts[reason.partition(":")[2]] += count
                where.setdefault(reason.partition(":")[2], index)
    shown = [_failure(dataset, where[reason], reason, count) for reason, count in counts.most_common(_SHOWN)]
    more = counts.total() - sum(count for _, count in counts.most_common(_SHOWN))
    return "; ".join(shown) + (f"; {more} for {len(counts) - _SHOWN} other reasons" if more else "")


def _failure(dataset: Dataset, index: int, reason: str, count: int) -> str:
    """One reason: ``dns: images.example, 12 times (for example shard-0.tar)``."""
    try:
        rows = SlotReader(dataset, index).ledger(["outcome", "reason", "detail", "source", "member", "key"]).to_pylist()
    except (OSError, StorageError):
        rows = []
    for row in rows:
        if row["outcome"] == "failed" and row["reason"] == reason:
            upstream = row["source"].startswith("data/")  # a partition of the upstream: the key is more useful
            place = "" if upstream else "/".join(filter(None, (row["source"], row["member"])))
            detail = f": {row['detail']}" if row["detail"] else ""
            return f"{reason}{detail}, {count} time{'s' * (count > 1)} (for example {place or row['key']})"
    return f"{reason}, {count} time{'s' * (count > 1)}"
