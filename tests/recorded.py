"""Dataset directories as many ranks leave them while they work, made in seconds: for what looks at them."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.partitions.plan import BUCKET, Input, Partition, commit_plan
from pipeline.storage import Folder

SAMPLES = 1000  # of a partition


def plan(output: Path, partitions: int, stage: str = "filter") -> None:
    """A planned output whose partitions all have their number of samples."""
    header = {"generation": 0, "first": 0, "kind": "initial", "stage": stage, "identity": {}, "config": {}}
    with Folder.open(output, create=True) as root:
        parts = (Partition((Input("", i, i + 1),), SAMPLES) for i in range(partitions))
        assert commit_plan(root, header, parts)


def commit(output: Path, indices: Iterable[int]) -> None:
    """Partitions as if they were committed; nothing is in them."""
    for index in indices:
        os.mkdir(output / f"data/{index // BUCKET:03d}/{index:05d}")


def event(name: str, rank: int, world: int, begin: float, at: float, partitions: int, **values: Any) -> dict[str, Any]:
    """An event of a rank that has committed so many partitions."""
    done = partitions * SAMPLES
    line = {"event": name, "time": at, "begin": begin, "rank": rank, "world_size": world, "host": f"node{rank // 8}"}
    line |= {"pid": 100 + rank, "beat": 10.0, "rss": 10**9, "peak": 2 * 10**9, "cpu": at - begin, "still": 1.0}
    line |= {"read": done * 10_000, "written": done * 5000, "waited": (at - begin) / 4, "partition": rank, "done": done}
    totals = {"partitions": partitions, "in": done, "kept": done * 9 // 10, "dropped": done // 10, "bytes": done * 5000}
    line |= {"totals": {**totals, "reason:dropped:small": done // 10}, **values}
    return {name: value for name, value in line.items() if value is not None}


def write_events(output: Path, events: Iterable[dict[str, Any]], process: str = "") -> Path:
    """The event file of one process, or what it adds to it."""
    lines = list(events)
    rank = lines[0]["rank"]
    path = output / f"events/{rank // BUCKET:03d}/{rank:05d}.{process or uuid.uuid4().hex}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    os.utime(path, (lines[-1]["time"], lines[-1]["time"]))  # written when they say, by the file server's clock
    return path


def record(output: Path, ranks: int, partitions: int, now: float, fraction: float = 0.5, events: int = 20) -> None:
    """``ranks`` at work on ``partitions``; each has done the ``fraction`` of its range, from the start."""
    plan(output, partitions)
    begin = now - 1000.0
    for rank in range(ranks):
        first, stop = partitions * rank // ranks, partitions * (rank + 1) // ranks
        done = int((stop - first) * fraction)
        commit(output, range(first, first + done))
        steps = [(1000.0 * (k + 1) / events, done * (k + 1) // events) for k in range(events)]
        lines = [event("start", rank, ranks, begin, begin, 0)]
        lines += [event("commit", rank, ranks, begin, begin + seconds, count) for seconds, count in steps]
        write_events(output, lines, process="a")
