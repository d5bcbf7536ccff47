"""The SLURM cluster of the tests, and ``@distributed`` in its steps."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path

import pytest
from slurm_cluster.cluster import Cluster

from pipeline.distributed import EXIT_STOPPED

SOURCES = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def program(folder: Path, body: str) -> Path:
    path = folder / "program.py"
    head = "import json, sys, time\nfrom pipeline.distributed import distributed\n\n@distributed\ndef main(rank):\n"
    path.write_text(head + textwrap.indent(textwrap.dedent(body), "    ") + "\nmain()\n")
    return path


def test_tasks_run_on_nodes_of_their_own(slurm_cluster: Cluster) -> None:
    names = slurm_cluster.run("srun", "-N2", "-n4", "--ntasks-per-node=2", "hostname").stdout.split()
    assert sorted(names) == ["node1", "node1", "node2", "node2"]


def test_ranks_of_a_step_find_each_other_over_the_network(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = """
        where = [rank.launcher, rank.rank, rank.world_size, rank.local_rank, rank.local_world_size, rank.node]
        print(json.dumps([*where, rank.broadcast(rank.node, src=2), rank.all_reduce(1.0 + rank.rank)]), flush=True)
    """
    command = ("srun", "-N2", "-n3", "--distribution=block", sys.executable, program(tmp_path, body))
    ranks = [json.loads(line) for line in slurm_cluster.run(*command, environment=SOURCES).stdout.splitlines()]
    assert sorted(ranks) == [
        ["slurm", 0, 3, 0, 2, "node1", "node2", 6.0],
        ["slurm", 1, 3, 1, 2, "node1", "node2", 6.0],
        ["slurm", 2, 3, 0, 1, "node2", "node2", 6.0],
    ]


def test_an_exception_on_one_rank_ends_the_step(slurm_cluster: Cluster, tmp_path: Path) -> None:
    body = """
        if rank.rank == 1:
            raise ValueError("boom")
        time.sleep(600)
    """
    command = ("srun", "-N2", "-n3", "--kill-on-bad-exit=1", sys.executable, program(tmp_path, body))
    ended = slurm_cluster.run(*command, environment=SOURCES, check=False, timeout=60)
    assert ended.returncode != 0
    assert "ValueError: boom" in ended.stderr
    assert "[rank 1/3 node" in ended.stderr


@pytest.mark.parametrize("number", ["TERM", "USR2"])
def test_a_signal_to_the_job_stops_its_ranks_at_a_safe_boundary(
    slurm_cluster: Cluster, tmp_path: Path, number: str
) -> None:
    body = """
        open(f"ready{rank.rank}", "w").close()
        while not rank.stopping:
            time.sleep(0.01)
        open(f"safe{rank.rank}", "w").close()
        rank.check_stop()
    """
    script = tmp_path / "job.sbatch"
    script.write_text(f"#!/bin/bash\nsrun -n2 {sys.executable} {program(tmp_path, body)}\necho $? > c && mv c code\n")
    job = slurm_cluster.run("sbatch", "--parsable", "-n2", f"--chdir={tmp_path}", script, environment=SOURCES)
    wait_for(tmp_path, "ready0", "ready1")
    slurm_cluster.run("scancel", f"--signal={number}", job.stdout.strip())
    wait_for(tmp_path, "code", "safe0", "safe1")
    assert (tmp_path / "code").read_text() == f"{EXIT_STOPPED}\n"


def test_a_batch_script_is_one_process_whatever_the_job_was_given(slurm_cluster: Cluster, tmp_path: Path) -> None:
    path = program(tmp_path, "open('said', 'w').write(f'{rank.launcher} {rank.world_size}')")
    command = ("--wait", "-N2", "-n4", f"--chdir={tmp_path}", "--wrap", f"{sys.executable} {path}")
    slurm_cluster.run("sbatch", *command, environment=SOURCES)
    assert (tmp_path / "said").read_text() == "single 1"


def wait_for(folder: Path, *names: str, seconds: float = 60) -> None:
    """Wait until all these files have appeared."""
    end = time.monotonic() + seconds
    while missing := [name for name in names if not (folder / name).exists()]:
        assert time.monotonic() < end, f"{missing} did not appear; {sorted(path.name for path in folder.iterdir())}"
        time.sleep(0.05)
