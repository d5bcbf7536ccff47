"""Jobs on a real SLURM that are killed, cut off, preempted, …: whatever happens, the result is the undisturbed one.

A few of the events of tests/slurm_cluster/chaos.py; ``make chaos`` does many more, one after the other.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slurm_cluster import chaos
from slurm_cluster.chaos import Trial, Work
from slurm_cluster.cluster import Cluster


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work.undisturbed(tmp_path_factory.mktemp("work"), partitions=30)


def test_jobs_are_killed_frozen_signalled_requeued_doubled_and_preempted(
    slurm_cluster: Cluster, tmp_path: Path, work: Work
) -> None:
    """Nine jobs at a time, each with a trouble of its own, until one that is more important wants all nodes."""
    ways = {"kill_a_rank": "template", "tell_usr2": "template", "requeue": "array", "cancel_an_element": "array"}
    events = [*ways, "freeze_a_rank", "submit_twice", "skew_clocks", "delete_logs", "preempt"]

    def run(event: str) -> Trial:
        way, seed = ways.get(event, "submit"), len(event)
        return chaos.run(slurm_cluster, tmp_path / event, event, work, way, seed, tasks_per_node="2")

    with ThreadPoolExecutor(len(events)) as pool:
        trials = dict(zip(events, pool.map(run, events), strict=True))
    assert all(trials[event].lives() >= 2 for event in ("tell_usr2", "requeue", "preempt"))
    log = "\n".join(path.read_text() for path in (tmp_path / "tell_usr2").rglob("*.out"))
    assert "Requeued: it begins again" in log, log


def test_nodes_are_lost_and_old_ranks_write_on(slurm_cluster: Cluster, tmp_path: Path, work: Work) -> None:
    """Three nodes at a time: one crashes, one is cut off, one loses only its daemon. All jobs begin again elsewhere."""
    events = {"crash_batch_node": "node[2,3]", "cut_batch_node": "node[1,3]", "orphan_batch_node": "node[1,2]"}

    def run(event: str) -> Trial:
        options = {"nodes": "1", "tasks_per_node": "2", "exclude": events[event]}
        return chaos.run(slurm_cluster, tmp_path / event, event, work, seed=len(event), **options)

    with ThreadPoolExecutor(3) as pool:
        for trial in pool.map(run, events):
            assert trial.lives() >= 2
            if "old ranks" in trial.note:
                assert "2 old ranks went on" in trial.note


def test_a_job_that_must_be_requeued_waits_for_a_controller_that_is_away(
    slurm_cluster: Cluster, tmp_path: Path, work: Work
) -> None:
    trial = chaos.run(slurm_cluster, tmp_path, "lose_controller_and_ranks", work)
    assert trial.lives() == 2
