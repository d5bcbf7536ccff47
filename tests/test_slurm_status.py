"""launch/status.py next to a real SLURM: why jobs wait, which rank is silent and lost, whose log is where."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm_cluster.cluster import Cluster
from test_slurm_launch import ROOT, SUBMIT, await_end, logs_below, numbers

STATUS = [SUBMIT[0], ROOT / "launch/status.py"]


def look(cluster: Cluster, folder: Path, until: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """What ``json=true`` says as soon as ``until`` likes it."""
    end = time.monotonic() + 120
    while True:
        said: dict[str, Any] = json.loads(cluster.run(*STATUS, folder, "json=true").stdout)
        if until(said):
            return said
        assert time.monotonic() < end, (said, logs_below(folder))
        time.sleep(0.5)


def first(said: dict[str, Any]) -> dict[str, Any]:
    return dict(said["stages"][0]) if said["stages"] else {"states": {}, "ranks": [], "state": ""}


def test_from_waiting_jobs_to_a_frozen_rank_and_its_log(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["stage=download,filter", "dataset=shapes", "count=400000", "partition_size=2000", "lease=3"]
    arguments += [f"data_dir={tmp_path}", "cluster=slurm", "nodes=2", "tasks_per_node=2", "download.slurm_hold=true"]
    submitted = slurm_cluster.run(*SUBMIT, *arguments).stdout
    jobs = numbers(submitted)
    assert f"watch: python launch/status.py {tmp_path}/shapes" in submitted

    waiting = look(slurm_cluster, tmp_path, lambda said: len(said["jobs"]) == 2)
    why = {job["number"]: job["why"] for job in waiting["jobs"]}
    assert why[jobs[0]].startswith("held by its user")
    assert why[jobs[1]].startswith("waits for the job before it (Dependency)")
    assert not waiting["over"]

    slurm_cluster.run("scontrol", "release", jobs[0])
    running = first(look(slurm_cluster, tmp_path, lambda said: first(said)["states"] == {"running": 4}))
    assert {rank["host"] for rank in running["ranks"]} == {"node1", "node2"}
    assert [job["number"] for job in running["jobs"]] == jobs[:1]
    rank = running["ranks"][1]
    assert rank["job"] == jobs[0] and rank["memory"] > 10e6
    assert Path(rank["log"]).name.endswith(f"-{jobs[0]}-1.log")

    on_its_node = ["srun", f"--jobid={jobs[0]}", "--overlap", f"--nodelist={rank['host']}", "--nodes=1", "--ntasks=1"]
    slurm_cluster.run(*on_its_node, "kill", "-STOP", str(rank["pid"]))
    frozen = first(look(slurm_cluster, tmp_path, lambda said: first(said)["ranks"][1]["state"] == "silent"))
    assert any("rank 1 on node1 silent: no sign of life for" in problem for problem in frozen["problems"])
    shown = slurm_cluster.run(*STATUS, tmp_path, "logs=failed")
    assert rank["log"] in shown.stderr
    assert "life 0: 4 tasks on node[1-2]" in slurm_cluster.run(*STATUS, tmp_path, "logs=job").stdout

    slurm_cluster.run(*on_its_node, "kill", "-KILL", str(rank["pid"]))
    waits = "pending: was requeued: SLURM lets it wait for two minutes"  # said once SLURM has put it back
    again = first(look(slurm_cluster, tmp_path, lambda said: any(waits in p for p in first(said)["problems"])))
    assert again["state"] == "pending"
    assert again["ranks"][1]["state"] == "lost"
    assert again["ranks"][1]["note"].endswith("its job waits in SLURM's queue again")

    slurm_cluster.run("scancel", *jobs)
    await_end(slurm_cluster, *jobs)
    ended = look(slurm_cluster, tmp_path, lambda said: said["over"])
    assert first(ended)["state"] == "lost"
    assert first(ended)["ranks"][1]["note"].endswith("its job is no longer in SLURM's queue")
