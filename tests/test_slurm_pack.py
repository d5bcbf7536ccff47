"""pack=true on a real SLURM: a chain in one job, which goes on at the right stage when it begins again."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import cluster
from slurm_cluster.cluster import Cluster
from test_slurm_launch import ROOT, SUBMIT, await_end, field, logs_below, numbers

from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify

STATUS = [sys.executable, ROOT / "launch/status.py"]
CHAIN = ["stage=download,filter,shard", "dataset=shapes", "count=800", "partition_size=10", "image_size=192"]


def wait_for(path: Path, pattern: str, count: int, said: Path) -> None:
    end = time.monotonic() + 90
    while len(list(path.glob(pattern))) < count:
        assert time.monotonic() < end, logs_below(said)
        time.sleep(0.05)


def test_a_packed_chain_that_is_preempted_goes_on_at_the_right_stage(slurm_cluster: Cluster, tmp_path: Path) -> None:
    size = ["nodes=2", "tasks_per_node=2", "filter.tasks_per_node=3", "shard.nodes=1", "shard.cpus_per_task=4"]
    arguments = [*CHAIN, "min_image_size=16", f"data_dir={tmp_path}", "cluster=slurm", "pack=true", *size]
    (job,) = numbers(slurm_cluster.run(*SUBMIT, *arguments, "slurm_hold=true").stdout)
    pending = json.loads(slurm_cluster.run(*STATUS, tmp_path, "json=true").stdout)
    assert [one["label"] for one in pending["jobs"]] == ["download, filter, shard-mds"]
    slurm_cluster.run("scontrol", "release", job)

    train = tmp_path / "shapes/train"
    wait_for(train / "filter", "data/000/0*", 5, tmp_path)
    first = {path: path.stat().st_ino for path in (train / "download/data/000").glob("0*")}
    slurm_cluster.run("scontrol", "requeue", job)
    assert numbers(slurm_cluster.run(*SUBMIT, *arguments).stdout) == [job]
    assert await_end(slurm_cluster, job) == ["COMPLETED"], logs_below(tmp_path)
    assert field(slurm_cluster, job, "Restarts") == "1"
    said = logs_below(tmp_path)
    assert said.count("step 1 was done in an earlier life") == 1 and "step 2 was done" not in said
    assert {path: path.stat().st_ino for path in first} == first
    for name in ("download", "filter", "shard-mds"):
        dataset = Dataset.open(train / name)
        assert dataset.require_success()["counts"]["kept"] == 800
        assert list(verify(dataset)) == []
    assert {event["world_size"] for event in events(train / "filter")} == {6}
    assert {event["world_size"] for event in events(train / "shard-mds")} == {2}
    stages = json.loads(slurm_cluster.run(*STATUS, tmp_path, "json=true").stdout)["stages"]
    assert [(stage["stage"], stage["state"]) for stage in stages] == [
        ("download", "finished"), ("filter", "finished"), ("shard", "finished")
    ]  # fmt: skip


def events(output: Path) -> list[dict[str, int]]:
    from pipeline.telemetry.events import last_events

    return list(last_events(output))


def test_a_packed_job_ends_with_the_code_of_the_stage_that_failed(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Its lives are those of one job; what was done before stays done."""
    arguments = ["stage=download,filter,shard", "dataset=shapes", "count=40", "partition_size=20", "min_image_size=500"]
    arguments += ["max_aspect_ratio=1.5", "shard.max_failed_fraction=0", f"data_dir={tmp_path}", "cluster=slurm"]
    (job,) = numbers(slurm_cluster.run(*SUBMIT, *arguments, "pack=all", "tasks_per_node=2", "lives=1").stdout)
    assert await_end(slurm_cluster, job) == ["FAILED"], logs_below(tmp_path)
    assert field(slurm_cluster, job, "ExitCode") == "2:0"  # there is nothing to shard: a setting is wrong
    assert "there is nothing to do: the input has no samples" in logs_below(tmp_path)
    assert Dataset.open(tmp_path / "shapes/train/filter").require_success()["counts"]["dropped"] == 40
    assert not (tmp_path / "shapes/train/shard-mds/plan").exists()


def test_a_dry_run_knows_the_limits_of_the_cluster(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = [*CHAIN, f"data_dir={tmp_path}", "cluster=slurm", "dry_run=true", "precompute.gpus_per_node=8"]
    asked = ["nodes=9", "tasks_per_node=17", "mem=32G", "shard.partition=nowhere"]
    done = slurm_cluster.run(*SUBMIT, *arguments, *asked, check=False)
    assert done.returncode == 1  # sbatch refuses it as well
    said = done.stdout.partition("# ==== estimated")[2]
    assert "download: 800 samples in 80 partitions" in said and "proposed: nodes=1 tasks_per_node=1" in said
    assert "nodes=9: partition main allows 4" in said
    assert "nodes of partition main have 16 CPUs" in said and "mem=32G: nodes of partition main have 16G" in said
    assert "partition=nowhere: no such partition; known: high, main" in said
    assert "not completely known" not in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def accounting_cluster(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster with a database, next to the one that other tests use."""
    missing = [name for name in ("mariadbd", "slurmdbd") if shutil.which(name, path=cluster.SEARCH_PATH) is None]
    if missing:
        pytest.skip(f"no {missing[0]}: no accounting")
    running = cluster.start("dbd")
    try:
        yield running
    finally:
        running.stop()


def test_status_tells_what_sacct_measured(accounting_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["stage=download", *CHAIN[1:], f"data_dir={tmp_path}", "cluster=slurm", "nodes=2", "mem=2G"]
    (job,) = numbers(accounting_cluster.run(*SUBMIT, *arguments, "cpus_per_task=2").stdout)
    assert await_end(accounting_cluster, job) == ["COMPLETED"], logs_below(tmp_path)
    end = time.monotonic() + 30
    while True:  # the database is some seconds late
        (stage,) = json.loads(accounting_cluster.run(*STATUS, tmp_path, "json=true").stdout)["stages"]
        if stage["efficiency"]["source"] == "sacct":
            break
        assert time.monotonic() < end
        time.sleep(1)
    found = stage["efficiency"]
    assert found["node_memory_asked"] == 2 * 2**30 and found["cpus"] == 2
    assert found["elapsed"] >= 1 and found["cpu_seconds"] > 0 and found["memory"] > 10**7
