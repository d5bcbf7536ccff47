"""stage=compact: pack the ledgers and records of finished partitions into a few files, to save inodes.

Packed outputs work as before with readers, later stages, reruns, verify, trace, takedown, repair and gc.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.config.cli import config_for
from pipeline.config.schema import CompactConfig
from pipeline.distributed import Rank, distributed
from pipeline.partitions.attempt import unless_removed
from pipeline.partitions.compact import buckets_of, compact
from pipeline.partitions.dataset import Unfinished, find_datasets
from pipeline.registry import stages
from pipeline.storage import StorageError


def compact_below(folder: Path, rank: Rank) -> Iterator[tuple[Path, int | None]]:
    """Pack this rank's share of all dataset directories at and below ``folder``.

    Yields:
        The path of each dataset directory and the number of files removed; None if it is unfinished and was skipped.

    Raises:
        Unfinished: there is no dataset directory.
        StorageError: a file is damaged, or reading or writing failed.
    """
    try:
        datasets = find_datasets(folder)
        if not datasets:
            raise Unfinished(f"input={folder}: contains no dataset directory")
        for dataset in datasets:
            with unless_removed(dataset.root):
                mine = buckets_of(dataset)[rank.rank :: rank.world_size]
                removed = compact(dataset, mine, rank.check_stop) if dataset.success is not None else None
            yield dataset.root.path, removed
    except OSError as error:
        raise StorageError(f"{folder} cannot be packed: {error}; nothing is lost, run it again") from error


@stages.register("compact", CompactConfig)
@distributed
def main(rank: Rank, config: CompactConfig) -> None:
    for place, removed in compact_below(Path(config.input).absolute(), rank):
        said = "not finished, left as it is" if removed is None else f"{removed} files fewer"
        print(f"{place}: {said}", flush=True)


if __name__ == "__main__":
    main(config_for("compact"))
