"""slurm/job.sh on a real SLURM: when a job is started again, when not, and what it says of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster.cluster import Cluster
from test_slurm_launch import ROOT, await_end, field, logs_below

from pipeline.distributed import expand_nodes

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name=job --nodes=1 --ntasks-per-node={tasks} --output=%x-%j.out --open-mode=append --requeue
#SBATCH --signal=USR2@20 {options}
set -euo pipefail
export LOGS=$PWD LOOK=1 WAIT=3 OMP_NUM_THREADS=1
{settings}
source {root}/slurm/env.sh
source {root}/slurm/job.sh

run python -m program "${{ELEMENT[@]}}"
"""
PROGRAM = """
import os, signal, sys, time
from pipeline.config.schema import ConfigError, FilterConfig
from pipeline.distributed import distributed

life = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

@distributed
def main(rank, config):
"""


WAIT_FOR_STOP_IF = """
while life == 0 and {}:
    rank.check_stop()
    time.sleep(0.02)
"""
WAIT_FOR_STOP = WAIT_FOR_STOP_IF.format("True")
"""A rank that goes on in its job's first life until it is stopped, and has nothing to do in later ones."""
GATEWAY = "198.18.{}.254"
"""The login node, as nodes of the cluster of that number see it."""


@contextmanager
def webhook() -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A server and what was posted to it."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], got
        server.shutdown()


def linked_venv(folder: Path) -> Path:
    """An environment of its own path, which can be hidden from a node."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
    python = venv / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return venv


@dataclass
class Job:
    cluster: Cluster
    folder: Path
    id: str

    def end(self) -> str:
        return await_end(self.cluster, self.id)[0]

    @property
    def lives(self) -> int:
        return 1 + int(field(self.cluster, self.id, "Restarts"))

    @property
    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def log(self, task: int) -> str:
        return (self.folder / f"job-{self.id}-{task}.log").read_text()

    def wait_for(self, name: str) -> None:
        end = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < end, logs_below(self.folder)
            time.sleep(0.05)


def submit(
    cluster: Cluster, folder: Path, body: str, *, tasks: int = 2, options: str = "", settings: str = "", hang: float = 0
) -> Job:
    """A job whose ranks run ``body``, where ``life`` is 0 the first time."""
    folder.mkdir(exist_ok=True)
    text = (
        PROGRAM
        + textwrap.indent(textwrap.dedent(body), "    ")
        + f'\nif __name__ == "__main__":\n    main(FilterConfig(hang_timeout={hang}))\n'
    )
    (folder / "program.py").write_text(text)
    script = folder / "job.sbatch"
    script.write_text(SCRIPT.format(tasks=tasks, options=options, settings=settings, root=ROOT))
    return Job(cluster, folder, cluster.run("sbatch", "--parsable", f"--chdir={folder}", script).stdout.strip())


@pytest.fixture(autouse=True, scope="module")
def late(slurm_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A job that hears no signal, and reaches its time limit while the other tests run."""
    body = """
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        open("deaf", "w").close()
        while life == 0:
            time.sleep(0.1)
    """
    job = submit(slurm_cluster, tmp_path_factory.mktemp("late"), body, tasks=1)
    job.wait_for("deaf")
    slurm_cluster.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+5")
    yield job
    slurm_cluster.run("scancel", "--me", "--quiet", check=False)


def test_a_job_that_does_its_work_ends_well(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = submit(slurm_cluster, tmp_path, "print('rank', rank.rank, 'of', rank.world_size)")
    assert job.end() == "COMPLETED"
    assert (job.log(0), job.log(1)) == ("rank 0 of 2\n", "rank 1 of 2\n")
    assert "life 0: 2 tasks on node" in job.said
    assert "life 0: finished; this life took 0:00:" in job.said.splitlines()[-1]


def test_the_exit_code_is_that_of_the_rank_that_failed(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = "if rank.rank == 1:\n    sys.exit(5)\ntime.sleep(60)"
    job = submit(slurm_cluster, tmp_path, body, settings="LIVES=1")
    assert job.end() == "FAILED"
    assert field(slurm_cluster, job.id, "ExitCode") == "5:0"
    assert "failed (with code): 1(5)" in job.said
    assert "Giving up: nothing got done in 1 lives in a row" in job.said


def test_a_wrong_setting_is_not_tried_twice(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = "if rank.rank == 1:\n    raise ConfigError('colour=loud: no such colour')\ntime.sleep(60)"
    job = submit(slurm_cluster, tmp_path, body)
    assert job.end() == "FAILED"
    assert (field(slurm_cluster, job.id, "ExitCode"), job.lives) == ("2:0", 1)
    assert "Not started again: a setting is wrong" in job.said
    assert "error: colour=loud: no such colour" in job.log(1)
    assert "Rank 1: error: colour=loud: no such colour" in job.said


def test_lives_count_only_while_nothing_gets_done(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """A failure after something was saved does not count; one in vain is all that LIVES=1 allows."""
    body = """
        if life == 0:
            rank.saved()
        sys.exit(3)
    """
    job = submit(slurm_cluster, tmp_path, body, tasks=1, settings="LIVES=1")
    assert job.end() == "FAILED"
    assert job.lives == 2
    assert job.said.count("Requeued") == 1 and job.said.count("Giving up") == 1


def test_ranks_that_die_while_slurm_still_sends_signals_get_another_life(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    """Those of a job that is preempted before they can hear; SLURM then does not say that the job is running."""
    signaling = 'scontrol() { command scontrol "$@" | sed s/JobState=RUNNING/JobState=SIGNALING/; }'
    job = submit(slurm_cluster, tmp_path, "if life == 0:\n    sys.exit(3)", tasks=1, settings=signaling)
    assert job.end() == "COMPLETED"
    assert job.lives == 2


def test_a_cancelled_job_stays_so_and_its_ranks_stop_in_time(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = """
        open(f"ready{rank.rank}", "w").close()
        while not rank.stopping:
            time.sleep(0.02)
        open(f"safe{rank.rank}", "w").close()
        rank.check_stop()
    """
    job = submit(slurm_cluster, tmp_path, body)
    job.wait_for("ready0")
    job.wait_for("ready1")
    slurm_cluster.run("scancel", job.id)
    assert job.end() == "CANCELLED"
    job.wait_for("safe0")
    job.wait_for("safe1")
    time.sleep(2)
    assert field(slurm_cluster, job.id, "JobState") == "CANCELLED"
    assert job.lives == 1 and "Requeued" not in job.said
    end = time.monotonic() + 20
    while "life 0: cancelled: it does not begin again by itself" not in job.said.splitlines()[-1]:
        assert time.monotonic() < end, job.said
        time.sleep(0.2)


def test_a_rank_that_hangs_shows_its_stack_and_the_job_begins_again(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = """
        def wait_for_godot():
            time.sleep(600)
        if life == 0 and rank.rank == 1:
            wait_for_godot()
        end = time.monotonic() + (600 if life == 0 else 0)
        while time.monotonic() < end:
            rank.check_stop()
            time.sleep(0.02)
    """
    job = submit(slurm_cluster, tmp_path, body, hang=1)
    assert job.end() == "COMPLETED", logs_below(tmp_path)
    assert job.lives == 2
    assert "no progress for 1 s (hang_timeout)" in job.log(1) and "in wait_for_godot" in job.log(1)
    assert "hung: 1" in job.said


def test_a_frozen_rank_is_named_and_the_job_begins_again(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Stuck in C, with the lock that every thread of Python needs, a rank can neither end itself nor say so."""
    body = """
        import ctypes
        def frozen():
            lock, c = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
            c.pthread_mutex_init(lock, None)
            c.pthread_mutex_lock(lock)
            c.pthread_mutex_lock(lock)
        if life == 0 and rank.rank == 1:
            frozen()
        end = time.monotonic() + (600 if life == 0 else 0)
        while time.monotonic() < end:
            rank.check_stop()
            time.sleep(0.02)
    """
    job = submit(slurm_cluster, tmp_path, body, hang=1)
    assert job.end() == "COMPLETED", logs_below(tmp_path)
    assert job.lives == 2
    assert "no life from ranks 1: ending this life" in job.said
    assert re.search(r"killed, lost or frozen: 1 on node\d; stopped at a safe boundary: 1 of 2. Requeued", job.said)
    assert "in frozen" in job.log(1)


def test_when_others_have_finished_a_frozen_rank_is_not_waited_for(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = "if rank.rank == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)"
    job = submit(slurm_cluster, tmp_path, body)
    assert job.end() == "COMPLETED", logs_below(tmp_path)
    assert job.lives == 1
    assert "done, though srun ended with code 137; ranks killed, lost or frozen: 1 on node1" in job.said


def test_one_element_of_an_array_begins_again_alone(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = """
        print(*sys.argv[1:])
        if life == 0 and "rank_offset=2" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
    """
    job = submit(slurm_cluster, tmp_path, body, options="--array=3-5")
    await_end(slurm_cluster, job.id)
    said = slurm_cluster.run("scontrol", "show", "job", "--oneliner", job.id).stdout.splitlines()
    restarts = {line.split("ArrayTaskId=")[1].split()[0]: "Restarts=1 " in line for line in said}
    assert restarts == {"3": False, "4": True, "5": False}
    assert all("JobState=COMPLETED" in line for line in said)
    logs = [path.read_text().splitlines()[0] for path in tmp_path.glob("job-*-0.log")]
    assert sorted(logs) == [f"rank_offset={offset} world_size=6" for offset in (0, 2, 4)]


def lives_of(job: Job) -> list[str]:
    """Node lists of the lives, as the job script said them."""
    return re.findall(r"life \d+: \d+ tasks on (\S+);", job.said)


def assert_left_out(job: Job, node: str) -> None:
    first, second = lives_of(job)
    assert first == "node[1-2]" and node in expand_nodes(first) and node not in expand_nodes(second), job.said
    assert f"left out of the next life, as they did badly while others did well: {node}" in job.said


def test_a_node_without_its_environment_is_named_and_left_out(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Of two nodes one; the other ranks did well. No life is lost by it, though LIVES=1."""
    venv = linked_venv(tmp_path)
    slurm_cluster.node("hide", "node2", venv)
    try:
        settings = f"export LATENTMILL_VENV={venv} LIVES=1"
        job = submit(slurm_cluster, tmp_path, WAIT_FOR_STOP, settings=settings, options="--nodes=2 --exclude=node4")
        assert job.end() == "COMPLETED", job.said
    finally:
        slurm_cluster.node("show", "node2", venv)
    assert_left_out(job, "node2")
    assert "ranks without their environment: 2 3 on node2" in job.said
    assert f"Rank 2: there is no {venv}/bin/python on node2" in job.said
    assert "left out of the next life, as they did badly while others did well: node2" in job.said
    excluded = expand_nodes(field(slurm_cluster, job.id, "ExcNodeList"))
    assert set(excluded) == {"node2", "node4"}  # and what its user excluded


def test_the_node_of_the_job_script_may_be_the_broken_one(slurm_cluster: Cluster, tmp_path: Path) -> None:
    venv = linked_venv(tmp_path)
    slurm_cluster.node("hide", "node1", venv)
    try:
        job = submit(slurm_cluster, tmp_path, "pass", settings=f"export LATENTMILL_VENV={venv} LIVES=1", tasks=1)
        assert job.end() == "COMPLETED", job.said
    finally:
        slurm_cluster.node("show", "node1", venv)
    assert (lives_of(job), job.lives) == (["node1", "node2"], 2)
    assert f"no Python environment at LATENTMILL_VENV={venv} on node1" in job.said


def test_an_environment_that_is_nowhere_ends_the_job(slurm_cluster: Cluster, tmp_path: Path) -> None:
    settings = "export LATENTMILL_VENV=/no/such/venv BAD_NODES=1"
    job = submit(slurm_cluster, tmp_path, "pass", settings=settings, tasks=1)
    assert job.end() == "FAILED"
    assert job.lives == 2  # a second node was asked
    assert "no Python environment at LATENTMILL_VENV=/no/such/venv on node2. Not started again" in job.said


def test_a_module_that_no_node_has_ends_the_job_at_once(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = submit(slurm_cluster, tmp_path, "import no_such_module", options="--nodes=2")
    assert job.end() == "FAILED"
    assert (field(slurm_cluster, job.id, "ExitCode"), job.lives) == ("78:0", 1)
    assert re.search(r"Rank \d: No module named 'no_such_module'", job.said)
    assert "Not started again: other nodes would do no better" in job.said


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_disk_that_is_full_for_all_ends_the_job_at_once(slurm_cluster: Cluster, tmp_path: Path, nodes: int) -> None:
    work = tmp_path / "work"
    work.mkdir()
    body = f"rank.life.work = {str(work)!r}\n" + WAIT_FOR_STOP_IF.format("rank.rank != 0") + (
        f"raise OSError(28, 'No space left on device', {str(work / 'file')!r})"
    )  # fmt: skip
    for node in ("node1", "node2", "node3", "node4"):
        slurm_cluster.node("readonly", node, work)
    try:
        job = submit(slurm_cluster, tmp_path, body, options=f"--nodes={nodes}", tasks=1)
        assert job.end() == "FAILED"
    finally:
        for node in ("node1", "node2", "node3", "node4"):
            slurm_cluster.node("show", node, work)
    assert (field(slurm_cluster, job.id, "ExitCode"), job.lives) == ("74:0", 1), job.said
    assert "refused by the file system: 0 on node1" in job.said and "No space left on device" in job.said
    assert "Not started again: other nodes would do no better" in job.said


def test_a_node_whose_file_system_is_read_only_is_left_out(slurm_cluster: Cluster, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    body = f"rank.life.work = {str(work)!r}\nopen({str(work)!r} + f'/{{rank.rank}}', 'w').close()\n" + WAIT_FOR_STOP
    slurm_cluster.node("readonly", "node2", work)
    try:
        job = submit(slurm_cluster, tmp_path, body, options="--nodes=2", tasks=1)
        assert job.end() == "COMPLETED", job.said
    finally:
        slurm_cluster.node("show", "node2", work)
    assert_left_out(job, "node2")
    assert "refused by the file system: 1 on node2" in job.said and "Read-only file system" in job.said


@pytest.mark.parametrize(
    ("body", "settings", "left_out", "said"),
    [
        ("sys.exit(3)", "", True, "failed (with code): 2(3)"),
        ("sys.exit(3)", "export BAD_NODES=0", False, "failed (with code): 2(3)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "", True, "killed, lost or frozen: 2 on node2"),
    ],
)
def test_a_node_that_does_badly_while_others_do_well_is_left_out(
    slurm_cluster: Cluster, tmp_path: Path, body: str, settings: str, left_out: bool, said: str
) -> None:
    program = f"if life == 0 and rank.rank == 2:\n    time.sleep(1)\n    {body}\n" + WAIT_FOR_STOP
    job = submit(slurm_cluster, tmp_path, program, options="--nodes=2", settings=settings)
    assert job.end() == "COMPLETED", job.said
    if left_out:
        assert_left_out(job, "node2")
    else:
        assert field(slurm_cluster, job.id, "ExcNodeList") == "(null)"
    assert said in job.said


def test_a_node_that_crawls_is_left_out_of_the_next_life(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = """
        end = time.monotonic() + 3
        while life == 0:
            time.sleep(0.2 if os.environ["SLURMD_NODENAME"] == "node2" else 0.02)
            if rank.rank == 0 and time.monotonic() > end:
                rank.request_stop("preemption")
            rank.check_stop()
    """
    job = submit(slurm_cluster, tmp_path, body, options="--nodes=2", settings="export SLOW_AFTER=2", tasks=1)
    assert job.end() == "COMPLETED", job.said
    assert_left_out(job, "node2")
    assert "stopped at a safe boundary: 2 of 2" in job.said


def test_a_job_is_never_left_without_nodes(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = "if life == 0 and rank.rank == 1:\n    time.sleep(1)\n    sys.exit(3)\n" + WAIT_FOR_STOP
    job = submit(slurm_cluster, tmp_path, body, options="--nodes=2 --exclude=node[3-4]", tasks=1)
    assert job.end() == "COMPLETED", job.said
    assert lives_of(job) == ["node[1-2]"] * 2
    assert "node2 did badly, but without it SLURM could not start this job: it is not left out" in job.said


def test_a_log_folder_that_is_deleted_costs_nothing_but_logs(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Whether the job then ends well or has to begin again, which needs a place for its .out file."""
    body = """
        open(os.environ["MARKS"] + f"/ready{life}", "w").close()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            time.sleep(0.02)
        if life == 0:
            sys.exit(3)
    """
    logs = tmp_path / "logs"
    logs.mkdir()
    settings = f"export LOGS={logs} MARKS={tmp_path}"
    job = submit(slurm_cluster, tmp_path, body, tasks=1, settings=settings, options=f"--output={logs}/%x-%j.out")
    for life in (0, 1):
        job.wait_for(f"ready{life}")
        shutil.rmtree(logs)
    assert job.end() == "COMPLETED"
    assert job.lives == 2
    said = "\n".join(path.read_text() for path in logs.glob("*.out"))
    assert "WARNING: the folder of the logs was deleted while the job runs" in said and "life 1: finished" in said


def test_logs_that_cannot_be_written_do_not_decide_how_a_job_ends(slurm_cluster: Cluster, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    body = "print('so far')\nif life == 0:\n    sys.exit(3)"
    for node in ("node1", "node2"):
        slurm_cluster.node("readonly", node, logs)
    try:
        job = submit(slurm_cluster, tmp_path, body, tasks=1, settings=f"export LOGS={logs}")
        assert job.end() == "COMPLETED", job.said
    finally:
        for node in ("node1", "node2"):
            slurm_cluster.node("show", node, logs)
    assert job.lives == 2
    assert f"WARNING: {logs} cannot be written" in job.said
    assert job.said.count("so far") == 2  # in the job's own output
    assert list(logs.iterdir()) == []


def test_clocks_of_nodes_may_differ(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """A rank whose clock is an hour behind is not taken for frozen."""
    body = """
        import pipeline.config.life, time as clock
        real = clock.time
        clock.time = lambda: real() - 3600
        end = clock.monotonic() + 6
        while clock.monotonic() < end:
            rank.check_stop()
            clock.sleep(0.02)
    """
    job = submit(slurm_cluster, tmp_path, body, hang=2, tasks=1)
    assert (job.end(), job.lives) == ("COMPLETED", 1), job.said


def test_logs_of_ranks_stay_small(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = """
        from pathlib import Path
        from pipeline.storage import Folder
        from pipeline.telemetry.events import Events

        log = Path(f"job-{os.environ['SLURM_JOB_ID']}-{rank.rank}.log")
        older = log.with_name(log.name + ".1")
        with Folder.open(Path("work"), create=True) as work, Events(work, rank, beat=0.05).around():
            number = 0
            while not (older.exists() and os.path.samestat(os.fstat(1), log.stat())):
                rank.check_stop()
                number += 1
                print(number, "." * 90, flush=True)
                time.sleep(0.001)
            print("the last line", flush=True)
    """
    job = submit(slurm_cluster, tmp_path, body, settings="export LATENTMILL_LOG_MEGABYTES=0.01")
    assert job.end() == "COMPLETED", job.said
    for task in range(2):
        log = job.log(task)
        older = tmp_path / f"job-{job.id}-{task}.log.1"
        assert log.startswith(f"(earlier lines: {older};") and log.endswith("the last line\n"), log
        assert older.stat().st_size > 10_000 and older.read_text().startswith("1 ....")


def test_few_files_stay_behind_after_many_lives(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = submit(
        slurm_cluster, tmp_path, "rank.saved()\nif life < 3:\n    sys.exit(3)", settings="BAD_NODES=0", tasks=1
    )
    assert (job.end(), job.lives) == ("COMPLETED", 4)
    (state,) = tmp_path.glob(".job-*")
    assert sorted(path.name for path in state.glob("*.[0-9]")) == ["2.0", "3.0"]


def test_a_webhook_is_told_of_the_end_and_no_log_tells_its_secret(slurm_cluster: Cluster, tmp_path: Path) -> None:
    with webhook() as (port, got):
        address = f"http://{GATEWAY.format(slurm_cluster.number)}:{port}/T0/hush"
        ends = {"good": "COMPLETED", "bad": "FAILED"}
        for name, state in ends.items():
            body = "pass" if name == "good" else "sys.exit(3)"
            job = submit(slurm_cluster, tmp_path / name, body, tasks=1, settings=f"NOTIFY={address} LIVES=1")
            assert job.end() == state
    assert [(message["event"], message["name"]) for message in got] == [("finished", "job"), ("failed", "job")]
    assert "Giving up: nothing got done in 1 lives in a row" in got[1]["reason"]
    assert "hush" not in logs_below(tmp_path)


def test_a_job_whose_ranks_hear_nothing_is_started_again_at_its_time_limit(late: Job) -> None:
    assert late.end() == "COMPLETED", late.said
    assert late.lives == 2
    assert "the time limit came before the ranks had stopped. Requeued" in late.said
