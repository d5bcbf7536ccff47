"""Stages that use torch on several nodes of a real SLURM: by launch/submit.py, and by scripts that start a launcher."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster.cluster import Cluster
from test_slurm_launch import ROOT, SUBMIT, TEMPLATE, await_end, field, logs_below, numbers

from pipeline.partitions.dataset import Dataset

DATA = ["dataset=shapes", "count=300", "partition_size=50", "image_size=32", "min_image_size=16"]
LATENTS = ["image_resolutions=[32]", "vae=embedded16", "batch_size=50"]
TRAINING = ["batch_size=16", "steps=60", "checkpoint_every=10", "log_every=10", "threads=1", "warmup_steps=2"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and the latents that one local process makes of them."""
    folder = tmp_path_factory.mktemp("data")
    settings = {"precompute.batch_size=50", *LATENTS[:2]}
    command = [
        *SUBMIT,
        "stage=download,filter,shard,precompute",
        *DATA,
        *settings,
        f"data_dir={folder}",
        "cluster=inline",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def digest(folder: Path) -> str:
    return str(Dataset.open(folder).require_success()["content_digest"])


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*"))


def await_steps(run: Path, least: int, seconds: float = 90) -> None:
    """Wait for a checkpoint of at least so many steps."""
    await_that(lambda: max(steps(run), default=0) >= least, run.parent, seconds)


def await_that(true: Callable[[], bool], logs: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, logs_below(logs)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def chain(slurm_cluster: Cluster, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents, a trained model and the report, made by one command on two nodes."""
    folder = tmp_path_factory.mktemp("chain")
    arguments = ["stage=precompute,train,report", "dataset=shapes", f"data_dir={folder}", "cluster=slurm", "nodes=2"]
    arguments += [f"input={data_dir / 'shapes/train/shard-mds'}", *LATENTS[:2], "precompute.batch_size=50"]
    arguments += [f"train.{setting}" for setting in TRAINING]
    jobs = numbers(slurm_cluster.run(*SUBMIT, *arguments).stdout)
    assert await_end(slurm_cluster, *jobs) == ["COMPLETED"] * 3, logs_below(folder)
    return folder


def test_latents_model_and_report_on_two_nodes(chain: Path, data_dir: Path) -> None:
    latents = "shapes/train/precompute-embedded16"
    assert digest(chain / latents) == digest(data_dir / latents)
    logs = logs_below(chain)
    assert "[rank 0/2 node1]" in logs and "finished after 60 steps" in logs
    assert steps(chain / "shapes/runs/diffuse")[-1] == 60
    assert list(chain.rglob("report.html"))


def test_latents_by_the_script_under_accelerate_go_on_after_a_signal(
    slurm_cluster: Cluster, data_dir: Path, tmp_path: Path
) -> None:
    """SIGUSR2, as before the time limit: every rank leaves at the end of a partition, the next life does the rest."""
    shards = data_dir / "shapes/train/shard-mds"
    local = [f"input={shards}", f"output={tmp_path / 'reference'}", "vae=embedded16", "text_encoder=embedded"]
    local += ["image_resolutions=[256]", "batch_size=1"]
    subprocess.run([sys.executable, "-m", "pipeline.stages.precompute", *local], check=True, capture_output=True)
    environment = {**TEMPLATE, "INPUT": str(shards), "OUTPUT": str(tmp_path / "out")}
    environment |= {"VAE": "embedded16", "TEXT_ENCODER": "embedded", "RESOLUTIONS": "[256]", "BATCH_SIZE": "1"}
    environment |= {"LAUNCHER": "accelerate"}
    size = ["--nodes=2", "--cpus-per-task=2", "--gpus-per-node=1", "--mem=1G", f"--chdir={tmp_path}"]
    command = ["sbatch", "--parsable", *size, ROOT / "slurm/precompute.sbatch", "device=cpu"]
    job = slurm_cluster.run(*command, environment=environment).stdout.strip()
    await_that(lambda: any(tmp_path.glob("out/data/*/*/record.json")), tmp_path)
    slurm_cluster.run("scancel", "--signal=USR2", job)
    assert await_end(slurm_cluster, job) == ["COMPLETED"], logs_below(tmp_path)
    assert field(slurm_cluster, job, "Restarts") == "1", logs_below(tmp_path)
    assert digest(tmp_path / "out") == digest(tmp_path / "reference")
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"]["kept"] == 300


def test_training_by_the_script_goes_on_after_a_signal(
    slurm_cluster: Cluster, chain: Path, data_dir: Path, tmp_path: Path
) -> None:
    """SIGUSR2, as before the time limit: all ranks stop at the same step and save it, and the next life goes on, under
    torchrun, to the same bits as without it, under srun."""
    latents = data_dir / "shapes/train/precompute-embedded16"
    environment = {**TEMPLATE, "INPUT": str(latents), "OUTPUT": str(tmp_path / "run"), "BATCH_SIZE": "16"}
    environment |= {"NPROC_PER_NODE": "1"}
    size = ["--nodes=2", "--cpus-per-task=2", "--gpus-per-node=1", "--mem=1G", f"--chdir={tmp_path}"]
    settings = [setting for setting in TRAINING if not setting.startswith("batch_size")]
    command = ["sbatch", "--parsable", *size, ROOT / "slurm/train.sbatch", *settings, "dataset=shapes", "device=cpu"]
    job = slurm_cluster.run(*command, environment=environment).stdout.strip()
    await_steps(tmp_path / "run", 10)
    slurm_cluster.run("scancel", "--signal=USR2", job)
    assert await_end(slurm_cluster, job) == ["COMPLETED"], logs_below(tmp_path)
    logs = logs_below(tmp_path)
    assert field(slurm_cluster, job, "Restarts") == "1", logs
    assert "stopped at a safe boundary: 2 of 2" in logs and "resuming after step" in logs
    assert steps(tmp_path / "run")[-1] == 60
    weights = "export/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (chain / "shapes/runs/diffuse" / weights).read_bytes()
