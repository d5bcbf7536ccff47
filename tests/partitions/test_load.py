"""How much a dataset directory asks of a file system: inodes, operations of ranks that have nothing to do, bytes."""

from __future__ import annotations

import json
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_stage import Fake, make, run

from pipeline import storage
from pipeline.distributed import Rank
from pipeline.partitions import engine, pace
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.engine import Worker
from pipeline.partitions.pace import Pace
from pipeline.partitions.planning import open_or_plan
from pipeline.storage import Folder
from pipeline.telemetry import events as telemetry
from pipeline.telemetry.events import EventReader, Events

HOUR = 3600.0


@pytest.mark.parametrize(("compact", "most"), [(False, 4), (True, 2)])
def test_a_partition_takes_few_inodes(memory: Path, compact: bool, most: int) -> None:
    run(memory / "output", count=200, partition_size=4, compact=compact)
    inodes = list(memory.glob("output/data/*/**/*"))
    assert len(inodes) <= most * 50


@pytest.mark.parametrize("partitions", [40, 1500])
def test_a_rank_with_nothing_to_do_looks_at_most_twice_a_second(
    memory: Path, monkeypatch: pytest.MonkeyPatch, partitions: int
) -> None:
    """All partitions are claimed by others; in the long run, after a first look around."""
    stage = make(memory / "output", Fake, count=partitions, partition_size=1, lease=60.0)
    dataset = open_or_plan(stage)
    owner = {"host": "elsewhere", "boot": "", "pid": 1, "start": "1", "owner": uuid.uuid4().hex}
    clock = [0.0]
    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: None)
    for module in (engine, pace):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr("pipeline.partitions.claims.Claims.fresh", _read_only)
    seen: Counter[str] = Counter()

    def interpose(operation: str, path: str, do: Callable[[], Any]) -> Any:
        if threading.current_thread() is threading.main_thread():
            seen[operation] += 1
        return do()

    class Over(Exception):
        pass

    def sleep(worker: Worker, seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > HOUR:
            raise Over

    monkeypatch.setattr(Worker, "_sleep", sleep)
    for index in range(partitions):
        claim = f"claims/{dataset.bucket(index)}/{dataset.slot(index)}"
        dataset.root.mkdir(claim.rpartition("/")[0], exist_ok=True)
        dataset.root.write_new(claim, json.dumps({**owner, "counter": index}).encode())
    stage.rank = Rank()
    worker = Worker(stage, dataset, Events(dataset.root, stage.rank))
    monkeypatch.setattr(worker, "own_range", lambda: range(0))
    monkeypatch.setattr(storage, "interpose", interpose)
    with pytest.raises(Over):
        worker.work()
    monkeypatch.setattr(storage, "interpose", None)
    worker.close()
    beats = 2 * HOUR / telemetry.BEAT  # an event and a sign of life to the job script
    assert 0 < sum(seen.values()) + beats <= 2 * HOUR, seen


def _read_only(claims: Any, name: str) -> bool:
    """All claims are fresh; as many operations as to find that out."""
    claims._root.read(f"claims/{name}")
    return True


def test_unclaimed_partitions_are_taken_whatever_others_have_claimed(memory: Path) -> None:
    stage = make(memory / "output", Fake, count=40, partition_size=1)
    dataset = open_or_plan(stage)
    worker = Worker(stage, dataset, Events(dataset.root, stage.rank))
    (memory / "output/claims/000").mkdir(parents=True, exist_ok=True)
    for index in [*range(20), *range(21, 40)]:
        (memory / f"output/claims/000/{index:05d}").write_text("{}")
    try:
        todo = worker._unclaimed_first(0, list(range(40)))
    finally:
        worker.close()
    assert todo[0] == 20 and len(todo) == 1 + engine._WATCHED == len(set(todo))


def test_pace_allows_a_burst_and_then_so_many_a_second() -> None:
    now = [0.0]
    pace_ = Pace(rate=2.0, burst=10, clock=lambda: now[0])
    assert pace_.spend(10) == 0.0
    assert pace_.spend(4) == 2.0
    now[0] = 2.0
    assert pace_.spend(2) == 1.0
    now[0] = 100.0
    assert pace_.spend(10) == 0.0


def test_an_event_file_is_bounded_and_readers_see_its_newest_event(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_MOST_BYTES", 50_000)
    monkeypatch.setattr(telemetry, "_KEPT", 10)
    root = Folder.open(memory / "output", create=True)
    events = Events(root, Rank())
    reader, past = EventReader(root), EventReader(root, past=True)
    largest = 0
    for number in range(600):
        events.totals["in"] = number
        events.emit("commit")
        if number % 7 == 0:
            for one in (reader, past):
                (process,) = one.refresh()
                assert process.last["totals"]["in"] == number
        largest = max(largest, *(path.stat().st_size for path in memory.glob("output/events/*/*")))
    assert largest < 52_000
    (path,) = memory.glob("output/events/*/*")
    lines = [json.loads(line)["totals"]["in"] for line in path.read_text().splitlines()]
    assert lines == sorted(set(lines)) and lines[0] == 0 and lines[-10:] == list(range(590, 600))


def test_a_rank_of_a_long_run_commits_with_few_operations(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    def interpose(operation: str, path: str, do: Callable[[], Any]) -> Any:
        if threading.current_thread() is threading.main_thread():
            seen[operation] += 1
        return do()

    monkeypatch.setattr(storage, "interpose", interpose)
    run(memory / "output", count=400, partition_size=4)
    monkeypatch.setattr(storage, "interpose", None)
    assert Dataset.open(memory / "output").partitions == 100
    assert sum(seen.values()) / 100 < 36, seen
