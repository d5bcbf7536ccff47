"""Training on a GPU (a pretended one): nothing mixes devices, and no step makes the host wait for the device."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_cuda import CudaTensor, FakeCuda, fake_cuda
from PIL import Image
from tiny_training import Points, Regression
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.schema import TrainConfig
from pipeline.distributed import Rank, Stopped
from pipeline.distributed.environment import Place
from pipeline.encoders.tokenizer import train_bpe
from pipeline.encoders.vision import vision_encoder
from pipeline.loading import Sampler
from pipeline.models.dit import SIZES
from pipeline.storage import Folder
from pipeline.training import loop
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.feed import Chosen, Feed, worker_count
from pipeline.training.images import ImageDataset
from pipeline.training.loggers import read_log
from pipeline.training.loop import NotFinite, Training
from pipeline.training.staging import Stage, share_of
from pipeline.training.tasks.base import Task
from pipeline.training.tasks.caption import Caption, CaptionDataset
from pipeline.training.tasks.classify import Classify
from pipeline.training.tasks.diffuse import Diffuse, LatentInfo

GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)  # gloo for all: it takes pretended tensors
    with fake_cuda() as cuda:
        yield cuda


@pytest.fixture
def rank(cuda: FakeCuda) -> Iterator[Rank]:
    rank = Rank()
    assert rank.device == GPU
    yield rank
    rank.close()


# ---- tasks


class Latents:
    """Random latents, or moments of them, and text states."""

    def __init__(self, moments: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(40, 8 if moments else 4, 8, 8, generator=generator)
        self.text = torch.randn(40, 6, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.image)

    def batch(self, positions: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        return {"image_latents": self.image[positions], "caption_latents": self.text[positions]}


class Labelled:
    """Small images with labels and captions."""

    def __len__(self) -> int:
        return 40

    def rows(self, positions: Any) -> list[dict[str, Any]]:
        rows = []
        for position in map(int, positions):
            file = BytesIO()
            pixels = np.random.default_rng(position).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            texts = [f"a {word} thing" for word in ("red", "blue", "large")[: 1 + position % 3]]
            rows.append({"key": str(position), "jpg": file.getvalue(), "label": position % 3, "captions": texts})
        return rows


def diffuse(moments: bool = False, **settings: Any) -> tuple[Task, Any, TrainConfig]:
    config = TrainConfig(**{"task": "diffuse", **COMMON, **settings})
    data = Latents(moments)
    info = LatentInfo("embedded", "embedded", 64, (4, 8, 8), (6, 16), moments=moments)
    return Diffuse(config, data, info), data, config


def classify(**settings: Any) -> tuple[Task, Any, TrainConfig]:
    config = TrainConfig(**{"task": "classify", "depth": 2, **COMMON, **settings})
    data = ImageDataset(Labelled(), 16)
    return Classify(config, data), data, config


def caption(**settings: Any) -> tuple[Task, Any, TrainConfig]:
    config = TrainConfig(**{"task": "caption", "encoder": "embedded", "max_length": 12, **COMMON, **settings})
    tokenizer = train_bpe(("a red thing", "a blue thing", "a large thing"), 300)
    encoder = vision_encoder("embedded")
    data = CaptionDataset(Labelled(), tokenizer, config.max_length, encoder, False)
    return Caption(config, data, encoder.describe(), [["a red thing"]], [["a red thing"]]), data, config


EXPERTS: dict[str, Any] = {"dim": 32, "depth": 3, "heads": 2, "mixer_dim": 32, "mixer_depth": 1, "experts": 2}
EXPERTS |= {"text": "attention", "local": False, "qk_norm": True, "gated": True, "bias": False}
COMMON: dict[str, Any] = {"steps": 5, "batch_size": 4, "warmup_steps": 2, "log_every": 100, "workers": 0}
COMMON |= {"checkpoint_every": 3, "evaluate_every": 4, "micro_batch": 2}
TASKS: dict[str, Callable[..., tuple[Task, Any, TrainConfig]]] = {
    "diffuse": diffuse,
    "diffuse masked, of moments": lambda **s: diffuse(True, mask_ratio=0.5, process="edm", **s),
    "diffuse with experts": lambda **s: diffuse(model="small_experts", **s),
    "diffuse with scans": lambda **s: diffuse(model="nano_ssm", **s),
    "classify": lambda **s: classify(mixup=0.8, cutmix=1.0, drop_path=0.1, dropout=0.1, **s),
    "classify, hybrid of mamba1": lambda **s: classify(blocks="hybrid", mixer="mamba1", pool="token", **s),
    "caption": caption,
    "caption, rotary": lambda **s: caption(positions="rotary", dropout=0.1, **s),
    "caption, mamba": lambda **s: caption(decoder="mamba", **s),
}


def watched(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> list[int]:
    """Every step but the first two of a life, in which constants are copied, must not wait; returns those seen."""
    step, seen = Training._step, []

    def checked(self: Training) -> bool:
        seen.append(self.state.step)
        if len(seen) <= 2:
            return step(self)
        with cuda.no_waits():
            return step(self)

    monkeypatch.setattr(Training, "_step", checked)
    return seen


def fit(made: tuple[Task, Any, TrainConfig], rank: Rank, path: Path) -> loop.State:
    task, data, config = made
    path.mkdir(exist_ok=True)
    with Folder.open(path) as folder:
        return loop.train(task, data, config, rank, folder, Chosen(data, 0, 0, 5))


def data_parallel(model: nn.Module, config: TrainConfig, rank: Rank) -> nn.Module:
    """As among several ranks."""
    if config.parallel != "ddp":
        return model
    rank.process_group()
    return DistributedDataParallel(model, device_ids=[rank.device], forward_sync_buffers=False)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", TASKS)
def test_no_step_waits_for_the_device(
    task: str, parallel: str, cuda: FakeCuda, rank: Rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch, cuda)
    monkeypatch.setitem(SIZES, "small_experts", EXPERTS)
    monkeypatch.setattr(loop, "wrapped", data_parallel)
    state = fit(TASKS[task](parallel=parallel), rank, tmp_path / "run")
    assert state.step == len(seen) and state.skipped_ever == 0
    found = open_checkpoint(tmp_path / "run")
    assert found.step == state.step and found.facts["config"]["precision"] == "bfloat16"
    assert all(type(tensor) is torch.Tensor for part in found.tensors.values() for tensor in part.values())
    assert all(tensor.isfinite().all() for tensor in found.tensors["ema"].values())


@pytest.mark.parametrize("settings", [{"checkpoint_activations": True}, {"precision": "float32"}, {"draws": 2}])
def test_other_ways_to_train_work_there_too(
    settings: dict[str, Any], cuda: FakeCuda, rank: Rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "draws" in settings:  # texts are drawn, for which the host must see whether they have ended
        assert fit(caption(objective="cider", steps=2, **settings), rank, tmp_path / "run").step == 2
        return
    watched(monkeypatch, cuda)
    for number, make in enumerate((diffuse, classify, caption)):
        assert fit(make(**settings), rank, tmp_path / str(number)).skipped_ever == 0


def test_a_pretended_gpu_learns_what_a_cpu_learns(tmp_path: Path) -> None:
    """The averages take another way there, but say the same."""
    settings = {"precision": "float32", "steps": 8, "checkpoint_every": 5}
    with fake_cuda():
        fit(diffuse(**settings), Rank(), tmp_path / "gpu")
    fit(diffuse(**settings), Rank(), tmp_path / "cpu")
    ours, theirs = (open_checkpoint(tmp_path / name) for name in ("gpu", "cpu"))
    for part in ("model", "ema"):
        torch.testing.assert_close(ours.tensors[part], theirs.tensors[part], rtol=1e-5, atol=1e-6)
    for fact in ("ema_updates", "sampler", "skipped_ever"):
        assert ours.facts[fact] == theirs.facts[fact]
    losses = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 1


# ---- steps that are not finite, signals


class Poisoned(Regression):
    """Its loss is NaN in these steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps

    def losses(self, network: nn.Module, batch: Any, keys: Any) -> torch.Tensor:
        losses = (network(batch["x"])[:, 0] - batch["y"]).square()
        return losses * float("nan") if keys.step in self.steps else losses


def regression(*poisoned: int, **settings: Any) -> tuple[Task, Any, TrainConfig]:
    small = {"steps": 12, "batch_size": 8, "checkpoint_every": 5, "log_every": 4, "workers": 0, "precision": "float32"}
    return Poisoned(*poisoned), Points(), TrainConfig(**{**small, **settings})


def test_a_step_that_is_not_finite_is_left_out_by_the_device(
    cuda: FakeCuda, rank: Rank, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(monkeypatch, cuda)
    state = fit(regression(3, 4, 7), rank, tmp_path / "run")
    assert (state.skipped, state.skipped_ever, state.ema.updates) == (0, 3, 9)
    assert [r.getMessage() for r in caplog.records if "left out" in r.message] == [
        f"step {number} is left out: loss nan, gradient norm nan" for number in (4, 5, 8)
    ]
    steps = {
        name: float(t)
        for name, t in open_checkpoint(tmp_path / "run").tensors["optimizer"].items()
        if name.endswith("/step")
    }
    assert set(steps.values()) == {9.0}


def test_after_too_many_of_them_nothing_is_applied_until_the_host_knows(
    cuda: FakeCuda, rank: Rank, tmp_path: Path
) -> None:
    """Steps 6 and 7 are one too many; step 8 would do, but comes before the host looks."""
    made = regression(5, 6, max_skipped=1, log_every=8)
    with pytest.raises(NotFinite, match="step 7: loss nan.*2 steps in a row .max_skipped=1"):
        fit(made, rank, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").step == 5
    after = {name: tensor.cpu() for name, tensor in made[0].model.named_parameters()}
    before = open_checkpoint(tmp_path / "run").tensors["model"]
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_signal_stops_at_a_step_and_the_run_goes_on(cuda: FakeCuda, rank: Rank, tmp_path: Path) -> None:
    rank.saved = lambda: rank.request_stop("SIGUSR2")  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=r"stopped after step \d+ of 12"):
        fit(regression(), rank, tmp_path / "run")
    stopped = open_checkpoint(tmp_path / "run").step
    other = Rank()
    fit(regression(), other, tmp_path / "run")
    fit(regression(), other, tmp_path / "whole")
    ours, theirs = (open_checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert stopped < 12 and ours.step == theirs.step == 12
    torch.testing.assert_close(ours.tensors, theirs.tensors, rtol=0, atol=0)


# ---- what a GPU is given by default


@pytest.mark.parametrize(
    ("wanted", "precision", "products"),
    [("auto", "bfloat16", "high"), ("tf32", "tf32", "high"), ("float32", "float32", "highest")],
)
def test_bfloat16_and_tf32_are_the_default_and_said(
    wanted: str,
    precision: str,
    products: str,
    cuda: FakeCuda,
    rank: Rank,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pipeline")
    try:
        fit(regression(precision=wanted, steps=2), rank, tmp_path / "run")
        assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision("highest")
    assert f"precision={precision} on cuda" in caplog.text
    assert open_checkpoint(tmp_path / "run").facts["config"]["precision"] == precision


def test_a_run_keeps_the_precision_that_it_was_started_with(tmp_path: Path) -> None:
    fit(regression(precision="auto", steps=4, checkpoint_every=2), Rank(), tmp_path / "run")
    with fake_cuda():
        fit(regression(precision="auto", steps=6), Rank(), tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").facts["config"]["precision"] == "float32"


def test_fsdp_gathers_in_bfloat16_and_reduces_in_float32_but_scans_stay_exact(cuda: FakeCuda, rank: Rank) -> None:
    from pipeline.training.parallel import shard

    task, _, config = diffuse(model="nano_ssm", parallel="fsdp")
    model = task.model.to(GPU)
    shard(model, config, rank, "bfloat16")
    policies = {
        name: part._get_fsdp_state()._mp_policy
        for name, part in model.named_modules()
        if hasattr(part, "_get_fsdp_state")
    }
    scans = {name for name in policies if ".scan.scans." in name}
    assert scans and {"", "blocks.0", "blocks.3"} <= set(policies)
    for name, policy in policies.items():
        assert policy.param_dtype == (None if name in scans else torch.bfloat16), name
        assert policy.reduce_dtype == torch.float32 and not policy.cast_forward_inputs


# ---- the feed


def test_batches_come_pinned_from_processes_that_have_no_network(
    cuda: FakeCuda, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, data, config = classify(workers=1, micro_batch=0)
    task.model.to(GPU)
    assert not hasattr(task.for_workers(), "model") and hasattr(task, "model")
    sampler = Sampler(len(data), config.batch_size, 0)
    feed = Feed(task, data, sampler, 0, 3, config, rank)
    loader = feed._parts._dataset  # type: ignore[attr-defined]
    assert b"CudaTensor" not in pickle.dumps(loader._task)
    (worker,) = feed._parts._workers  # type: ignore[attr-defined]
    assert type(worker).__name__ == "ForkServerProcess"
    plain = Feed(task, data, sampler, 0, 3, TrainConfig(**{**config.__dict__, "workers": 0}), rank)
    next(feed), next(plain)
    with cuda.no_waits():
        for _ in range(2):
            ours, theirs = next(feed), next(plain)
            feed.prefetch()
            plain.prefetch()
            assert all(isinstance(tensor, CudaTensor) for tensor in ours.batch.values())
    for name, tensor in ours.batch.items():
        assert torch.equal(tensor.cpu(), theirs.batch[name].cpu())


def test_workers_are_started_for_a_gpu_alone_unless_asked_for(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.feed.available_cpus", lambda ranks: 5)
    gpu = Rank()
    cpu = Rank()
    cpu.__dict__["device"] = torch.device("cpu")
    unasked = TrainConfig()
    assert (worker_count(unasked, gpu), worker_count(unasked, cpu)) == (4, 0)
    assert worker_count(TrainConfig(workers=0), gpu) == 0 and worker_count(TrainConfig(workers=3), cpu) == 3
    monkeypatch.setattr("pipeline.training.feed.available_cpus", lambda ranks: 64)
    assert worker_count(unasked, gpu) == 8


def test_a_checkpoint_is_staged_in_pinned_memory_without_waiting(cuda: FakeCuda, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0, device=GPU), "b": torch.ones(2, 2, device=GPU)}
    stage = Stage()
    with cuda.no_waits():
        copies = stage.copy(tensors)
        tensors["a"].add_(1)  # training goes on
    assert all(copy.is_pinned() for copy in copies.values())
    assert copies["a"].tolist() != [0, 1, 2]
    stage.wait()
    assert copies["a"].tolist() == [0, 1, 2]
    with cuda.no_waits():
        assert stage.copy(tensors)["a"] is copies["a"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_each_tensor_is_staged_by_one_rank_and_ranks_have_about_as_much(ranks: int) -> None:
    model = nn.Sequential(*(nn.Linear(8 * n, 16) for n in range(1, 9)))
    tensors = {f"{part}/{name}": tensor for part in ("model", "ema") for name, tensor in model.state_dict().items()}
    shares = [share_of(tensors, Rank(Place(rank, ranks, rank, ranks))) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    sizes = [sum(tensor.nbytes for tensor in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in tensors.values())


def test_a_profile_is_written_by_rank_0(tmp_path: Path) -> None:
    fit(regression(steps=14, profile=2), Rank(), tmp_path / "run")
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "steps_000011-000012.json"
    assert any("addmm" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])
