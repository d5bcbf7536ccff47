"""Reduces the number of files: ledgers and records move into one pack for each bucket of 1,000 finished partitions.

A partition then takes two inodes instead of four. Whenever packing is interrupted, every small file is in its folder,
in a pack, or in both: it is removed from its folder only after the pack was written, synced and read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipeline.partitions.dataset import RECORD, Dataset, SlotReader
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.packs import FOLDER, Pack, PackName, list_packs, write_pack
from pipeline.partitions.plan import BUCKET
from pipeline.storage import GONE, Folder, StorageError


def _nothing() -> None:
    return


def buckets_of(dataset: Dataset) -> range:
    """Numbers of all buckets."""
    return range(-(-dataset.partitions // BUCKET))


def uncompacted(dataset: Dataset) -> list[int]:
    """Buckets without the mark that says they are packed."""
    marked: set[str] = set()
    try:
        with dataset.root.folder("claims") as claims:
            marked = set(claims.listdir())
    except OSError as error:
        if error.errno not in GONE:
            raise
    return [bucket for bucket in buckets_of(dataset) if _mark(dataset, bucket) not in marked]


def _mark(dataset: Dataset, bucket: int) -> str:
    return f"{bucket:03d}.{dataset.plans[-1].generation}.packed"


def compact(dataset: Dataset, buckets: Iterable[int], step: Callable[[], None] = _nothing) -> int:
    """Pack some buckets of a finished dataset; several processes may do so at the same time.

    Args:
        step: called for each partition; may raise.

    Returns:
        The number of files removed.

    Raises:
        Unfinished: the dataset is not finished.
        StorageError: a record or ledger is damaged, or a file operation failed.
    """
    dataset.require_success()
    removed = 0
    try:
        dataset.root.mkdir(FOLDER, exist_ok=True)
        with dataset.root.folder(FOLDER) as folder:
            for bucket in buckets:
                removed += _compact_bucket(dataset, folder, bucket, step)
    except OSError as error:
        raise StorageError(f"{dataset.root.path} cannot be packed: {error}; nothing is lost, run it again") from error
    return removed


def _compact_bucket(dataset: Dataset, folder: Folder, bucket: int, step: Callable[[], None]) -> int:
    name = PackName(bucket, dataset.plans[-1].generation)
    span = range(bucket * BUCKET, min((bucket + 1) * BUCKET, dataset.partitions))
    if not _is_whole(dataset, name, span):
        digest = folder.write_stream_by(str(name), lambda file: write_pack(file, _members(dataset, span, step)))
        if folder.digest_of(str(name)) != digest:
            raise StorageError(f"{folder.path / str(name)} was not read back as it was written")
    if _is_superseded(dataset.root, name):  # by a process that knows of a later generation
        folder.trash(str(name))
        return 0
    removed = 0
    for index in span:
        step()
        removed += _strip(dataset, index)
    dataset.root.append(f"claims/{_mark(dataset, bucket)}", b"")
    for other in list_packs(dataset.root):
        if other.bucket == bucket and other.generation < name.generation:
            removed += folder.trash(str(other))
    if _is_superseded(dataset.root, name):
        folder.trash(str(name))
    return removed


def _is_superseded(root: Folder, name: PackName) -> bool:
    return any(other.bucket == name.bucket and other.generation > name.generation for other in list_packs(root))


def _is_whole(dataset: Dataset, name: PackName, span: Iterable[int]) -> bool:
    """Whether the pack exists and is complete; the content of its members is checked by ``verify``."""
    try:
        members = set(Pack(dataset.root, name).members)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False
    except StorageError:
        return False
    return all({f"{dataset.slot(index)}/{file}" for file in (RECORD, LEDGER)} <= members for index in span)


def _members(dataset: Dataset, span: Iterable[int], step: Callable[[], None]) -> Iterator[tuple[str, bytes]]:
    """The small files of partitions, each checked before it is packed."""
    for index in span:
        step()
        reader = SlotReader(dataset, index)
        if dataset.record(index) is None:
            raise StorageError(f"{dataset.root.path / reader.path} has no {RECORD}: run stage=repair on it")
        yield f"{dataset.slot(index)}/{RECORD}", reader.record_bytes()
        yield f"{dataset.slot(index)}/{LEDGER}", reader.ledger_bytes()


def _strip(dataset: Dataset, index: int) -> int:
    """Remove the packed files from a partition's folder; returns their number.

    A folder without data files keeps its record, because a late attempt could be renamed onto an empty folder.
    """
    path, removed = dataset.path_of(index), 0
    record = dataset.record(index) or {"files": []}
    released = set(record.get("released", ()))
    has_data = any(file["name"] != LEDGER and file["name"] not in released for file in record["files"])
    for file in (LEDGER, RECORD) if has_data else (LEDGER,):
        try:
            dataset.root.unlink(f"{path}/{file}")
            removed += 1
        except OSError as error:
            if error.errno not in GONE:
                raise
    return removed


def stale_packs(dataset: Dataset) -> list[PackName]:
    """Packs that contain replaced partitions, or whose bucket has a newer pack."""
    found = []
    newest: dict[int, int] = {}
    for name in list_packs(dataset.root):
        newest.setdefault(name.bucket, name.generation)
        redone = any(
            plan.generation > name.generation and any(index // BUCKET == name.bucket for index in plan.redo)
            for plan in dataset.plans
        )
        if name.generation < newest[name.bucket] or redone:
            found.append(name)
    return found
