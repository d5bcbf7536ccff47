"""What a run may be asked for next to learning: other precision, compiled, other logs, an upload."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import Regression, Run

from pipeline.config.schema import ConfigError
from pipeline.distributed import Stopped
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.export import Uploads, epoch_name
from pipeline.training.loggers import read_log

Runs = Callable[..., Run]


def test_plateau_lowers_the_rate_and_a_resumed_run_knows_of_it(run: Runs) -> None:
    one = run()
    without_gain = {"lr": 1e-30, "schedule": "plateau", "evaluate_every": 1, "lr_patience": 3, "warmup_steps": 0}
    one.rank.saved = lambda: one.rank.request_stop("SIGUSR2")  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        one(steps=12, checkpoint_every=7, log_every=1, **without_gain)
    run(one.path.name)(steps=12, checkpoint_every=7, log_every=1, **without_gain)
    rates = [line["lr"] for line in read_log(one.path) if "lr" in line]
    assert rates == pytest.approx([1e-30] * 4 + [1e-31] * 3 + [1e-32] * 3 + [1e-33] * 2)


def test_in_bfloat16_the_weights_stay_exact(run: Runs) -> None:
    one = run()
    one(steps=150, lr=0.02, log_every=10, precision="bfloat16", task=Regression(plain=True))
    losses = [line["loss"] for line in read_log(one.path) if "loss" in line]
    assert losses[-1] < 0.2 * losses[0]
    found = open_checkpoint(one.path)
    assert {tensor.dtype for part in ("model", "ema") for tensor in found.tensors[part].values()} == {torch.float32}
    exact = run("exact")
    exact(steps=150, lr=0.02, log_every=10, task=Regression(plain=True))
    assert losses != [line["loss"] for line in read_log(exact.path) if "loss" in line]


def test_activations_that_are_computed_again_change_nothing(run: Runs) -> None:
    class Blocks(Regression):
        def __init__(self) -> None:
            super().__init__(plain=True)
            torch.manual_seed(0)
            self.model = _Stack(  # type: ignore[assignment]
                [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.3)) for _ in range(3)]
            )

    kept, again = run("kept"), run("again")
    kept(task=Blocks())
    again(task=Blocks(), checkpoint_activations=True)
    ours, theirs = (open_checkpoint(one.path).tensors for one in (kept, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="checkpoint_activations=true: this model has no blocks"):
        run("without")(checkpoint_activations=True)


class _Stack(torch.nn.Module):
    def __init__(self, parts: list[torch.nn.Module]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(parts)
        self.out = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.out(x)
        return out


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_a_compiled_run_learns_the_same_and_its_checkpoint_does_not_tell(run: Runs) -> None:
    plain, compiled = run("plain"), run("compiled")
    plain(task=Regression(plain=True))
    compiled(task=Regression(plain=True), compile=True)
    ours, theirs = (open_checkpoint(one.path).tensors["model"] for one in (compiled, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_tensorboard_reads_the_numbers_of_all_lives_once(run: Runs) -> None:
    one = run()
    one.rank.saved = lambda: one.rank.request_stop("SIGUSR2")  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        one(loggers=("tensorboard",), log_every=1, checkpoint_every=5)
    run(one.path.name)(loggers=("tensorboard",), log_every=1, checkpoint_every=5)
    events = EventAccumulator(str(one.path / "tensorboard"))
    events.Reload()
    told = {line["step"]: line["loss"] for line in read_log(one.path) if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(told)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert events.Scalars("valid/loss")


class Wandb:
    """Stands in for the module: notes what a run was told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **about: Any) -> Any:
        self.begun.append(about)
        return SimpleNamespace(log=lambda values, step: self.lines.append((step, values)), finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_gets_all_lives_as_one_run(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    one = run()
    one.rank.saved = lambda: one.rank.request_stop("SIGUSR2")  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        one(loggers=("wandb",), log_every=1, checkpoint_every=5, wandb_project="ours")
    run(one.path.name)(loggers=("wandb",), log_every=1, checkpoint_every=5, wandb_project="ours")
    first, second = wandb.begun
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["project"] == "ours"
    assert first["config"]["batch_size"] == 8
    assert [step for step, values in wandb.lines if "loss" in values] == list(range(1, 13))
    assert wandb.finished == 2


def test_loggers_that_are_not_there_are_named(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="loggers=tensorbord: .*tensorboard"):
        run("a")(loggers=("tensorbord",))
    without = builtins.__import__

    def importing(name: str, *others: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return without(name, *others)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ConfigError, match="loggers=wandb: install it with pip install wandb"):
        run("b")(loggers=("wandb",))


class Api:
    """Stands in for that of the Hub: notes what was uploaded."""

    uploads: ClassVar[list[tuple[str, str, set[str]]]] = []

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        assert private and exist_ok

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.uploads.append((repo_id, commit_message, {path.name for path in folder_path.iterdir()}))


def test_exports_are_uploaded_by_rank_0(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "uploads", [])
    begin = Uploads.start
    monkeypatch.setattr(Uploads, "start", lambda self, folder: (begin(self, folder), self.wait()))
    one = run()
    one(hub_repo="somebody/model", export_every=1)
    files = {"model.safetensors", "config.json", "preprocessing.json", "README.md"}
    names = [*_exports(one), "export"]
    assert len(names) == 3
    assert Api.uploads == [("somebody/model", name, files) for name in names]


def test_a_model_card_says_what_the_weights_are(run: Runs) -> None:
    one = run()
    one()
    card = (one.path / "export/README.md").read_text()
    assert card.startswith("---\nlibrary_name: pytorch\n") and "Averaged weights after 12 optimizer steps" in card
    assert "| Samples trained on | 50 |" in card and "| Samples kept for validation | 20 |" in card
    loss = open_checkpoint(one.path).facts["progress"]["metrics"]["valid_loss"]
    assert f"| valid_loss | {loss:.6g} |" in card and "| batch_size | `8` |" in card
    assert "| Terms of the data | not known" in card and "load_file(" in card


def _exports(one: Run) -> list[str]:
    return sorted(path.name for path in (one.path / "exports").iterdir())


def test_epochs_are_exported_by_number_and_loss(run: Runs) -> None:
    """An epoch is 50 samples, 6.25 steps of 8: they end with steps 6, 12, 19 and 25."""
    settings = {"steps": 25, "export_every": 1, "keep_exports": 2, "log_every": 1}
    one = run()
    one(**settings)
    losses = {line["step"]: line["valid_loss"] for line in read_log(one.path) if "valid_loss" in line}
    assert list(losses) == [6, 12, 19, 25]
    best = min(losses, key=lambda step: losses[step])
    expected = {f"epoch_{n:03d}-valid_loss_{losses[step]:.4f}" for n, step in ((3, 19), (4, 25))}
    expected |= {f"epoch_{n:03d}-valid_loss_{losses[s]:.4f}" for n, s in ((1, 6), (2, 12)) if s == best}
    assert set(_exports(one)) == expected
    for name in expected:
        config = json.loads((one.path / "exports" / name / "config.json").read_text())
        assert losses[config["step"]] == pytest.approx(float(name.rpartition("_")[2]), abs=1e-4)
        assert (one.path / "exports" / name / "model.safetensors").is_file()

    other = run("other")
    other.rank.saved = lambda: other.rank.request_stop("SIGUSR2")  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        other(**settings)
    run("other")(**settings)
    assert _exports(other) == _exports(one)
    shutil.rmtree(other.path / "exports")  # as if the run had died before it was written
    run("other")(**settings)
    assert _exports(other) == [epoch_name(4, losses[25])]
    assert epoch_name(4, None) == epoch_name(4, float("nan")) == "epoch_004"


def test_an_upload_that_fails_costs_nothing(run: Runs, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    one = run()
    one(hub_repo="somebody/model")
    assert "hub_repo=somebody/model: the upload failed" in caplog.text
    assert (one.path / "export/model.safetensors").is_file()
