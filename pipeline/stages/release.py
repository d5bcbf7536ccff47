"""Remove data that are no longer needed once the output made from them is verified; ledgers and records are kept.

A generation of kind ``release`` commits each partition again with its ledger and a record that still lists the data
files; then the replaced partition is deleted. The content digest does not change, so that nothing becomes stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, find_datasets
from pipeline.partitions.gc import collect
from pipeline.partitions.plan import RELEASE
from pipeline.partitions.planning import commit_release, last_upstream
from pipeline.partitions.stage import AnyStage, input_folder
from pipeline.stages import stage_that_made
from pipeline.stages.verify import findings_in
from pipeline.storage import StorageError

_ELSEWHERE = ("reference", "pointer")
"""Formats whose data lie outside the dataset directory."""


def main(
    make: Callable[[Any, Rank], AnyStage], config: Any, rank: Rank, *, release_raw: bool, whole_line: bool
) -> None:
    """The body of a stage's ``main``; with ``release_raw``, removes the upstream's data when the stage is done."""
    stage = make(config, rank)
    if stage.reads_upstream:
        finish_release(input_folder(config, stage.name), rank)  # that an earlier life may have left unfinished
    engine.main(make, config, rank)
    if release_raw and stage.reads_upstream and rank.is_main:
        release_upstream(stage.output, rank, whole_line=whole_line)


def release_upstream(made: Path, rank: Rank, *, whole_line: bool) -> None:
    """Remove the data that ``made`` was made from; with ``whole_line``, those of all stages before it.

    Data from which something unfinished or stale was made are kept. If interrupted, call it again.

    Raises:
        StorageError: something that was made from the data is damaged.
    """
    verified: set[Path] = set()
    line = _line(Dataset.open(made), rank)
    for after, dataset in line if whole_line else islice(line, 1):
        if dataset.format.name in _ELSEWHERE or not _may_go(dataset, after, verified, rank):
            continue
        release(dataset.root.path, rank)


def release(place: Path, rank: Rank) -> None:
    """Remove the data of the finished dataset directory ``place``. If interrupted, call it again.

    Raises:
        StorageError: files cannot be removed.
    """
    try:
        _release(place, rank)
    except OSError as error:
        raise StorageError(f"{place}: its data cannot be removed: {error}; run the same command again") from error


def _release(place: Path, rank: Rank) -> None:
    finish_release(place, rank)
    dataset = Dataset.open(place)
    if len(dataset.released) < dataset.partitions:
        commit_release(dataset)
        finish_release(place, rank)
    for path in collect(Dataset(dataset.root), 0.0):
        rank.log.debug("deleted %s", path)
        rank.check_stop()
    counts = Dataset(dataset.root).require_success()["counts"]
    rank.log.info("%s: its data were removed (%.1f MB)", place, counts.get("released", 0) / 1e6)


def finish_release(place: Path, rank: Rank) -> None:
    """Complete a release of ``place`` that was interrupted, if there is one."""
    if (place / "plan").is_dir():
        dataset = Dataset.open(place)
        if dataset.success is None and dataset.plans[-1].header["kind"] == RELEASE:
            engine.run(stage_that_made(dataset, rank, lenient=True))


def _line(dataset: Dataset, rank: Rank) -> Iterator[tuple[Dataset, Dataset]]:
    """Pairs of (a dataset directory, the dataset it was made from), from ``dataset`` back to the first stage."""
    while upstream := dataset.header.get("upstream"):
        place = Path(upstream["path"])
        if not (place / "plan").is_dir():
            return
        finish_release(place, rank)
        after, dataset = dataset, Dataset.open(place)
        yield after, dataset


def _may_go(dataset: Dataset, after: Dataset, verified: set[Path], rank: Rank) -> bool:
    """Whether ``after`` and all neighbouring datasets made from ``dataset`` are finished and sound."""
    digest = dataset.require_success()["content_digest"]
    found = {made.root.path: made for made in (after, *find_datasets(dataset.root.path.parent))}
    for made in found.values():
        newest = last_upstream(made)
        if newest is None or newest["path"] != str(dataset.root.path) or made.root.path in verified:
            continue
        if made.success is None or newest["content_digest"] != digest:
            rank.log.warning(
                "%s stays, as %s is not finished, or not made from all of it: run stage=%s first",
                dataset.root.path,
                made.root.path,
                made.stage,
            )
            return False
        for finding in findings_in(made, workers=0, step=rank.check_stop):
            raise StorageError(f"{made.root.path}: {finding}: run stage=repair on it; {dataset.root.path} stays")
        verified.add(made.root.path)
    return True
