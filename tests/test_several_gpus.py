"""Nodes with several GPUs: which rank takes which, and that nothing of it touches another's."""

from __future__ import annotations

import gc
import json
import threading
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from stages.conftest import run_stage
from transfer_double import pretended

from pipeline.config.cli import build
from pipeline.config.schema import PrecomputeConfig
from pipeline.distributed import Rank, find_place
from pipeline.distributed.device import isolation_cost
from pipeline.encoders.crop import Crop
from pipeline.imaging import worker_pool as workers
from pipeline.latents.image_decoding import Decoders, Layout
from pipeline.loading.prefetch import Ahead
from pipeline.stages import verify
from pipeline.stages.precompute import Precompute


def torchrun(rank: int, ranks: int) -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {name: str(value) for group, value in zip(names, (rank, ranks), strict=True) for name in group}


def srun(rank: int, ranks: int) -> dict[str, str]:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_TASKS_PER_NODE": str(ranks)}
    return {**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_CPUS_PER_TASK": "16"}


LAUNCHERS = {
    "torchrun": torchrun,
    "accelerate": lambda rank, ranks: {**torchrun(rank, ranks), "ACCELERATE_MIXED_PRECISION": "no"},
    "torchrun in a step": lambda rank, ranks: {
        **srun(0, 1),
        "SLURM_CPUS_PER_TASK": str(16 * ranks),
        **torchrun(rank, ranks),
    },
    "srun": srun,
    "srun --gpus-per-task=1": srun,
}


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_rank_has_its_own_gpu_and_its_share_of_the_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launcher: str, gpus: int
) -> None:
    alone = "per-task" in launcher  # SLURM shows each task its own GPU, as number 0, and binds it to its own CPUs
    bound = launcher.startswith("srun")
    for name in ("SLURM_STEP_ID", "SLURM_CPUS_PER_TASK", "SLURM_STEP_TASKS_PER_NODE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(workers, "_cgroup_file", lambda name: tmp_path / name)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16 if bound else 16 * gpus)))
    with pretended(monkeypatch, 1 if alone else gpus):
        taken = []
        for number in range(gpus):
            environment = LAUNCHERS[launcher](number, gpus)
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                rank = Rank(find_place(environment))
                taken.append(rank.device.index)
                stage = Precompute(build(PrecomputeConfig, {"input": "a", "output": "b"}), rank)
                assert stage.decoding_processes() == 15
        assert taken == ([0] * gpus if alone else list(range(gpus)))


def test_ranks_that_cannot_copy_to_each_other_are_told() -> None:
    assert "NVLink" in isolation_cost(visible=1, local_world_size=8)
    assert not isolation_cost(8, 8) and not isolation_cost(1, 1)


def test_a_rank_touches_no_gpu_but_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = {"source": "shapes", "count": 20, "image_size": 64, "holdout": False, "partition_size": 12}
    run_stage("download", **source, output=str(tmp_path / "in"))
    with pretended(monkeypatch, 8) as gpus:
        rank = Rank(find_place(torchrun(5, 8)))
        rank.place = find_place({})  # alone, but on GPU 5
        rank.__dict__["device"] = torch.device("cuda", 5)
        settings: dict[str, Any] = {"image_resolutions": (64,), "batch_size": "8", "workers": 1}
        run_stage("precompute", rank, input=str(tmp_path / "in"), output=str(tmp_path / "out"), **settings)
        gpus.check()
        assert gpus.contexts == {5} and gpus.devices == {"MainThread": 5, "ahead": 5}
        assert not gpus.registered, "memory stays pinned"
    record = json.loads((tmp_path / "out/data/000/00000/record.json").read_text())
    assert record["counts"]["kept"] == 12


def test_memory_is_pinned_for_one_device_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch, 8) as gpus:
        torch.cuda.set_device(3)
        for _ in range(3):  # memory of a later one may lie at the same address
            decoders = Decoders(0, 40, Layout((Crop(64),)))
            decoders.pin()
            assert [device for _, device in gpus.registered.values()] == [3]
            assert torch.from_numpy(decoders.memory)[8:9].is_pinned()
            decoders.close()
            assert not gpus.registered
        decoders = Decoders(0, 40, Layout((Crop(64),)))
        decoders.pin()
        del decoders
        gc.collect()
        assert not gpus.registered, "memory that is gone stays registered"


def test_threads_begin_with_their_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch, 8) as gpus:
        stage = Precompute(build(PrecomputeConfig, {"input": "a", "output": "b"}), Rank())
        stage.rank.__dict__["device"] = torch.device("cuda", 6)
        partitions: SimpleQueue[Any] = SimpleQueue()
        partitions.put(None)
        list(Ahead(stage.decoded(partitions), 1))
        assert gpus.devices["ahead"] == 6 and threading.current_thread().name not in gpus.devices


@pytest.mark.parametrize(("gpus", "expected"), [(2, 2), (8, 5)])
def test_a_deep_check_of_latents_has_one_process_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, expected: int
) -> None:
    source = {"source": "shapes", "count": 20, "image_size": 64, "holdout": False, "partition_size": 4}
    run_stage("download", **source, output=str(tmp_path / "in"))
    run_stage("precompute", input=str(tmp_path / "in"), output=str(tmp_path / "out"), image_resolutions=(64,))
    started: list[int] = []

    class Pool:
        def __init__(self, workers: int, context: Any, begin: Any) -> None:
            for _ in range(workers):
                begin()
                started.append(torch.cuda.current_device())

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error: object) -> None:
            return

        def submit(self, check: Any, *arguments: Any) -> Any:
            done: Future[Any] = Future()
            done.set_result(check(*arguments))
            return done

    monkeypatch.setattr(verify, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(verify, "_SPAN", 1)
    monkeypatch.setattr(verify, "available_cpus", lambda: 16)
    with pretended(monkeypatch, gpus) as made:
        assert list(verify.findings_of(tmp_path / "out", deep=True, workers=0)[1]) == []
        assert started == list(range(expected)) and made.contexts == {expected - 1}  # the last one's, in this process
