"""Event files of past lives: few stay, and what they say stays the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from recorded import event, write_events

from pipeline.distributed import Rank
from pipeline.storage import Folder
from pipeline.telemetry import events as telemetry
from pipeline.telemetry.efficiency import efficiency
from pipeline.telemetry.events import EventReader, Events, fold

NOW = 1e9


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "12")


def write_life(output: Path, life: int, last: str = "stop", **values: Any) -> Path:
    """A process of rank 0 that committed ten partitions."""
    begin = NOW + 1000 * life
    values = {"job": "7", "life": str(life), "pid": life, **values}
    lines = [event("commit", 0, 1, begin, begin + 50 * n, n, **values) for n in range(10)]
    return write_events(output, [*lines, event(last, 0, 1, begin, begin + 500, 10, **values)], f"p{life}")


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("events/*/*"))


def told(output: Path) -> tuple[object, ...]:
    with Folder.open(output) as root:
        processes = EventReader(root).refresh()
        drawn = EventReader(root, past=True).refresh()
    assert len(drawn) == len(processes)
    samples = sum(process.last["totals"]["in"] for process in processes)
    return len(processes), samples, efficiency(processes), max(len(process.points) for process in drawn) > 5


@pytest.mark.parametrize("last", ["stop", "commit"], ids=["stopped", "killed"])
def test_processes_of_earlier_lives_are_folded_into_one_file(tmp_path: Path, last: str) -> None:
    output = tmp_path / "out"
    for life in range(12):
        write_life(output, life, last)
    before = told(output)
    with Folder.open(output) as root:
        fold(root, "events/000", 0)
        assert len(names(output)) == 1 and names(output)[0].endswith(".past.jsonl")
        assert told(output) == before
        for life in range(12, 15):  # further lives: one folded file and those that are new
            write_life(output, life)
        before = told(output)
        fold(root, "events/000", 0)
    assert len(names(output)) == 1
    assert told(output) == before


def test_what_still_runs_and_other_ranks_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(telemetry.time, "time", lambda: NOW)
    for life in range(5):
        write_life(output, life)
    live = write_events(output, [event("commit", 0, 1, NOW - 9, NOW - 1, 1, job="8", life="0")], "live")
    other = write_events(output, [event("finish", 1, 2, NOW - 9, NOW - 1, 1)], "other")
    with Folder.open(output) as root:
        fold(root, "events/000", 0)
    assert {live.name, other.name} < set(names(output)) and len(names(output)) == 3


def test_a_process_that_was_folded_though_it_lives_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank of a node that SLURM had given up goes on writing while its replacement runs."""
    output = tmp_path / "out"
    begin = NOW + 4000
    monkeypatch.setattr(telemetry.time, "time", lambda: begin + 600)
    for life in range(5):
        write_life(output, life, "commit")
    with Folder.open(output) as root:
        watching = EventReader(root)
        watching.refresh()
        fold(root, "events/000", 0)
        write_events(output, [event("commit", 0, 1, begin, begin + 600, 12, job="7", life="4", pid=4)], "p4")
        for reader in (watching, EventReader(root)):
            processes = reader.refresh()
            assert len(processes) == 5
            assert sum(process.last["totals"]["partitions"] for process in processes) == 4 * 10 + 12


def test_two_ranks_that_fold_at_once_lose_and_repeat_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    for life in range(6):
        write_life(output, life)
    before = told(output)
    with Folder.open(output) as root:
        write = Folder.write_atomic

        def write_after_another(folder: Folder, name: str, data: bytes) -> None:
            monkeypatch.setattr(Folder, "write_atomic", write)
            fold(root, "events/000", 0)
            write(folder, name, data)

        monkeypatch.setattr(Folder, "write_atomic", write_after_another)
        fold(root, "events/000", 0)
    assert len(names(output)) == 2
    assert told(output) == before


def test_a_file_of_very_many_lives_keeps_the_last_word_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_MOST_BYTES", 20_000)
    output = tmp_path / "out"
    for life in range(12):
        write_life(output, life)
    before = told(output)
    with Folder.open(output) as root:
        fold(root, "events/000", 0)
    assert told(output)[:3] == before[:3]
    (path,) = output.glob("events/*/*")
    assert len(path.read_text().splitlines()) == 12


def test_a_rank_folds_the_files_of_its_earlier_lives_while_it_works(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for life in range(12):
        write_life(output, life)
    with Folder.open(output) as root:
        events = Events(root, Rank(), beat=0.02)
        with events.around():
            end = time.monotonic() + 20
            while len(names(output)) > 2 and time.monotonic() < end:
                time.sleep(0.02)
        assert len(names(output)) == 2
        assert {len(EventReader(root).refresh()), len(EventReader(root, past=True).refresh())} == {13}
