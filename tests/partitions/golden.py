"""Writes tests/data/golden_v<format version>; once for each version, in tests: python -m partitions.golden"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from fake_stage import Fake, FakeConfig, run

from pipeline import storage
from pipeline.config.schema import STAGES
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.plan import FORMAT_VERSION
from pipeline.registry import Registered, stages
from pipeline.stages import get_stage

PLACE = Path(__file__).parent.parent / "data" / f"golden_v{FORMAT_VERSION}"
LINE: dict[str, dict[str, Any]] = {
    "download": {"source": "shapes", "count": 10, "image_size": 16, "partition_size": 4},
    "filter": {"min_image_size": 8, "max_image_size": 12},
    "shard": {"partition_size": 6, "shuffle": True},
}


def main() -> None:
    if PLACE.exists():
        sys.exit(f"{PLACE} is there already: a format version is written once")
    stages.added["fake"] = Registered(Fake, FakeConfig)
    socket.gethostname = lambda: "golden"
    expected = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name).rename("/tmp/golden")  # its path stands in the plans
        upstream = ""
        for stage, settings in LINE.items():
            config = STAGES[stage](input=upstream, output=str(folder / stage), **settings)
            engine.run(get_stage(stage)(config, Rank()))
            upstream = str(folder / stage)
        run(folder / "fake", Fake, count=20, partition_size=4)
        run(folder / "fake", Fake, count=20, partition_size=4, retry_failed=True)
        for output in sorted(folder.iterdir()):
            expected[output.name] = describe(output)
            for rest in ("claims", "events"):
                shutil.rmtree(output / rest)
        shutil.copytree(folder, PLACE)
        folder.rename(name)
    (PLACE / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def describe(output: Path) -> dict[str, Any]:
    """What readers of the directory are to find."""
    dataset = Dataset.open(output)
    rows = [stored.read() for index in range(dataset.partitions) for stored in dataset.samples(index)]
    return {
        "content_digest": dataset.require_success()["content_digest"],
        "keys": [row["key"] for row in rows],
        "images": {row["key"]: storage.digest(row.pop("jpg")) for row in rows},
        "rows": {row["key"]: row for row in rows},
    }


if __name__ == "__main__":
    main()
