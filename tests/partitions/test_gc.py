"""gc deletes what counts for nothing, whatever else is going on, and nothing more."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stage import assert_sound, committed, leftovers, make, run

from pipeline import storage
from pipeline.config.schema import GcConfig
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.gc import collect
from pipeline.partitions.planning import open_or_plan
from pipeline.stages import gc
from pipeline.stages.repair import repair

UUID = "0123456789abcdef" * 2


@pytest.fixture
def output(memory: Path) -> Path:
    return memory / "output"


def everything(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*")}


def test_a_sound_output_loses_nothing(output: Path) -> None:
    run(output)
    run(output, retry_failed=True)
    before = everything(output)
    assert list(collect(Dataset.open(output), 0.0)) == []
    assert everything(output) == before


def test_the_stage_says_what_it_deleted_and_why_nothing(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(output)
    attempt = output / f"data/000/.00001.{UUID}"
    attempt.mkdir()
    assert gc.main(GcConfig(input=str(output), older_than=3600.0)) == 0
    why = "no leftovers are older than older_than=3600 seconds"
    assert capsys.readouterr().out == f"{output}: 0 deleted: {why}\n"
    assert gc.main(GcConfig(input=str(output), older_than=0.0)) == 0
    assert capsys.readouterr().out == f"deleted {attempt}\n{output}: 1 deleted\n"
    assert not attempt.exists()


@pytest.mark.parametrize(
    "name",
    [f".plan.{UUID}", f".plan.1.{UUID}", f".final.{UUID}", f".trash.{UUID}", f".manifest.json.{UUID}", f".probe.{UUID}",
     f"data/000/.00001.{UUID}", f"data/000/.00001.2.{UUID}", f"data/000/.trash.{UUID}",
     f"../.trash.{UUID}", f"../.output.{UUID}"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["empty", "full", "file"])
def test_what_crashed_processes_leave_is_deleted(output: Path, name: str, kind: str) -> None:
    run(output)
    before = everything(output)
    place = output / name
    if kind == "file":
        place.write_bytes(b"x")
    else:
        place.mkdir()
        if kind == "full":
            (place / "deep").mkdir()
            (place / "deep" / "file").write_bytes(b"x")
    found = [path.name for path in collect(Dataset.open(output), 0.0)]
    assert found == [place.name]
    assert not place.exists()
    assert everything(output) == before


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "data/000/.keep", "data/000/99999", f"../.other.{UUID}", "../x"]
)
def test_what_is_not_ours_stays(output: Path, name: str) -> None:
    run(output)
    (output / name).write_bytes(b"x")
    assert list(collect(Dataset.open(output), 0.0)) == []
    assert (output / name).exists()


def test_what_changed_lately_stays(output: Path) -> None:
    run(output)
    place = output / f"data/000/.00001.{UUID}"
    place.mkdir()
    (place / "file").write_bytes(b"x")
    old = time.time() - 1000
    os.utime(place, (old, old))
    assert list(collect(Dataset.open(output), 500.0)) == []
    os.utime(place / "file", (old, old))
    assert len(list(collect(Dataset.open(output), 500.0))) == 1


def test_replaced_partitions_are_deleted_and_those_that_count_stay(output: Path) -> None:
    run(output)
    for _ in range(2):
        for path in output.glob("data/000/00001*/ledger.parquet"):
            path.write_bytes(b"x")
        repair(output, Rank())
    assert {path.name for path in collect(Dataset.open(output), 0.0)} == {"00001", "00001.1"}
    assert_sound(output)


def test_a_gc_that_slept_through_a_repair_does_not_take_its_result(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows that 00001 was done again once, and finds a slot of a repair that it has never heard of."""
    run(output)
    (output / "data/000/00001/ledger.parquet").write_bytes(b"x")
    repair(output, Rank())
    known = Dataset.open(output)
    (output / "data/000/00001.1/ledger.parquet").write_bytes(b"x")
    repair(output, Rank())
    assert {path.name for path in collect(known, 0.0)} == {"00001"}
    assert_sound(output)
    assert leftovers(output) == []


@pytest.mark.parametrize("operation", ["mkdir", "create", "write", "fsync", "listdir", "rename", "write_small", "read"])
def test_gc_at_any_moment_costs_a_worker_no_more_than_another_try(
    output: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Now and then, gc has just taken away all that counts for nothing."""
    run(memory / "reference")
    open_or_plan(make(output))
    count = [0]
    busy: list[int] = []

    def interpose(what: str, path: str, do: Callable[[], Any]) -> Any:
        if not busy and what == operation:
            count[0] += 1
            if count[0] % 7 == 0 and count[0] < 100:
                busy.append(1)
                list(collect(Dataset.open(output), 0.0))
                busy.clear()
        return do()

    monkeypatch.setattr(storage, "interpose", interpose)
    run(output)
    monkeypatch.setattr(storage, "interpose", None)
    assert committed(output) == committed(memory / "reference")
    assert_sound(output)


def test_gc_takes_away_what_an_interrupted_overwrite_left(output: Path, memory: Path) -> None:
    run(output)
    shutil.copytree(output, memory / f".trash.{UUID}")
    assert leftovers(output) == []
