"""Every stage, task, precision, parallel mode and kernel on a real GPU: ``make gpu``.

``GPU_TESTS_DEVICE=cpu`` rehearses them on a CPU, as ``make gpu`` does where there is no GPU: what is asked of the
stages is then known to be right.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_networks import save_autoencoder, save_clip

from pipeline.doctor import gpus
from pipeline.training.loggers import read_log

ROOT = Path(__file__).parents[1]
DEVICE = os.environ.get("GPU_TESTS_DEVICE") or "cuda"
COUNT = torch.cuda.device_count() if DEVICE == "cuda" else 2  # ranks of a rehearsal share the CPU
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRAINED = [
    "steps=6", "log_every=2", "checkpoint_every=3", "batch_size=8", "model=nano", "valid_fraction=0.2",
]  # fmt: skip


def submit(*arguments: str, ranks: int = 1) -> None:
    """launch/submit.py as a user runs it."""
    command = [sys.executable, str(ROOT / "launch/submit.py"), *arguments, f"ranks={ranks}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert not ended.returncode, ended.stdout + ended.stderr


def program(stage: str, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", f"pipeline.stages.{stage}", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=540)
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes and scanned digits up to their shards, and the latents of the scenes."""
    folder = tmp_path_factory.mktemp("gpu")
    common = [f"data_dir={folder}"]
    submit("stage=download,filter,shard,precompute", "dataset=shapes", "count=48", f"device={DEVICE}", *common)
    submit("stage=download,filter,shard", "dataset=digits", *common)
    submit("stage=features", "dataset=shapes", "encoder=embedded", f"device={DEVICE}", *common)
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name small networks of diffusers and transformers, which run in the precision that is asked for."""
    autoencoder = save_autoencoder(tmp_path_factory.mktemp("vae"), (8, 8, 8, 16), latent_channels=4)
    clip = save_clip(tmp_path_factory.mktemp("clip"))
    return [f"vae={autoencoder}", f"text_encoder=clip:{clip}", f"image_encoder=clip:{clip}"]


def train(data: Path, name: str, *settings: str, ranks: int = 1) -> list[dict[str, Any]]:
    """A short run; digits without their own recipe, whose epochs take longer."""
    dataset = next(word.partition("=")[2] for word in settings if word.startswith("dataset="))
    run = data / dataset / "runs" / name
    if dataset == "digits":
        settings = tuple(word for word in settings if word != "dataset=digits")
        settings += (f"input={data}/digits/train/shard-mds", f"output={run}", "resolution=16")
    else:
        settings += (f"data_dir={data}", f"name={name}")
    submit("stage=train", f"device={DEVICE}", *TRAINED, *settings, ranks=ranks)
    return [line for line in read_log(run) if "loss" in line]


def assert_learned(lines: list[dict[str, Any]]) -> None:
    assert lines[-1]["step"] == 6 and all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)


# ---- latents


@pytest.mark.parametrize(
    ("dtype", "saved"),
    [("float32", "float16"), ("float16", "float16"), ("bfloat16", "float16"), ("bfloat16", "float32")],
)
@pytest.mark.parametrize("latent", ["sample", "moments"])
def test_latents_are_made_and_verified(data: Path, networks: list[str], dtype: str, saved: str, latent: str) -> None:
    output = data / f"latents-{dtype}-{saved}-{latent}"
    submit(
        "stage=precompute", f"input={data}/shapes/train/shard-mds", f"output={output}", f"device={DEVICE}",
        f"model_dtype={dtype}", f"vae_dtype={dtype}", f"save_dtype={saved}", f"latent={latent}",
        "image_resolutions=[64]", "batch_size=auto", *networks,
    )  # fmt: skip
    record = json.loads((output / "data/000/00000/record.json").read_text())
    assert record["counts"]["kept"] > 0 and not record["counts"].get("failed")
    assert json.loads((output / "manifest.json").read_text())["dtype"] == saved
    found = program("verify", f"input={output}", "deep=true", status=1)
    assert "1 findings" in found and "reconstructs a smooth image with" in found, found  # not with random weights


# ---- training: tasks, precisions, parallel modes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["diffuse", "classify", "caption"])
def test_every_task_learns_in_every_precision(data: Path, task: str, precision: str) -> None:
    dataset = "digits" if task == "classify" else "shapes"
    lines = train(data, f"{task}-{precision}", f"dataset={dataset}", f"task={task}", f"precision={precision}")
    assert_learned(lines)


@pytest.mark.parametrize("task", ["diffuse", "classify", "caption"])
def test_a_run_goes_on_from_a_checkpoint_of_the_gpu(data: Path, task: str) -> None:
    dataset = "digits" if task == "classify" else "shapes"
    settings = [f"dataset={dataset}", f"task={task}"]
    train(data, f"resumed-{task}", *settings)
    newest = data / dataset / "runs" / f"resumed-{task}" / "checkpoints/step_000006"
    shutil.rmtree(newest)
    assert_learned(train(data, f"resumed-{task}", *settings))
    assert newest.is_dir()


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("task", ["diffuse", "classify", "caption"])
def test_every_task_learns_on_several_gpus(data: Path, task: str, ranks: int, mode: str) -> None:
    needed = max(ranks, 2 if mode == "hsdp" else 1)
    if needed > COUNT:
        pytest.skip(f"needs {needed} GPUs")
    dataset = "digits" if task == "classify" else "shapes"
    name = f"{task}-{mode}-{ranks}"
    assert_learned(train(data, name, f"dataset={dataset}", f"task={task}", f"parallel={mode}", ranks=ranks))


@pytest.mark.parametrize("blocks", ["ssm", "attention", "hybrid"])
def test_vision_mamba_learns_with_every_kind_of_block(data: Path, blocks: str) -> None:
    assert_learned(train(data, f"blocks-{blocks}", "dataset=digits", "task=classify", f"blocks={blocks}"))


def test_compiled_networks_learn(data: Path) -> None:
    assert_learned(train(data, "compiled", "dataset=shapes", "task=diffuse", "compile=true"))


# ---- what comes after


def test_images_are_drawn_and_judged(data: Path) -> None:
    train(data, "diffuse", "dataset=shapes", "task=diffuse")
    program("generate", "dataset=shapes", f"data_dir={data}", "steps=2", f"device={DEVICE}")
    assert list((data / "shapes/runs/diffuse/samples").rglob("*.png"))
    program("evaluate", "dataset=shapes", f"data_dir={data}", "metric=shapes", "steps=2", f"device={DEVICE}")
    program(
        "generate", "dataset=shapes", f"data_dir={data}", "steps=2", f"device={DEVICE}", f"output={data}/drawn",
    )  # fmt: skip
    program(
        "evaluate", "dataset=shapes", f"data_dir={data}", "metric=fidelity", f"generated={data}/drawn",
        f"reference={data}/shapes/train/shard-mds", "features=pixels", f"device={DEVICE}",
    )  # fmt: skip


def test_images_are_classified(data: Path) -> None:
    train(data, "classify", "dataset=digits", "task=classify")
    program(
        "evaluate", "metric=classes", f"device={DEVICE}", f"checkpoint={data}/digits/runs/classify",
        f"input={data}/digits/train/shard-mds", f"output={data}/evaluation",
    )  # fmt: skip


def test_captions_are_written(data: Path) -> None:
    train(data, "caption", "dataset=shapes", "task=caption")
    program(
        "caption", f"image_path={data}/shapes/train/shard-mds", f"checkpoint={data}/shapes/runs/caption",
        f"output={data}/captions", f"device={DEVICE}", "max_length=8",
    )  # fmt: skip
    assert (data / "captions/captions.jsonl").stat().st_size


# ---- kernels, and the machine as a whole


def test_kernels_that_are_installed_work() -> None:
    found = list(gpus.kernels(torch.device(DEVICE)))
    assert not [finding for finding in found if finding.state == "fail"], found


def test_the_doctor_finds_nothing_that_would_fail(tmp_path: Path) -> None:
    arguments = [f"data_dir={tmp_path}", "vae=embedded", "text_encoder=embedded", "seconds=0.2"]
    command = [sys.executable, str(ROOT / "launch/doctor.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert not ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_on_several_gpus_reduce_over_nccl(tmp_path: Path, ranks: int) -> None:
    if DEVICE != "cuda" or ranks > COUNT:
        pytest.skip(f"needs {ranks} GPUs")
    command = [sys.executable, str(ROOT / "launch/doctor.py"), f"ranks={ranks}", f"gpus={ranks}", "seconds=0.1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert not ended.returncode and f"NCCL, {ranks} ranks" in ended.stdout, ended.stdout + ended.stderr
