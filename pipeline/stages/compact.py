"""stage=compact: ledgers and records of finished partitions in few files, where inodes are scarce.

Everything goes on with packed outputs as before: readers, later stages, reruns, verify, trace, takedown, repair, gc.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.cli import config_for
from pipeline.config import CompactConfig
from pipeline.distributed import Rank, distributed
from pipeline.partitions import engine
from pipeline.partitions.attempt import unless_removed
from pipeline.partitions.compact import buckets_of, compact
from pipeline.partitions.dataset import Dataset, Unfinished, find_datasets


def found(folder: Path) -> list[Dataset]:
    """The dataset directories at and below ``folder``.

    Raises:
        Unfinished: there is none.
    """
    datasets = find_datasets(folder)
    if not datasets:
        raise Unfinished(f"{folder}: no dataset directory is there or below it: input= names one, or a folder above")
    return datasets


@distributed
def main(rank: Rank, config: CompactConfig) -> None:
    datasets = found(Path(config.input).absolute())
    with engine.expected_errors(rank):
        for dataset in datasets:
            place = dataset.root.path
            if dataset.success is None:
                print(f"{place}: not finished, left as it is", flush=True)
                continue
            with unless_removed(dataset.root):
                mine = buckets_of(dataset)[rank.rank :: rank.world_size]
                removed = compact(dataset, mine, rank.check_stop)
            print(f"{place}: {removed} files fewer, in {len(mine)} packs", flush=True)


if __name__ == "__main__":
    main(config_for("compact"))
