"""stage=gc: delete leftovers of crashed attempts and replaced partitions in a dataset directory."""

from __future__ import annotations

import sys

from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.schema import GcConfig
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.gc import collect
from pipeline.registry import stages
from pipeline.storage import StorageError


@stages.register("gc", GcConfig)
def main(config: GcConfig) -> int:
    with errors_as_one_line():
        count = 0
        try:
            for path in collect(Dataset.open(config.input), config.older_than):
                print(f"deleted {path}")
                count += 1
        except StorageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    why = "" if count else f": no leftovers are older than older_than={config.older_than:g} seconds"
    print(f"{config.input}: {count} deleted{why}")
    return 0


if __name__ == "__main__":
    sys.exit(main(config_for("gc")))
