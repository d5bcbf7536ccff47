"""How well stages used what they were given, by their events and by SLURM's accounting; and what to ask for next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from recorded import event, plan, write_events

from launch.monitor import accounting
from launch.monitor.accounting import Accounting, JobUse
from launch.monitor.queue import Queue
from launch.monitor.status_table import render
from launch.monitor.watch import Watch
from pipeline.telemetry.efficiency import Efficiency, efficiency
from pipeline.telemetry.events import Process
from pipeline.telemetry.process_stats import asked

GB = 10**9


def ended(rank: int, begin: float, end: float, **values: Any) -> Process:
    process = Process()
    process.add(event("finish", rank, 2, begin, end, 1, **{"cpus": 4, "node_memory": 16 * GB, "job": "7", **values}))
    return process


def test_lives_add_up_and_waiting_in_a_queue_between_them_does_not_count() -> None:
    lives = [ended(rank, begin, begin + 100, cpu=300.0, waited=25.0) for rank in range(2) for begin in (0, 1000)]
    found = efficiency(lives)
    assert found is not None
    assert (found.elapsed, found.ranks, found.cpu_seconds, found.cpus) == (200.0, 2, 1200.0, 4)
    assert found.cpu == pytest.approx(1200 / (400 * 4)) and found.waited == pytest.approx(0.25)


def test_memory_is_that_of_a_node_with_all_its_ranks() -> None:
    ranks = [ended(rank, 0, 100, host=f"node{rank // 2}", peak=(rank + 1) * GB) for rank in range(4)]
    found = efficiency([*ranks, ended(0, 200, 300, host="node0", peak=4 * GB, life="1")])
    assert found is not None
    assert (found.memory, found.node_memory, found.node_memory_asked) == (4 * GB, 7 * GB, 16 * GB)


def test_use_of_gpus_is_the_mean_over_their_lives() -> None:
    ranks = [ended(rank, 0, 100, gpu={"use": 0.0, "memory": 1, "mean": mean}) for rank, mean in enumerate((0.5, 0.75))]
    found = efficiency([*ranks, ended(2, 0, 100)])
    assert found is not None and found.gpu == 0.625
    assert efficiency([]) is None


@pytest.mark.parametrize(
    ("values", "elapsed", "advice"),
    [
        ({"cpu": 40.0, "peak": 2 * GB}, 600, {"cpus_per_task": "1", "mem": "5G", "time": "00:20:00"}),
        ({"cpu": 1200.0, "peak": 2 * GB}, 600, {"cpus_per_task": "3", "mem": "5G", "time": "00:20:00"}),
        ({"cpu": 2300.0, "peak": 5 * GB}, 600, {"time": "00:20:00"}),
        ({"cpu": 2300.0, "peak": 8 * GB}, 7000, {"cpus_per_task": "1", "mem": "20G", "time": "03:00:00"}),
        ({"cpu": 40.0, "peak": 8 * GB}, 30, {}),
        ({"cpu": 40.0, "peak": 8 * GB, "job": None}, 600, {}),
    ],
)
def test_advice_is_what_was_used_with_some_to_spare(
    values: dict[str, Any], elapsed: float, advice: dict[str, str]
) -> None:
    found = efficiency([ended(rank, 0, elapsed, host="a", **values) for rank in range(2)])
    assert found is not None and found.advice == advice


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_STEP_ID": "0"}, {"cpus": 1, "node_ranks": 4}),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "8", "SLURM_MEM_PER_NODE": "2048"},
         {"cpus": 8, "node_ranks": 4, "node_memory": 2**31}),
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_CPU": "512"}, {"cpus": 2, "node_ranks": 4, "node_memory": 2**32}),
        ({}, {"cpus": max(1, len(os.sched_getaffinity(0)) // 4), "node_ranks": 4}),
    ],
)  # fmt: skip
def test_events_say_what_a_rank_was_given(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: dict[str, int]
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert asked(4) == expected


# ---- accounting

SACCT = """\
1|COMPLETED|5|00:02.379|8|4G||2
1.batch|COMPLETED|5|00:00.046|4||19044K|1
1.0|COMPLETED|5|00:02.333|8||111604K|2
2|PREEMPTED|9|1-00:00:04|8|2Gc||2
2|COMPLETED|11|01:00:04.5|8|4Gn||2
2.0|COMPLETED|9|00:04.533|8||1.5G|2
3|RUNNING|9|00:00:00|1|0||1
odd
"""  # as SLURM 22.05 printed it, with an older version's ReqMem


def test_accounting_is_read_as_sacct_prints_it() -> None:
    uses = accounting.parse(SACCT)
    assert uses["1"] == JobUse(True, 5.0, 2.379, 40.0, 111604 * 1024, 2 * 2**30)
    two = uses["2"]
    assert (two.elapsed, two.cpu_seconds, two.cpu_seconds_given) == (20.0, 86404 + 3604.5, 160.0)
    assert (two.memory, two.asked, two.over) == (int(1.5 * 2**30), 4 * 2**30, True)
    assert not uses["3"].over


def test_what_accounting_has_seen_of_killed_processes_counts() -> None:
    found = Efficiency(100.0, 2, 10.0, 4, 0.1, memory=GB, node_memory=GB)
    known = Accounting(
        {"7": JobUse(True, 120.0, 700.0, 960.0, 3 * GB, 4 * GB), "8": JobUse(over=False)}, available=True
    )
    better = known.refined(found, ["7"])
    assert (better.elapsed, better.cpu_seconds, better.memory, better.source) == (120.0, 700.0, 3 * GB, "sacct")
    assert better.cpu == pytest.approx(700 / 960) and better.advice == {"time": "00:10:00"}
    assert known.refined(found, ["8"]) == found == known.refined(found, [])


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that says what ``answer`` holds, and counts how often it was asked."""
    answer = tmp_path / "answer"
    program = tmp_path / "bin/sacct"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n. {answer}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(Queue, "refresh", lambda queue, *_: None)
    return answer


def finished_stage(folder: Path, name: str, job: str) -> None:
    output = folder / name
    plan(output, 2, stage="filter")
    values = {"cpus": 4, "job": job, "cpu": 30.0, "node_memory": 16 * GB}
    for rank in range(2):
        write_events(output, [event("finish", rank, 2, 0.0, 600.0, 1, **values)])


def test_status_tells_what_a_stage_took_and_what_to_ask_for(tmp_path: Path, sacct: Path) -> None:
    from rich.console import Console

    finished_stage(tmp_path / "d", "filter", "7")
    sacct.write_text("echo '7|COMPLETED|700|00:05:00|8|8G||2'\necho '7.0|COMPLETED|700|00:05:00|8||1048576K|2'\n")
    watch = Watch(tmp_path / "d")
    (stage,) = watch.look().stages
    assert stage.efficiency is not None and stage.efficiency.source == "sacct"
    console = Console(width=200, record=True)
    console.print(render(watch.look(), 5))
    said = console.export_text()
    assert "filter: took 11 min with 2 ranks, CPU 5% of 4 for each rank" in said
    assert "next time: cpus_per_task=1" in said and "time=00:30:00" in said
    assert watch.look().as_dict()["stages"][0]["efficiency"]["elapsed"] == 700
    for _ in range(5):
        watch.look()
    assert len((tmp_path / "asked").read_text().splitlines()) == 1  # it is over: nothing will change


def test_a_job_that_did_several_stages_is_told_of_by_events(tmp_path: Path, sacct: Path) -> None:
    for name in ("filter", "filter-b"):
        finished_stage(tmp_path / "d", name, "7")
    sacct.write_text("echo '7|COMPLETED|700|00:05:00|8|8G||2'\n")
    for stage in Watch(tmp_path / "d").look().stages:
        assert stage.efficiency is not None and stage.efficiency.source == "events"


@pytest.mark.parametrize(
    ("answer", "problem", "asked_again"),
    [
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", "", False),
        ("echo 'Connection refused' >&2; exit 1", "sacct: Connection refused", True),
        ("exec sleep 9", "sacct: sacct: socket timed out", True),
        ("echo '7|RUNNING|7|00:05:00|8|8G||2'", "", True),
    ],
)
def test_without_an_answer_events_tell(
    tmp_path: Path, sacct: Path, monkeypatch: pytest.MonkeyPatch, answer: str, problem: str, asked_again: bool
) -> None:
    monkeypatch.setattr(accounting, "_SECONDS", 0.3)
    finished_stage(tmp_path / "d", "filter", "7")
    sacct.write_text(answer + "\n")
    watch = Watch(tmp_path / "d")
    snapshot = watch.look()
    assert snapshot.slurm == problem
    assert snapshot.stages[0].efficiency is not None and snapshot.stages[0].efficiency.source == "events"
    watch._accounting._next = 0.0
    watch.look()
    assert len((tmp_path / "asked").read_text().splitlines()) == 1 + asked_again
