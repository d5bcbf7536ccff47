"""stage=takedown: permanently remove samples from every finished dataset directory in a folder, and prove it.

Upstream first: each dataset directory gets a generation in which the partitions that held a sample are rewritten
without it; then the replaced partitions are deleted. Ledger rows stay as ``dropped: takedown``, with the key only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, TakedownConfig, dataset_name
from pipeline.distributed import Rank, distributed
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, SlotReader, find_datasets
from pipeline.partitions.gc import collect
from pipeline.partitions.optouts import Wanted, account, read_list, report, requests, resolve
from pipeline.partitions.packs import Pack, list_packs
from pipeline.partitions.planning import commit_takedown, replaced_digests
from pipeline.partitions.takedown import find, is_takedown
from pipeline.registry import stages
from pipeline.stages import stage_that_made
from pipeline.storage import StorageError


@dataclass
class Taken:
    """Result of a takedown."""

    removed: dict[str, int]
    """Number of samples removed from each dataset directory."""
    lines: list[Wanted]
    """The lines of the list, each with its result."""

    @property
    def complete(self) -> bool:
        """Whether every line of the list identified a sample that is now removed."""
        return all(line.fate not in ("not found", "ambiguous") for line in self.lines)


def takedown(folder: Path, wanted: Path, rank: Rank, count_only: bool = False) -> Taken:
    """Remove the samples listed in the file ``wanted`` from all dataset directories below ``folder``.

    If interrupted, run it again with the same list.

    Raises:
        ConfigError: the list cannot be read or is empty, or there is no dataset directory.
        StorageError: a dataset is unfinished, damaged, or not made from the current content of its upstream.
    """
    lines = read_list(wanted)
    try:
        return _takedown(folder, lines, rank, count_only)
    except OSError as error:
        raise StorageError(f"{folder}: {error}; run it again with the same list") from error


def _takedown(folder: Path, lines: list[Wanted], rank: Rank, count_only: bool) -> Taken:
    datasets = list(_upstream_first(find_datasets(folder)))
    if not datasets:
        raise ConfigError(f"no dataset directory below {folder}")
    for dataset in datasets:
        _require_sound_state(dataset)
    if not count_only:
        datasets = [_resumed(dataset, rank) for dataset in datasets]
    resolve(lines, [*_further_up(datasets), *datasets])
    keys = {key for line in lines for key in line.keys}
    removed = {}
    gone: set[str] = set()
    for opened in datasets:
        dataset = Dataset(opened.root)
        found = find(dataset, keys)
        gone |= found.keys()
        removed[str(dataset.root.path)] = len(found)
        rank.log.info("%s: %d samples to remove", dataset.root.path, len(found))
        if count_only:
            continue
        upstream = _upstream_of(dataset)
        if found or (upstream is not None and _digest_known(dataset) != _digest(upstream)):
            if not commit_takedown(dataset, found, requests(lines, found), upstream):
                raise StorageError(
                    f"{dataset.root.path}: another run is working on it: run this again when it has finished"
                )
            engine.run(stage_that_made(dataset, rank, lenient=True))
        for path in collect(Dataset(dataset.root), 0.0):
            rank.log.info("deleted %s", path)
        _prove(Dataset(dataset.root), keys)
    account(lines, gone, datasets, "would be removed" if count_only else "removed")
    return Taken(removed, lines)


def _resumed(opened: Dataset, rank: Rank) -> Dataset:
    """The dataset, after completing a takedown that was interrupted."""
    dataset = Dataset(opened.root)
    if dataset.success is None:
        engine.run(stage_that_made(dataset, rank, lenient=True))
    return Dataset(opened.root)


def _further_up(datasets: list[Dataset]) -> list[Dataset]:
    """Upstream datasets outside the folder, whose ledgers are needed to look up files and URLs."""
    known = {str(dataset.root.path) for dataset in datasets}
    found: list[Dataset] = []
    for dataset in datasets:
        upstream = _upstream_of(dataset)
        while upstream is not None and str(upstream.root.path) not in known:
            known.add(str(upstream.root.path))
            found.append(upstream)
            upstream = _upstream_of(upstream)
    return found


def _upstream_first(datasets: list[Dataset]) -> Iterator[Dataset]:
    waiting = {str(dataset.root.path): dataset for dataset in datasets}
    while waiting:
        ready = [path for path, dataset in waiting.items() if _upstream_path(dataset) not in waiting]
        for path in ready or list(waiting):
            yield waiting.pop(path)


def _upstream_path(dataset: Dataset) -> str:
    return str((dataset.header.get("upstream") or {}).get("path", ""))


def _upstream_of(dataset: Dataset) -> Dataset | None:
    path = _upstream_path(dataset)
    return Dataset.open(path) if path and Path(path, "plan").is_dir() else None


def _digest(dataset: Dataset) -> str:
    return str(dataset.require_success()["content_digest"])


def _digest_known(dataset: Dataset) -> str:
    """The upstream's content digest when the newest generation was planned."""
    return next(str(p.header["upstream"]["content_digest"]) for p in reversed(dataset.plans) if p.header["upstream"])


def _require_sound_state(dataset: Dataset) -> None:
    """Raises StorageError unless the dataset is finished or amid a takedown, and up to date with its upstream."""
    if dataset.success is None and not is_takedown(dataset):
        raise StorageError(f"{dataset.root.path} is not finished: run stage={dataset.stage} to its end, or delete it")
    upstream = _upstream_of(dataset)
    if upstream is None or upstream.success is None:
        return
    if _digest_known(dataset) not in {_digest(upstream), *replaced_digests(upstream)}:
        raise StorageError(
            f"{dataset.root.path} was not made from the current content of {upstream.root.path}: "
            f"run stage={dataset.stage} again first, or delete it"
        )


def _prove(dataset: Dataset, keys: set[str]) -> None:
    """Raises StorageError if a partition still has one of the samples, or a replaced partition still exists.

    Checking ledgers suffices: records hold the hashes of the data files, and stage=verify compares them.
    """
    for index in range(dataset.partitions):
        left = {stored.key for stored in SlotReader(dataset, index).stored()} & keys
        if left:
            raise StorageError(f"{dataset.root.path}: partition {index} still has {', '.join(sorted(left)[:3])}")
    slots = {dataset.path_of(index) for index in range(dataset.partitions)}
    root = dataset.root.path
    there = {str(path.relative_to(root)) for path in root.glob("data/*/*")}
    for name in list_packs(dataset.root):
        members = Pack(dataset.root, name).members
        there |= {f"data/{name.bucket:03d}/{member.rpartition('/')[0]}" for member in members}
    if there - slots:
        raise StorageError(f"{root}: {min(there - slots)} is left, and may hold samples that were removed")


@stages.register("takedown", TakedownConfig)
@distributed
def main(rank: Rank, config: TakedownConfig) -> int:
    folder = Path(config.data_dir, dataset_name(config.dataset)).absolute()
    taken = takedown(folder, Path(config.takedown), rank, config.count_only)
    for path, count in taken.removed.items():
        print(f"{path}: {count} samples {'would be removed' if config.count_only else 'removed'}")
    print("\n".join(report(taken.lines)))
    return 0 if taken.complete else 1


if __name__ == "__main__":
    sys.exit(main(config_for("takedown")))
