"""Deletes leftovers: attempts of processes that died, replaced partitions, unfinished temporary files."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.partitions.compact import compact, stale_packs
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.packs import FOLDER
from pipeline.storage import GONE, TRASH, Folder, StorageError
from pipeline.stores import Store, StoreFolder
from pipeline.stores.folder import FINISH

PARTIAL = "partial"
"""Folder in which a stage keeps partly fetched inputs; not needed once the stage has finished."""
_SLOT = re.compile(r"(\d+)(?:\.(\d+))?")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # .<name>.<uuid>: an attempt, a temporary file or trash


def collect(dataset: Dataset, older_than: float) -> Iterator[Path]:
    """Delete leftovers that have not changed for ``older_than`` seconds, and yield their paths.

    A process that still writes to a deleted attempt notices this at its commit, and does the work again.

    Raises:
        StorageError: something cannot be deleted.
    """
    try:
        yield from _collect_all(dataset, older_than)
    except OSError as error:
        if error.errno not in GONE:  # otherwise the whole output was removed
            raise StorageError(f"{dataset.root.path}: {error}") from error


def _collect_all(dataset: Dataset, older_than: float) -> Iterator[Path]:
    if isinstance(dataset.root, StoreFolder):
        yield from _collect_in_store(dataset, dataset.root.store)
        return
    yield from _collect(dataset.root, {}, older_than)
    yield from _collect_moved_aside(dataset.root, older_than)
    if dataset.success is not None and dataset.root.exists(PARTIAL):
        with dataset.root.folder(PARTIAL) as partial:
            yield from _collect(partial, {}, older_than, re.compile(".+"))
    with dataset.root.folder("data") as data:
        for bucket in data.listdir():
            with data.folder(bucket) as folder:
                yield from _collect(folder, _redone(dataset, folder), older_than)
    if dataset.root.exists(FOLDER):
        with dataset.root.folder(FOLDER) as packed:
            yield from _collect(packed, {}, older_than)
            yield from _collect_packs(dataset, packed, older_than)


def _collect_in_store(dataset: Dataset, store: Store) -> Iterator[Path]:
    """Delete objects of attempts that lost against a committed one, and of partitions that were made again.

    Objects of an attempt that may still be committed are never deleted, however old: a commit does not check for them.
    """
    buckets, _ = store.children("data")
    for at in ("", *(f"data/{bucket}" for bucket in buckets)):
        folders, _ = store.children(at)
        prefix = f"{at}/" if at else ""
        redone = _redone(dataset, dataset.root.folder(at)) if at else {}
        for name in folders:
            final = name[1:-33] if _TEMPORARY.fullmatch(name) else ""
            if name.startswith(FINISH):
                continue
            lost = final in folders and dataset.root.place(f"{prefix}{final}") != f"{prefix}{name}"
            if lost or _replaced(final or name, redone):
                store.delete([found.path for found in store.objects(f"{prefix}{name}")])
                yield dataset.root.path / f"{prefix}{name}"
    names, _ = store.children("")
    current = Dataset.open(store.url)  # read after the attempts were listed: none of them can still replace _SUCCESS
    if current.success is not None:
        for name in names:
            if name.startswith(FINISH) and name != f"{FINISH}{current.success.get('attempt', '')}":
                store.delete([found.path for found in store.objects(name)])
                yield dataset.root.path / name


def _collect_packs(dataset: Dataset, packed: Folder, older_than: float) -> Iterator[Path]:
    """Delete outdated packs; what is still valid in them is packed again first."""
    stale = stale_packs(dataset) if dataset.success is not None else []
    for name in stale:
        try:
            if time.time() - packed.stat(str(name)).st_mtime < older_than:
                continue
            compact(dataset, [name.bucket])
            packed.trash(str(name))
        except OSError as error:
            if error.errno not in GONE:
                raise
        yield packed.path / str(name)


def _collect_moved_aside(root: Folder, older_than: float) -> Iterator[Path]:
    """Delete outputs next to ``root`` that runs with ``overwrite`` moved aside before they died."""
    names = re.compile(rf"\.(trash|{re.escape(root.path.name)})\.[0-9a-f]{{32}}")
    with suppress(FileNotFoundError), Folder.open(root.path.parent) as parent:
        if root.in_place():
            yield from _collect(parent, {}, older_than, names)


def _redone(dataset: Dataset, folder: Folder) -> dict[int, int]:
    """Partitions in this folder that were made again → the generation that counts now.

    Until a partition is committed again, its old data are still needed: a takedown copies them.
    """
    slots = {int(slot[1]) for name in folder.listdir() if (slot := _SLOT.fullmatch(name))}
    redone = {index for index in slots if any(index in plan.redo for plan in dataset.plans)}
    there = {index for index in redone if dataset.root.exists(dataset.path_of(index))}
    return {index: dataset.counts_by(index).generation for index in there}


def _replaced(name: str, redone: dict[int, int]) -> bool:
    """Whether the slot ``name`` is of an earlier generation; False for later ones, which this process may not know."""
    slot = _SLOT.fullmatch(name)
    return slot is not None and int(slot[2] or 0) < redone.get(int(slot[1]), 0)


def _collect(
    folder: Folder, redone: dict[int, int], older_than: float, names: re.Pattern[str] = _TEMPORARY
) -> Iterator[Path]:
    for name in folder.listdir():
        if not (_replaced(name, redone) or names.fullmatch(name)):
            continue
        try:
            if time.time() - _newest(folder, name) < older_than:
                continue
            if name.startswith(TRASH):
                folder.delete(name)
            elif not folder.trash(name):
                continue
        except OSError as error:
            if error.errno not in GONE:
                raise
        else:
            yield folder.path / name


def _newest(folder: Folder, name: str) -> float:
    """When ``name`` or a file directly in it was last modified, in seconds since the epoch."""
    state = folder.stat(name)
    if not stat.S_ISDIR(state.st_mode):
        return state.st_mtime
    with folder.folder(name) as inside:
        return max([state.st_mtime, *(inside.stat(entry).st_mtime for entry in inside.listdir())])
