"""slurm/job.sh on a real SLURM: when a job is started again, when not, and what it says of it."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster.cluster import Cluster
from test_slurm_launch import ROOT, await_end, field, logs_below

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name=job --nodes=1 --ntasks-per-node={tasks} --output=%x-%j.out --open-mode=append --requeue
#SBATCH --signal=USR2@20 {options}
set -euo pipefail
export LOGS=$PWD LOOK=1 WAIT=3 OMP_NUM_THREADS=1
{settings}
source {root}/slurm/env.sh
source {root}/slurm/job.sh

run python program.py "${{ELEMENT[@]}}"
"""
PROGRAM = """
import os, signal, sys, time
from pipeline.config import ConfigError, FilterConfig
from pipeline.distributed import distributed

life = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

@distributed
def main(rank, config):
"""


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
    text = PROGRAM + textwrap.indent(textwrap.dedent(body), "    ") + f"\nmain(FilterConfig(hang_timeout={hang}))\n"
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
    assert "killed, lost or frozen: 1; stopped at a safe boundary: 1 of 2. Requeued" in job.said
    assert "in frozen" in job.log(1)


def test_when_others_have_finished_a_frozen_rank_is_not_waited_for(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = "if rank.rank == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)"
    job = submit(slurm_cluster, tmp_path, body)
    assert job.end() == "COMPLETED", logs_below(tmp_path)
    assert job.lives == 1
    assert "done, though srun ended with code 137; ranks killed, lost or frozen: 1" in job.said


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


def test_a_job_whose_ranks_hear_nothing_is_started_again_at_its_time_limit(late: Job) -> None:
    assert late.end() == "COMPLETED", late.said
    assert late.lives == 2
    assert "the time limit came before the ranks had stopped. Requeued" in late.said
