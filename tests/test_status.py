"""launch/status.py: how things stand, told from what ranks leave behind, by few looks at the file system."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import SAMPLES, commit, event, plan, record, write_events

from launch.local import Progress
from launch.monitor import metrics, page, rank_logs, status_table, watch
from launch.monitor.queue import _NO_CLUSTER, Queue
from launch.monitor.watch import StageStatus, Watch, ranges
from launch.request import read
from launch.submit import jobs_of
from pipeline import storage
from pipeline.config.schema import ConfigError
from pipeline.telemetry import events as telemetry

ROOT = Path(__file__).resolve().parent.parent
STATUS = [sys.executable, str(ROOT / "launch/status.py")]
NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The time that readers see; call it to let some pass. No SLURM is there unless a test brings one."""
    passed = [0.0]
    start = time.monotonic()
    for module in (watch, telemetry):
        fake = type("Clock", (), {"time": lambda: NOW + passed[0], "monotonic": lambda: start + passed[0]})
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(Queue, "__init__", _no_slurm(Queue.__init__))

    def let_pass(seconds: float) -> None:
        passed[0] += seconds

    return let_pass


def _no_slurm(init: Callable[..., None]) -> Callable[..., None]:
    def changed(self: Queue, folder: Path) -> None:
        init(self, folder)
        self.available = False

    return changed


def look(folder: Path, **options: Any) -> StageStatus:
    (stage,) = Watch(folder, **options).look().stages
    return stage


def program(*arguments: object, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/nowhere"} if path is None else {"PATH": path}
    return subprocess.run(
        [*STATUS, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


# ---- few operations


class Operations:
    """Counts what goes through pipeline.storage: all that status does with a dataset directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str]] = []
        monkeypatch.setattr(storage, "interpose", self._note)

    def _note(self, operation: str, path: str, do: Callable[[], Any]) -> Any:
        self.seen.append((operation, path))
        return do()

    def since(self) -> Counter[str]:
        """Operations since the last call, by kind and part of the directory."""
        part = re.compile(r".*/filter(/(events|data|claims|plan))?.*")
        seen, self.seen = self.seen, []
        return Counter(f"{operation} {(part.sub(lambda m: m[2] or 'root', path))}" for operation, path in seen)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 ranks have done half of 100,000 partitions."""
    output = tmp_path_factory.mktemp("large") / "filter"
    record(output, 1000, 100_000, NOW)
    return output


def test_a_thousand_ranks_and_a_hundred_thousand_partitions_take_few_operations(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = Operations(monkeypatch)
    looking = Watch(large)
    (stage,) = looking.look().stages
    assert (stage.done, stage.total, stage.states) == (50_000, 100_000, {"running": 1000})
    assert stage.samples == 50_000 * SAMPLES and stage.dropped == stage.samples // 10
    first = operations.since()
    assert first["read events"] == 1000 and sum(first.values()) < 1300

    for rank in range(10):
        write_events(large, [event("finish", rank, 1000, NOW - 1000, NOW, 60)], process="a")
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(telemetry.json, "loads", lambda line: parsed.append(line) or loads(line))
    (stage,) = looking.look().stages
    assert stage.states == {"running": 990, "finished": 10}
    second = operations.since()
    assert second.pop("read events") == 1000
    assert second.pop("listdir data") == second.pop("open data") == 100
    assert sum(second.values()) < 10, second
    assert len([line for line in parsed if b"finish" in line]) == 10 and len(parsed) < 20

    looking.look()
    assert operations.since()["read events"] == 990  # who has ended is not asked again


def test_finished_stages_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fake_stage

    from pipeline.registry import Registered, stages

    monkeypatch.setitem(stages.added, "fake", Registered(fake_stage.Fake, fake_stage.FakeConfig))
    fake_stage.run(tmp_path / "filter")
    operations = Operations(monkeypatch)
    looking = Watch(tmp_path)
    (stage,) = looking.look().stages
    assert (stage.state, stage.done, stage.total) == ("finished", 5, 5)
    assert (stage.samples, stage.kept, stage.dropped, stage.failed) == (20, 12, 2, 6)
    assert stage.reasons == {"dropped:small": 2, "failed:broken": 2, "failed:busy": 4}
    operations.since()
    looking.look()
    assert not any("data" in name or "read" in name for name in operations.since())


def test_partitions_that_are_to_be_done_again_count_when_they_are(tmp_path: Path) -> None:
    from pipeline.partitions.plan import commit_plan
    from pipeline.storage import Folder

    output = tmp_path / "filter"
    plan(output, 10)
    commit(output, range(10))
    looking = Watch(tmp_path)
    assert looking.look().stages[0].done == 10
    header = {"generation": 1, "first": 10, "kind": "repair", "redo": [2, 3], "stage": "filter"}
    with Folder.open(output) as root:
        assert commit_plan(root, header, ())
    assert looking.look().stages[0].done == 8
    (output / "data/000/00003.1").mkdir()
    assert looking.look().stages[0].done == 9


def test_buckets_are_listed_in_turns_until_they_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LISTINGS", 2)
    output = tmp_path / "filter"
    plan(output, 4500)
    commit(output, range(1500))
    commit(output, range(3000, 3100))
    (output / "claims").mkdir()
    looking, operations = Watch(tmp_path), Operations(monkeypatch)
    assert looking.look().stages[0].done == 1600
    (output / "claims/001.0.full").touch()
    commit(output, range(1500, 2000))
    commit(output, range(2000, 2010))
    commit(output, range(3100, 3110))
    commit(output, range(4000, 4010))
    operations.seen.clear()
    assert [looking.look().stages[0].done for _ in range(2)] == [2120, 2130]
    listed = [path[-3:] for operation, path in operations.seen if operation == "listdir" and "/data/" in path]
    assert listed == ["002", "003", "004", "002"]


def test_what_was_replaced_by_another_output_is_found_again(tmp_path: Path) -> None:
    plan(tmp_path / "filter", 10)
    looking = Watch(tmp_path)
    assert looking.look().stages[0].total == 10
    (tmp_path / "filter").rename(tmp_path / ".old")
    plan(tmp_path / "filter", 20)
    looking.look()
    assert [stage.total for stage in looking.look().stages] == [20]


# ---- ranks


def write(output: Path, *events: dict[str, Any]) -> StageStatus:
    plan(output, 100)
    for one in events:
        write_events(output, [one])
    return look(output)


@pytest.mark.parametrize(
    ("last", "state", "note"),
    [
        (event("beat", 0, 1, NOW - 100, NOW - 5, 1), "running", ""),
        (event("beat", 0, 1, NOW - 100, NOW - 5, 1, partition=-1), "waiting", ""),
        (event("beat", 0, 1, NOW - 900, NOW - 400, 1), "silent", "no sign of life for 6 min at partition 0: killed"),
        (event("beat", 0, 1, NOW - 900, NOW - 5, 1, still=400), "stuck", "no progress for 6 min at partition 0"),
        (event("finish", 0, 1, NOW - 900, NOW - 400, 1), "finished", ""),
        (event("stop", 0, 1, NOW - 900, NOW - 400, 1), "stopped", ""),
        (event("error", 0, 1, NOW - 900, NOW - 400, 1, error="OSError: full"), "failed", "OSError: full"),
        (event("hang", 0, 1, NOW - 900, NOW - 400, 1, seconds=300), "hung", "no progress for 5 min at partition 0"),
    ],
)
def test_the_state_of_a_rank(last: dict[str, Any], state: str, note: str, tmp_path: Path) -> None:
    stage = write(tmp_path / "filter", last)
    assert stage.ranks[0].state == state
    assert stage.ranks[0].note.startswith(note)
    assert bool(stage.problems) == bool(note)


def test_a_rank_far_below_the_others_is_called_slow(tmp_path: Path) -> None:
    ranks = [event("beat", rank, 5, NOW - 200, NOW, 1 if rank == 3 else 10) for rank in range(5)]
    stage = write(tmp_path / "filter", *ranks)
    assert stage.states == {"running": 4, "slow": 1}
    assert stage.problems == ["rank 3 on node0 slow: 5 samples/s, the median is 50"]


def test_speed_and_what_is_left_are_those_of_the_last_minutes(tmp_path: Path) -> None:
    output = tmp_path / "filter"
    plan(output, 100)
    slow = [event("commit", 0, 1, NOW - 4000, NOW - 4000 + 100 * k, k // 10) for k in range(1, 34)]
    fast = [event("commit", 0, 1, NOW - 4000, NOW - 700 + 100 * k, 3 + 3 * k) for k in range(1, 8)]
    write_events(output, [event("start", 0, 1, NOW - 4000, NOW - 4000, 0), *slow, *fast])
    commit(output, range(24))
    stage = look(output)
    assert stage.rate == pytest.approx(3 * SAMPLES / 100)
    assert stage.eta == pytest.approx((100 - 24) * SAMPLES / stage.rate)


def test_only_the_newest_run_has_ranks_but_all_count(tmp_path: Path) -> None:
    before = [event("beat", rank, 8, NOW - 9000, NOW - 8000, 2) for rank in range(8)]
    again = [event("beat", rank, 2, NOW - 900, NOW - 5, 3) for rank in range(2)]
    stage = write(tmp_path / "filter", *before, event("stop", 0, 2, NOW - 5000, NOW - 4000, 1), *again)
    assert (stage.world_size, stage.states) == (2, {"running": 2})
    assert stage.samples == (8 * 2 + 1 + 2 * 3) * SAMPLES


@pytest.mark.parametrize(
    ("name", "at", "samples"), [("beat", NOW - 5, 730), ("beat", NOW - 900, 500), ("stop", NOW, 500)]
)
def test_of_an_attempt_that_ended_no_samples_count(name: str, at: float, samples: int, tmp_path: Path) -> None:
    """Whoever resumes goes through them again."""
    totals = {"partitions": 1, "in": 500}
    stage = write(tmp_path / "filter", event(name, 0, 1, NOW - 1000, at, 1, done=730, totals=totals))
    assert stage.samples == samples


def test_the_line_of_a_local_run_counts_what_earlier_runs_have_finished(tmp_path: Path) -> None:
    (job,) = jobs_of(*_request(tmp_path, "stage=download", "dataset=shapes"))
    assert job.output is not None
    progress = Progress(job)
    of = {"partitions": 16, "generation": 0}
    for done, begin in ((12, time.time() - 900), (1, time.time() + 1)):
        write_events(job.output, [event("commit", 0, 1, begin, time.time(), done) | of])
    assert progress.line().startswith("download: 13/16 partitions, 12 of them before, ")


def test_many_ranks_in_the_same_trouble_are_one_line(tmp_path: Path) -> None:
    stage = write(tmp_path / "filter", *(event("beat", r, 9, NOW - 900, NOW - 90, 1) for r in (0, 1, 2, 5, 7, 8)))
    assert stage.state == "silent"
    (said,) = stage.problems
    assert said.startswith("6 ranks silent: 0-2,5,7-8; rank 0 on node0: no sign of life for 90 s")
    assert ranges([3]) == "3"


def test_a_training_run_counts_steps(tmp_path: Path) -> None:
    (tmp_path / "runs/diffuse/checkpoints").mkdir(parents=True)
    facts = {"step": 250, "of": 1000, "loss": 0.25, "batch": 16, "done": 4000, "partition": None}
    for rank in range(2):
        write_events(tmp_path / "runs/diffuse", [event("beat", rank, 2, NOW - 100, NOW, 0, **facts)])
    stage = look(tmp_path)
    assert (stage.name, stage.state, stage.done, stage.total) == ("runs/diffuse", "running", 250, 1000)
    assert (stage.loss, stage.rate, stage.eta) == (0.25, 80.0, 300.0)


def test_a_finished_training_run_says_what_it_used_and_what_to_ask_for(tmp_path: Path) -> None:
    (tmp_path / "runs/diffuse/checkpoints").mkdir(parents=True)
    facts = {
        "step": 1000,
        "of": 1000,
        "cpu": 600.0,
        "cpus": 4,
        "node_memory": 16 * 10**9,
        "job": "7",
        "partition": None,
    }
    for rank in range(2):
        used = {**facts, "gpu": {"use": 0.9, "memory": 10**9, "mean": 0.75}}
        write_events(tmp_path / "runs/diffuse", [event("finish", rank, 2, NOW - 600, NOW, 0, **used)])
    from rich.console import Console

    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status_table.render(Watch(tmp_path).look(), 0))
    said = console.export_text()
    assert "runs/diffuse: took 10 min with 2 ranks, CPU 25% of 4 for each rank, GPU 75%, waited 25%" in said, said
    assert "memory 4.0 GB a node of 16.0 GB asked; next time: cpus_per_task=2 mem=5G time=00:20:00" in said


def test_the_line_of_a_local_training_counts_to_what_epochs_come_to(tmp_path: Path) -> None:
    (job,) = jobs_of(*_request(tmp_path, "stage=train", "dataset=digits", "epochs=4"))
    assert job.output is not None
    (job.output / "logs").mkdir(parents=True)
    (job.output / "logs/life.jsonl").write_text(json.dumps({"time": NOW, "step": 1080, "loss": 0.5}) + "\n")
    assert Progress(job).line() == "train: step 1080/1000, loss 0.5000"  # as long as no rank has said more
    for of, at in ((900, NOW - 50), (1440, NOW)):  # an earlier life had less to do
        write_events(job.output, [event("beat", of, 1, NOW - 100, at, 0, step=1080, of=of)])
    assert Progress(job).line() == "train: step 1080/1440, loss 0.5000"


def _request(tmp_path: Path, *arguments: str) -> tuple[Any, ...]:
    launch = read([f"data_dir={tmp_path}", *arguments])
    return launch.config, launch.settings, launch.requests


# ---- reading events


def test_the_past_is_read_too_where_it_is_wanted(tmp_path: Path) -> None:
    output = tmp_path / "filter"
    plan(output, 10_000)
    many = [event("beat", 0, 1, NOW - 20_000, NOW - 20_000 + 10 * k, k) for k in range(2000)]
    write_events(output, many)
    processes = {}
    for past in (False, True):
        looking = Watch(output, past=past)
        looking.look()
        (processes[past],) = looking.works[output].processes
    assert processes[False].last == processes[True].last == many[-1]
    assert processes[False].points[0][telemetry.TIME] > NOW - 1000
    first, *_, last = processes[True].points
    assert first[telemetry.TIME] < NOW - 19_000 and last[telemetry.DONE] == 1999 * SAMPLES
    assert 20 < len(processes[True].points) <= telemetry._MOST_POINTS


def test_lines_that_are_half_written_or_damaged_are_left_out(tmp_path: Path) -> None:
    output = tmp_path / "filter"
    plan(output, 10)
    path = write_events(output, [event("commit", 0, 1, NOW - 50, NOW - 20, 1)])
    with path.open("ab") as file:
        file.write(b'\0\0\0\n[1]\n{"event": "beat"}\n')
        whole = json.dumps(event("commit", 0, 1, NOW - 50, NOW - 10, 2)).encode() + b"\n"
        file.write(whole[:40])
    looking = Watch(output)
    assert looking.look().stages[0].ranks[0].partitions == 1
    with path.open("ab") as file:
        file.write(whole[40:])
    assert looking.look().stages[0].ranks[0].partitions == 2


def test_who_is_long_dead_is_looked_at_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    output = tmp_path / "filter"
    plan(output, 10)
    write_events(output, [event("beat", 0, 1, NOW - 9000, NOW - 8000, 1)])
    looking, operations = Watch(output), Operations(monkeypatch)
    reads = []
    for seconds in (0, 10, 30, 30):
        clock(seconds)
        looking.look()
        reads.append(operations.since()["read events"])
    assert reads == [1, 0, 0, 1]


# ---- plots


def test_the_speed_of_ranks_at_work_does_not_fall_at_the_right_edge(tmp_path: Path) -> None:
    """The last heartbeat is some seconds old at any time."""
    output = tmp_path / "filter"
    plan(output, 100)
    write_events(output, [event("beat", 0, 1, NOW - 100, NOW - 100 + 10 * k, k) for k in range(10)])  # until NOW - 10
    watching = Watch(output, past=True)
    watching.look()
    processes = next(iter(watching.works.values())).processes
    speed = page._slope(processes, np.linspace(NOW - 100, NOW, 50), telemetry.DONE)
    assert speed[-10:].min() > 0.9 * SAMPLES / 10
    processes[0].ended = processes[0].last
    assert page._slope(processes, np.linspace(NOW - 100, NOW + 20, 50), telemetry.DONE)[-1] == 0


# ---- clocks and jobs that differ


def test_a_node_whose_clock_is_an_hour_behind_is_not_silent(tmp_path: Path) -> None:
    """How long ago a rank wrote is recognized by the file server, which dates all files by the same clock."""
    output = tmp_path / "filter"
    plan(output, 10)
    for rank, late in ((0, 0), (1, 3600), (2, -3600)):
        lines = [event("beat", rank, 3, NOW - 50 - late, NOW - 5 - late, 1)]
        path = write_events(output, lines)
        os.utime(path, (NOW - 5, NOW - 5))
    status = look(output)
    assert status.states == {"running": 3} and status.problems == []
    assert {rank.heartbeat for rank in status.ranks} == {5.0}


def test_ranks_of_two_jobs_that_share_an_output_are_all_shown(tmp_path: Path) -> None:
    output = tmp_path / "filter"
    plan(output, 10)
    for job, begin in (("7", NOW - 90), ("8", NOW - 80)):
        for rank in (0, 1):
            write_events(output, [event("beat", rank, 2, begin, NOW - 5, 1, job=job)])
    write_events(output, [event("beat", 0, 2, NOW - 900, NOW - 700, 1, job="6")])  # an earlier one
    assert [(rank.rank, rank.job) for rank in look(output).ranks] == [(0, "7"), (0, "8"), (1, "7"), (1, "8")]


# ---- jobs that failed before they had planned


def leave_logs(folder: Path, code: int, reason: str, last: str) -> Path:
    """What slurm/job.sh leaves of a job for ``folder``/filter; the log of its rank 0."""
    logs = folder / "logs/filter.slurm"
    life = logs / ".filter-12/0.0"
    life.mkdir(parents=True)
    (life / f"0.{code}").write_text(f"node1\n0 0.0\n{reason}\n\n")
    (logs / "filter-12.out").write_text(f"2027-01-01 10:00:00 job 12, life 0: {last}\n")
    (logs / "filter-12-0.log").write_text(f"{reason}\n")
    return logs / "filter-12-0.log"


def test_a_stage_that_failed_before_it_had_planned_is_shown_with_its_error(tmp_path: Path) -> None:
    log = leave_logs(tmp_path / "set/train", 2, "error: input=/nope: no such folder", "Not started again: …")
    snapshot = Watch(tmp_path).look()
    (stage,) = snapshot.stages
    assert (stage.name, stage.stage, stage.state) == ("set/train/filter", "filter", "failed")
    assert stage.problems == ["rank 0: error: input=/nope: no such folder"]
    assert snapshot.over
    assert rank_logs.choose(snapshot, "failed") == [log]
    assert program(tmp_path, "ranks=0").stdout.count("no such folder") == 1


def test_a_local_stage_that_failed_before_it_had_planned_is_shown_too(tmp_path: Path) -> None:
    folder = tmp_path / "set/train/logs/shard-mds.20270101-100000.123"
    folder.mkdir(parents=True)
    (folder / "rank0.log").write_text("10:00:00 [rank 0/2 here] stopped\n")
    (folder / "rank1.log").write_text("error: format=mds: no such thing\n")
    (stage,) = Watch(tmp_path).look().stages
    assert (stage.stage, stage.state, stage.problems) == ("shard", "failed", ["error: format=mds: no such thing"])
    assert rank_logs.choose(Watch(tmp_path).look(), "failed") == [folder / "rank1.log"]


def test_what_was_finished_and_removed_is_not_listed(tmp_path: Path) -> None:
    leave_logs(tmp_path, 0, "", "finished; this life took 0:00:12")
    assert Watch(tmp_path).look().stages == []


def test_a_job_that_plans_after_all_takes_the_place_of_its_logs(tmp_path: Path, clock: Callable[[float], None]) -> None:
    leave_logs(tmp_path, 1, "OSError: later", "Requeued")
    looking = Watch(tmp_path)
    assert looking.look().stages[0].state == "failed"
    plan(tmp_path / "filter", 10)
    clock(60)
    (stage,) = looking.look().stages
    assert (stage.state, stage.total) == ("planned", 10)


# ---- SLURM's queue

SQUEUE = """#!/bin/sh
echo called >> {calls}
test ! -e {fail} || {{ echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }}
cat {answer}
"""


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A squeue that answers with the lines it was given last."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    names = {name: bin_ / name for name in ("calls", "fail", "answer")}
    (bin_ / "squeue").write_text(SQUEUE.format(**names))
    (bin_ / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    init = Queue.__init__

    def available(self: Queue, folder: Path) -> None:
        init(self, folder)
        self.available = True

    monkeypatch.setattr(Queue, "__init__", available)
    clock = type("Clock", (), {"time": lambda: NOW, "monotonic": time.monotonic})
    monkeypatch.setattr("launch.monitor.queue.time", clock)

    def answer(*lines: tuple[str, ...]) -> None:
        names["answer"].write_text("".join("\t".join(line) + "\n" for line in lines))

    return answer


def line(number: str, name: str, state: str, reason: str, comment: str = "") -> tuple[str, ...]:
    return (number, number, number, name, state, "N/A", "0:00", "1:00:00", "2", "node[1-2]", reason, "", comment)


def test_jobs_belong_to_outputs_by_name_number_or_comment(tmp_path: Path, squeue: Callable[..., None]) -> None:
    from launch.slurm import name_for

    root = tmp_path / "data"
    output = root / "train/filter"
    plan(output, 10)
    write_events(output, [event("beat", 0, 1, NOW - 50, NOW - 5, 1, job="11")])
    squeue(
        line("11", "job", "RUNNING", "None"),
        line("12", name_for("filter", str(output)), "PENDING", "Priority"),
        line("13", "data-filter", "PENDING", "(QOSMaxJobsPerUserLimit)", f"{root}/train/filter*"),
        line("14", "shard-12ab", "PENDING", "Dependency", f"{root}/train/shard-mds"),
        line("15", "other", "PENDING", "Resources", f"{root}elsewhere/shard-mds"),
    )
    now = Watch(root).look()
    assert [job.number for job in now.stages[0].jobs] == ["11", "12", "13"]
    assert [job.number for job in now.jobs] == ["14"]
    assert now.stages[0].problems == [
        "job 12 pending: others come first (Priority)",
        "job 13 pending: a limit of the account or quality of service is reached (QOSMaxJobsPerUserLimit)",
    ]
    assert not now.over


def test_a_folder_that_is_not_there_yet_is_shown_if_a_job_is_for_it(
    tmp_path: Path, squeue: Callable[..., None]
) -> None:
    squeue(line("7", "filter-12ab", "PENDING", "Priority", f"{tmp_path}/new/filter for the paper"))
    snapshot = Watch(tmp_path / "new").look()
    assert [job.why for job in snapshot.jobs] == ["others come first (Priority)"]
    assert not snapshot.over
    with pytest.raises(ConfigError, match=r"other: no such folder, and no job in SLURM's queue is for it"):
        Watch(tmp_path / "other")


def test_nodes_that_did_badly_are_named(tmp_path: Path, squeue: Callable[..., None]) -> None:
    log = leave_logs(tmp_path, 75, "", "Requeued")
    (log.parent / ".filter-12/excluded").write_text(" node7\n")
    plan(tmp_path / "filter", 10)
    words = line("12", "filter-12ab", "PENDING", "BeginTime", f"{tmp_path}/filter")
    squeue((*words[:-2], "node[3,7]", words[-1]))
    (stage,) = Watch(tmp_path).look().stages
    assert stage.problems == [
        "job 12 pending: was requeued: SLURM lets it wait for two minutes (BeginTime)",
        "left out because they did worse than other nodes: node7",
    ]


def test_short_jobs_are_seen_and_the_end_is_that_of_the_submission(
    tmp_path: Path, squeue: Callable[..., None], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is looked at every ten seconds, folders every thirty: a stage may come and go in between."""
    squeue(line("7", "filter-12ab", "PENDING", "Priority", f"{tmp_path}/filter"))
    looking = Watch(tmp_path)
    assert not looking.look().over
    squeue()
    plan(tmp_path / "filter", 10)
    monkeypatch.setattr(looking._queue, "_next", 0.0)
    clock(5)
    (stage,) = looking.look().stages
    assert stage.name == "filter"


def test_slurm_is_asked_once_in_ten_seconds(tmp_path: Path, squeue: Callable[..., None]) -> None:
    squeue(line("1", "a", "RUNNING", "None"))
    looking = Watch(tmp_path)
    for _ in range(5):
        looking.look()
    assert (tmp_path / "bin/calls").read_text() == "called\n"


@pytest.mark.parametrize("words", _NO_CLUSTER)
def test_a_machine_of_no_cluster_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: Callable[..., None], words: str
) -> None:
    (tmp_path / "bin/squeue").write_text(f"#!/bin/sh\necho 'squeue: fatal: {words}' >&2\nexit 1\n")
    plan(tmp_path / "filter", 10)
    assert Watch(tmp_path / "filter").look().slurm == ""


def test_a_controller_that_is_away_is_said_and_blames_no_rank(tmp_path: Path, squeue: Callable[..., None]) -> None:
    output = tmp_path / "filter"
    plan(output, 10)
    write_events(output, [event("beat", 0, 1, NOW - 90, NOW - 40, 1, job="11")])
    squeue()
    (tmp_path / "bin/fail").touch()
    now = Watch(output).look()
    assert now.slurm == "SLURM does not answer: slurm_load_jobs error: Unable to contact slurm controller"
    assert now.stages[0].ranks[0].state == "running"
    (tmp_path / "bin/fail").unlink()
    (rank,) = Watch(output).look().stages[0].ranks
    assert (rank.state, rank.note) == (
        "lost",
        "it ended without a message at partition 0: its job is no longer in SLURM's queue",
    )


# ---- what is shown


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    output = tmp_path / "jdb/train/filter"
    gpu = {"gpu": {"use": 0.5, "memory": 10**10}}
    ranks = [event("beat", rank, 5, NOW - 500, NOW, 10, **gpu) for rank in range(4)]
    write(output, *ranks, event("error", 4, 5, NOW - 500, NOW, 1, error='OSError: "<b>" \\ full'))
    commit(output, range(41))
    return tmp_path


def test_the_table_names_stages_ranks_and_problems(mixed: Path) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status_table.render(Watch(mixed).look(), 2))
    said = console.export_text()
    assert re.search(
        r"jdb/train/filter +running +41\.0% +41/100 +41000 +4100 +80\.0 +0\.8/0\.4 +12 min +4\.0 GB +50% +25%", said
    )
    assert "jdb/train/filter: ranks 5: 4 running, 1 failed" in said
    assert "jdb/train/filter: 4100 dropped: small" in said
    assert "2 of 5 ranks" in said
    assert re.search(r"4 +failed +node0 .* 1/20", said)
    assert '! jdb/train/filter: rank 4 on node0 failed: OSError: "<b>" \\ full' in said


def test_hosts_of_all_ranks_are_told_with_the_reasons_of_what_failed(tmp_path: Path) -> None:
    from rich.console import Console

    hosts = [{"a.example": {"": 90, "http_404": 10}, "b.example": {"timeout": 5}}, {"a.example": {"": 100}}]
    ranks = [event("beat", rank, 2, NOW - 500, NOW, 10, hosts=hosts[rank]) for rank in range(2)]
    write(tmp_path / "cc12m/train/download", *ranks)
    now = Watch(tmp_path).look()
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status_table.render(now, 0))
    said = console.export_text()
    assert "cc12m/train/download: a.example: 190 of 200 kept (95.0%); http_404 10" in said
    assert "cc12m/train/download: b.example: 0 of 5 kept (0.0%); timeout 5" in said
    assert now.as_dict()["stages"][0]["hosts"][1] == {
        "host": "b.example",
        "asked": 5,
        "kept": 0,
        "reasons": "timeout 5",
    }
    shown = page.render(now, {}, 0)
    assert "<td>a.example</td><td>200</td><td>190</td><td>95.0%</td><td>http_404 10</td>" in shown


def test_the_page_is_whole_in_itself_and_refreshes(mixed: Path) -> None:
    looking = Watch(mixed, past=True)
    now = looking.look()
    processes = {str(path): work.processes for path, work in looking.works.items()}
    page.write(mixed / "page.html", now, processes, 2.0)
    text = (mixed / "page.html").read_text()
    assert '<meta http-equiv="refresh" content="2">' in text
    assert not re.search(r"(src|href)=|https?://|@import|<b>", text)
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles[:2] == ["samples/s", "MB/s in"] and "GPU use, %" in titles
    assert text.count("<polyline") == len(titles)
    assert "http-equiv" not in page.render(now, processes, 0)
    narrow = text[text.index("max-width: 560px") :]
    assert ".wide { display: none; }" in narrow and text.count('<th class="wide">') == 3


def test_the_speed_that_is_drawn_is_that_of_all_processes(tmp_path: Path) -> None:
    output = tmp_path / "filter"
    plan(output, 100)
    for rank in range(2):
        write_events(output, [event("beat", rank, 2, NOW - 1000, NOW - 1000 + 50 * k, k) for k in range(21)])
    looking = Watch(output, past=True)
    now = looking.look()
    import numpy as np

    times = np.linspace(NOW - 1000, NOW, 50)
    speed = page._slope(looking.works[output].processes, times, telemetry.DONE)
    np.testing.assert_allclose(speed, 2 * SAMPLES / 50, rtol=1e-6)
    assert [page.nice(value) for value in (0, 0.03, 3, 25, 100, 101)] == pytest.approx([1, 0.04, 4, 40, 100, 200])
    assert len(page.plots(now.stages[0], looking.works[output].processes, NOW)) == 6


METRIC = re.compile(r'(# (HELP|TYPE) latentmill_\w+ .+|latentmill_\w+\{(\w+="([^"\\\n]|\\.)*",?)+\} -?[\d.e+-]+)')


def test_prometheus_gets_its_text(mixed: Path) -> None:
    text = metrics.text(Watch(mixed).look())
    assert all(METRIC.fullmatch(line) for line in text.splitlines()), text
    place = f'stage="filter",path="{mixed}/jdb/train/filter"'
    assert f"latentmill_stage_done{{{place}}} 41\n" in text
    assert f'latentmill_stage_bad_samples{{{place},outcome="dropped",reason="small"}} 4100\n' in text
    assert f'latentmill_stage_ranks{{{place},state="failed"}} 1\n' in text
    assert text.count("# TYPE latentmill_rank_idle gauge\n") == 1
    kinds = dict(re.findall(r"# TYPE (\S+) (\S+)", text))
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in kinds.items()), "promtool refuses it"
    server = metrics.Server("127.0.0.1", 0, lambda: text)
    try:
        with urllib.request.urlopen(server.address) as answer:
            assert answer.read().decode() == text
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        with pytest.raises(ConfigError, match="cannot listen at 127.0.0.1"):
            metrics.Server("127.0.0.1", int(server.address.split(":")[2].split("/")[0]), lambda: text)
    finally:
        server.close()


# ---- logs


def test_the_right_logs_are_chosen(tmp_path: Path) -> None:
    output = tmp_path / "train/filter"
    for rank in range(3):
        (tmp_path / f"rank{rank}.log").write_text(f"this is rank {rank}\n")
    last = ("beat", "error", "beat")
    write(output, *(event(last[r], r, 3, NOW - 50, NOW, 1, log=str(tmp_path / f"rank{r}.log")) for r in range(3)))
    now = Watch(tmp_path).look()
    assert rank_logs.choose(now, "rank2") == rank_logs.choose(now, "2") == [tmp_path / "rank2.log"]
    assert rank_logs.choose(now, "failed") == [tmp_path / "rank1.log"]
    for wanted, said in (
        ("rank7", "no log of it is known"),
        ("fialed", "did you mean failed"),
        ("job", "no log of it"),
    ):
        with pytest.raises(ConfigError, match=said):
            rank_logs.choose(now, wanted)


def test_the_log_of_a_rank_that_failed_before_it_could_say_so(tmp_path: Path) -> None:
    """A wrong setting ends a rank before there is an output; slurm/job.sh keeps its exit code next to the log."""
    folder = tmp_path / "train/logs/filter.slurm"
    life = folder / ".filter-ab-17/0.0"
    life.mkdir(parents=True)
    for name in ("0.0", "1.2", "saved", "ended"):
        (life / name).touch()
    for name in ("filter-ab-17.out", "filter-ab-17-0.log", "filter-ab-17-1.log"):
        (folder / name).write_text(name)
    now = Watch(tmp_path / "train").look()
    now.root = str(tmp_path / "train/filter")
    assert rank_logs.choose(now, "failed") == [folder / "filter-ab-17-1.log"]
    assert rank_logs.choose(now, "job") == [folder / "filter-ab-17.out"]


def test_following_shows_what_is_added_until_all_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "rank0.log", tmp_path / "rank1.log"
    one.write_text("".join(f"line {n}\n" for n in range(100)))
    two.write_text("begin\n")
    rounds = iter([True, True, False])

    def more() -> bool:
        going_on = next(rounds)
        with one.open("a") as file:
            file.write(f"more {going_on}\n")
        return going_on

    rank_logs.show([one, two], 2, more)
    said = capsys.readouterr().out
    assert said.startswith(f"==> {one} <==\nline 98\nline 99\n")
    assert f"\n==> {two} <==\nbegin\n\n==> {one} <==\nmore True\nmore True\nmore False\n" in said


# ---- the program


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        ([], "missing: path=... (folder to look at: data_dir"),
        ([".", "folow=true"], "unknown key 'folow'; did you mean follow?"),
        ([".", "follow=yes"], "follow=yes: known: auto, false, true"),
        ([".", "every=0"], "every=0.0: must be more than 0"),
        ([".", "port=99999"], "port=99999: must be at least 0, at most 65535"),
        (["../status.py", "path=."], "path is given more than once"),
        ([".", "logs=rank1"], "logs=rank1: no log of it is known"),
        ([".", "html=/nowhere/page.html"], "html=/nowhere/page.html: cannot be written"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    from launch.status import main

    arguments = [str(tmp_path) if word == "." else word for word in arguments]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_a_run_of_two_ranks_from_its_begin_to_its_end(tmp_path: Path) -> None:
    """Without torch, and the same folder may be given as data_dir, as dataset or as output."""
    submit = [
        sys.executable,
        str(ROOT / "launch/submit.py"),
        "stage=download",
        "dataset=shapes",
        f"data_dir={tmp_path}",
    ]
    subprocess.run([*submit, "count=60", "partition_size=10", "ranks=2"], check=True, capture_output=True, timeout=120)
    for folder in (tmp_path, tmp_path / "shapes", tmp_path / "shapes/train/download"):
        done = program(folder, "json=true", "follow=true")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["over"]
        (stage,) = said["stages"]
        assert (stage["stage"], stage["state"], stage["done"]) == ("download", "finished", 6)
        assert {rank["state"] for rank in stage["ranks"]} == {"finished"}
        assert all(rank["memory"] > 10**7 and rank["peak_memory"] >= rank["memory"] for rank in stage["ranks"])
        assert sum(rank["partitions"] for rank in stage["ranks"]) == 6
    assert "100%" in program(tmp_path).stdout
    assert "download: finished: 60 in" in program(tmp_path, "logs=rank0").stdout
    assert "no rank of it failed" in program(tmp_path, "logs=failed").stderr
    done = program(tmp_path, f"html={tmp_path}/page.html")
    assert done.stdout == f"page: {tmp_path}/page.html\n" and "finished" in (tmp_path / "page.html").read_text()
    check = "import sys; sys.argv = ['status']; import launch.status, launch.slurm, launch.monitor.page; " \
            "import launch.monitor.metrics, launch.monitor.rank_logs; sys.exit('torch' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_outputs_are_listed_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    places = ["shapes/train/download", "shapes/train/filter", "shapes/train/dedup", "shapes/train/shard-mds"]
    places += ["shapes/train/precompute-sdxl", "shapes/train/zeta", "shapes/valid/download", "shapes/runs/diffuse"]
    paths = [tmp_path / place for place in places]
    shuffled = paths[::-1]
    assert sorted(shuffled, key=watch._place) == paths
