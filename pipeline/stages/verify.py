"""stage=verify: does a dataset directory hold what it promises? Prints what is wrong; exit code 1 if anything is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.cli import config_for, errors_as_one_line
from pipeline.config import VerifyConfig
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import Finding, verify
from pipeline.storage import StorageError


def findings_of(folder: str | Path) -> tuple[int, Iterator[Finding]]:
    """How many partitions the dataset directory has, and what is wrong with it.

    Raises:
        Unfinished: there is no dataset directory.
    """
    try:
        dataset = Dataset.open(folder)
    except StorageError as error:
        return 0, iter([Finding(-1, str(error))])
    return dataset.partitions, verify(dataset)


def main(config: VerifyConfig) -> int:
    with errors_as_one_line():
        partitions, findings = findings_of(config.input)
        count = 0
        for finding in findings:
            count += 1
            print(json.dumps(finding.as_dict()) if config.json else finding, flush=True)
    if not config.json:
        print(f"{config.input}: {partitions} partitions checked: {f'{count} findings' if count else 'sound'}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(config_for("verify")))
