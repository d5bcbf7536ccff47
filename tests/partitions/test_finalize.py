"""An output is finished when everything is there and adds up, and never before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_stage import Fake, assert_sound, committed, leftovers, make, run

from pipeline import storage
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.engine import Worker
from pipeline.partitions.finalize import Incomplete, Overtaken, Tally, Unbalanced, check_balance, finalize, records
from pipeline.partitions.planning import open_or_plan
from pipeline.storage import StorageError
from pipeline.telemetry.events import Events

ROOT_FILES = ("manifest.parquet", "index.json", "manifest.json", "_SUCCESS")


@pytest.fixture
def output(memory: Path) -> Path:
    return memory / "output"


def unfinished(output: Path) -> Dataset:
    """An output with all partitions and nothing more."""
    run(output)
    for name in ROOT_FILES:
        (output / name).unlink()
    return Dataset.open(output)


def root_files(output: Path) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in ROOT_FILES if (output / name).exists()}


def test_finishing_twice_gives_the_same_bytes(output: Path) -> None:
    dataset = unfinished(output)
    finalize(dataset)
    first = root_files(output)
    for name in ROOT_FILES:
        (output / name).unlink()
    finalize(Dataset.open(output))
    assert root_files(output) == first
    assert leftovers(output) == []


def test_finishing_a_finished_output_says_what_it_said(output: Path) -> None:
    success = run(output)
    assert finalize(Dataset.open(output)) == success


def test_missing_partitions_are_listed_and_nothing_is_written(output: Path) -> None:
    dataset = unfinished(output)
    for index in (1, 3):
        shutil.rmtree(output / f"data/000/{index:05d}")
    with pytest.raises(Incomplete) as gap:
        finalize(dataset)
    assert gap.value.missing == [1, 3]
    assert root_files(output) == {}
    assert leftovers(output) == []


def test_too_many_failures_leave_no_success(output: Path) -> None:
    dataset = unfinished(output)
    with pytest.raises(Unbalanced, match="6 of 20 samples failed, more than max_failed_fraction=0.2 allows"):
        finalize(dataset, 0.2)
    assert root_files(output) == {}


def test_a_record_of_another_plan_does_not_count(output: Path) -> None:
    dataset = unfinished(output)
    place = output / "data/000/00001/record.json"
    record = dataset.record(1) or {}
    place.write_bytes(storage.seal({**record, "plan": "0" * 32}))
    with pytest.raises(StorageError, match="00001 was made for another plan: run stage=repair on"):
        finalize(dataset)
    place.write_bytes(storage.seal({**record, "partition": 2}))
    with pytest.raises(StorageError, match="was made for another plan"):
        list(records(dataset))


@pytest.mark.parametrize("change", [{"in": 1}, {"kept": 1}, {"failed": -1}, {"in": 1, "kept": 1}])
def test_totals_that_do_not_add_up_are_refused(output: Path, change: dict[str, int]) -> None:
    run(output)
    dataset = Dataset.open(output)
    tally = Tally(dataset)
    for record in records(dataset):
        tally.add(record)
    totals = tally.totals()
    check_balance(dataset, totals, 1.0)
    with pytest.raises(Unbalanced, match="came in, but"):
        check_balance(dataset, {name: value + change.get(name, 0) for name, value in totals.items()}, 1.0)


def test_the_content_digest_covers_data_and_nothing_of_who_made_it(output: Path, memory: Path) -> None:
    first = run(output)
    second = run(memory / "another", run_id="x", lease=5.0)
    assert first["content_digest"] == second["content_digest"]
    assert first["plans"] != second["plans"]
    assert run(memory / "third", colour="blue")["content_digest"] != first["content_digest"]
    assert run(memory / "fourth", partition_size=5)["content_digest"] != first["content_digest"]


def test_the_manifest_lists_every_file_with_its_hash(output: Path) -> None:
    run(output)
    listed = {
        f"{row['path']}/{file['name']}": (file["bytes"], file["xxh3"])
        for row in pq.read_table(output / "manifest.parquet").to_pylist()
        for file in row["files"]
    }
    assert listed == {path: (len(data), storage.digest(data)) for path, data in committed(output).items()}


def test_the_manifest_says_what_it_was_made_with(output: Path) -> None:
    run(output, colour="blue")
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["config"]["colour"] == "blue"
    assert {"python", "numpy", "pyarrow"} <= manifest["software"].keys()
    assert manifest["counts"]["in"] == 20


# ---- several who finish, some of them asleep


def asleep_at(monkeypatch: pytest.MonkeyPatch, operation: str, end: str, meanwhile: Callable[[], Any]) -> list[int]:
    """At the first ``operation`` on a path that ends so, ``meanwhile`` happens before it goes on."""
    slept: list[int] = []

    def interpose(what: str, path: str, do: Callable[[], Any]) -> Any:
        if what == operation and path.endswith(end) and not slept:
            slept.append(1)
            meanwhile()
        return do()

    monkeypatch.setattr(storage, "interpose", interpose)
    return slept


POINTS = [("create", "/manifest.parquet"), ("create", "/_SUCCESS"), *(("rename", f"/output/{n}") for n in ROOT_FILES)]


@pytest.mark.parametrize(("operation", "end"), POINTS)
def test_who_slept_through_a_later_generation_replaces_nothing(
    output: Path, monkeypatch: pytest.MonkeyPatch, operation: str, end: str
) -> None:
    dataset = unfinished(output)
    after: dict[str, bytes] = {}

    def meanwhile() -> None:
        run(output)
        run(output, retry_failed=True)
        after.update(root_files(output))

    slept = asleep_at(monkeypatch, operation, end, meanwhile)
    with pytest.raises(Overtaken):
        finalize(dataset)
    monkeypatch.setattr(storage, "interpose", None)
    assert slept
    assert root_files(output) == after
    assert_sound(output)
    assert leftovers(output) == []


@pytest.mark.parametrize(("operation", "end"), POINTS)
def test_who_slept_while_another_finished_replaces_nothing(
    output: Path, monkeypatch: pytest.MonkeyPatch, operation: str, end: str
) -> None:
    dataset = unfinished(output)
    other = {"latentmill": "another version"}
    after: dict[str, bytes] = {}

    def meanwhile() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.partitions.finalize.software", lambda: other)
            finalize(Dataset.open(output))
        after.update(root_files(output))

    slept = asleep_at(monkeypatch, operation, end, meanwhile)
    with suppress(Overtaken):
        finalize(dataset)
    monkeypatch.setattr(storage, "interpose", None)
    assert slept
    assert root_files(output) == after
    assert_sound(output)


def test_a_worker_whose_finish_was_overtaken_looks_again(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(output)
    slept = asleep_at(monkeypatch, "rename", "/output/index.json", lambda: finalize(Dataset.open(output)))
    success = run(output)
    assert slept
    assert success == assert_sound(output)


# ---- what a worker does when it was wrong about what is there


def worker(output: Path) -> Worker:
    stage = make(output)
    dataset = open_or_plan(stage)
    return Worker(stage, dataset, Events(dataset.root, stage.rank))


def test_a_bucket_that_was_called_full_by_mistake_is_worked_on(output: Path) -> None:
    one = worker(output)
    (output / "claims/000.0.full").write_bytes(b"")
    one.work()
    assert one.finish()["counts"]["in"] == 20
    one.close()
    assert_sound(output)


def test_a_slot_without_a_record_is_an_error_and_not_an_endless_loop(output: Path) -> None:
    unfinished(output)
    (output / "data/000/00002/record.json").unlink()
    with pytest.raises(StorageError, match=r"00002 has no record: run stage=repair on"):
        run(output)


def test_a_bucket_that_is_gone_is_an_error_and_not_an_endless_loop(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(output)
    shutil.rmtree(output / "data/000")
    monkeypatch.setattr(Worker, "_sleep", lambda self, seconds: None)
    with pytest.raises(StorageError, match="data/000 is missing, although it is in the plan"):
        run(output)


def test_too_many_failures_stop_a_rank_early(output: Path) -> None:
    class Failing(Fake):
        done = 0

        def process(self, partition: Any, context: Any) -> Any:
            Failing.done += 1
            return super().process(partition, context)

    with pytest.raises(Unbalanced, match="of this rank failed, more than max_failed_fraction=0.1 allows"):
        run(output, Failing, count=40_000, partition_size=5_000, max_failed_fraction=0.1)
    assert Failing.done == 2
