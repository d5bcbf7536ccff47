"""A run that was stopped, killed or damaged goes on as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Points, Regression, Run
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pipeline import storage
from pipeline.config.schema import ConfigError, identity
from pipeline.distributed import Stopped
from pipeline.storage import Folder, StorageError
from pipeline.training import loop
from pipeline.training.checkpoint import Checkpoints, Superseded, open_checkpoint, stored_tensors
from pipeline.training.feed import split
from pipeline.training.loop import NotFinite, State

Runs = Callable[..., Run]


def everything(path: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds, as bytes."""
    found = open_checkpoint(path)
    tensors = {(stem, name): t.numpy().tobytes() for stem, part in found.tensors.items() for name, t in part.items()}
    return {"step": found.step, "facts": found.facts, **{str(key): value for key, value in tensors.items()}}


def checkpoints(path: Path) -> list[str]:
    return sorted(os.listdir(path / "checkpoints"))


def stop_in(run: Run, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stop signal come while this life is in its ``step``-th step."""
    batch = run.data.batch
    steps = iter(range(1, 1000))

    def stopping(positions: Any, epochs: Any = None) -> Any:
        if next(steps) == step:
            run.rank.request_stop("SIGTERM")
        return batch(positions, epochs)

    monkeypatch.setattr(run.data, "batch", stopping)


@pytest.mark.parametrize("stop", [1, 4, 5, 11])
def test_a_stopped_run_goes_on_to_the_same_bits(run: Runs, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole")
    whole()
    first = run("stopped")
    stop_in(first, stop, monkeypatch)
    with pytest.raises(Stopped, match=f"stopped after step {stop} of 12"):
        first()
    assert open_checkpoint(first.path).step == stop
    second = run("stopped")
    second()
    assert everything(second.path) == everything(whole.path)
    assert first.data.seen + second.data.seen == whole.data.seen


def test_a_checkpoint_has_more_than_weights(run: Runs) -> None:
    one = run()
    state: State = one()
    found = open_checkpoint(one.path)
    assert found.step == 12
    assert found.facts["sampler"]["position"] == 96 and found.facts["ema_updates"] == 12
    assert found.facts["config"]["batch_size"] == 8 and found.facts["shape"] == [4, 1]
    assert set(found.tensors) == {"model", "ema", "optimizer"}
    assert found.facts["best_step"] == 12
    assert torch.equal(
        found.tensors["optimizer"]["0.weight/exp_avg"], state.optimizer.state[state.model[0].weight]["exp_avg"]
    )
    assert not torch.equal(found.tensors["ema"]["0.weight"], found.tensors["model"]["0.weight"])


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/evil",)


def test_metadata_that_would_run_code_is_refused(run: Runs) -> None:
    one = run()
    one()
    file = one.path / "checkpoints/step_000012/.metadata"
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(StorageError, match="refers to posix.system"):
        stored_tensors(file.parent)


def test_checkpoints_are_in_the_layout_of_dcp(run: Runs, tmp_path: Path) -> None:
    one = run()
    state = one()
    dcp_to_torch_save(one.path / "checkpoints/step_000012", tmp_path / "all.pt")
    tensors = torch.load(tmp_path / "all.pt", weights_only=True)
    assert torch.equal(tensors["model/0.weight"], state.model.state_dict()["0.weight"])


def test_a_finished_run_stays_as_it_is(run: Runs) -> None:
    one = run()
    one()
    before = everything(one.path)
    again = run()
    again()
    assert everything(again.path) == before
    assert again.data.seen == []


def test_only_the_newest_checkpoints_are_kept(run: Runs) -> None:
    one = run()
    one(keep_checkpoints=2, checkpoint_every=3)
    assert checkpoints(one.path) == ["step_000009", "step_000012"]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(run: Runs, caplog: Any) -> None:
    whole = run("whole")
    whole()
    one = run()
    one()
    file = one.path / "checkpoints" / "step_000012" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again = run()
    again()
    assert "__0_0.distcp is damaged" in caplog.text
    assert again.data.seen == whole.data.seen[10 * 8 :]
    assert everything(again.path) == everything(whole.path)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checkpoint.json"])
def test_a_checkpoint_with_a_missing_file_is_not_used(run: Runs, name: str) -> None:
    one = run()
    one()
    (one.path / "checkpoints" / "step_000012" / name).unlink()
    again = run()
    again()
    assert len(again.data.seen) == 2 * 8


@pytest.mark.parametrize("operation", ["mkdir", "create", "write", "fsync", "rename"])
def test_a_life_that_dies_while_saving_leaves_no_half_checkpoint(
    run: Runs, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at the first such operation of step 10; what it left is cleared away by the next life."""
    whole = run("whole")
    whole()

    class Dead(BaseException):
        pass

    dead = False

    def die(kind: str, path: str, do: Callable[[], Any]) -> Any:
        nonlocal dead
        dead = dead or (kind == operation and "step_000010" in path)
        if dead:
            raise Dead
        return do()

    monkeypatch.setattr(storage, "interpose", die)
    one = run()
    with pytest.raises(Dead):
        one()
    monkeypatch.setattr(storage, "interpose", None)
    assert [name for name in checkpoints(one.path) if not name.startswith(".")] == ["step_000000", "step_000005"]
    again = run()
    again()
    assert checkpoints(again.path) == ["step_000010", "step_000012"]
    assert everything(again.path) == everything(whole.path)


def test_a_full_disk_is_an_error_that_leaves_the_checkpoints_before(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(kind: str, path: str, do: Callable[[], Any]) -> Any:
        if kind == "write" and "step_000010" in path:
            raise OSError(28, "No space left on device")
        return do()

    monkeypatch.setattr(storage, "interpose", full)
    one = run()
    with pytest.raises(OSError, match="No space left"):
        one()
    assert checkpoints(one.path) == ["step_000000", "step_000005"]


def test_of_two_processes_that_train_one_run_the_slower_ends(tmp_path: Path) -> None:
    with Folder.open(tmp_path) as folder:
        first, second = (Checkpoints(folder, life, keep=2) for life in ("a", "b"))
        first.save(5, {"by": "first"}, {"model/w": torch.ones(1)})
        with pytest.raises(Superseded, match="another process is training this run"):
            second.save(5, {"by": "second"}, {"model/w": torch.ones(1)})
    assert open_checkpoint(tmp_path).facts == {"by": "first"}
    assert checkpoints(tmp_path) == ["step_000005"]


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"batch_size": 4}, {"seed": 1}, {"steps": 11}])
def test_other_settings_do_not_go_on_with_the_run(run: Runs, change: dict[str, Any]) -> None:
    run()()
    name, value = next(iter(change.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}, but the run in .* was started with {name}="):
        run()(**change)


def test_a_finished_run_can_be_given_more_steps(run: Runs, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO", "pipeline")
    run()(schedule="constant", warmup_steps=0)
    one = run()
    one(schedule="constant", warmup_steps=0, steps=16)
    assert "the run had 12 steps" in caplog.text
    whole = run("whole")
    whole(schedule="constant", warmup_steps=0, steps=16)
    assert open_checkpoint(one.path).step == 16 and len(one.data.seen) == 4 * 8
    for part in ("model", "optimizer"):
        ours, theirs = (open_checkpoint(path).tensors[part] for path in (one.path, whole.path))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    unfinished = run("unfinished")
    stop_in(unfinished, 4, monkeypatch)
    with pytest.raises(Stopped):
        unfinished()
    with pytest.raises(
        ConfigError, match="steps=13, but the run in .* was started with steps=12: it is at step 4: fin"
    ):
        run("unfinished")(steps=13)


def test_a_run_whose_samples_were_removed_says_what_can_be_done(run: Runs) -> None:
    run()()
    again = run()
    again.data.x, again.data.y = again.data.x[:-1], again.data.y[:-1]
    with pytest.raises(ConfigError, match="trained on 50 samples, but now there are 49: .*takedown.*name=other.*start"):
        again(steps=20)


@pytest.mark.parametrize(("fraction", "message"), [(0.99, "trained on"), (0.1, "kept for validation")])
def test_a_validation_set_that_leaves_nothing_is_refused(fraction: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"valid_fraction={fraction}: of 3 samples, none would be {message}"):
        split(Points(3), fraction, 0)


def test_a_run_from_before_there_was_a_setting_goes_on(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(loop, "identity", lambda config: {k: v for k, v in identity(config).items() if k != "enlarge"})
        run()()
    run()()
    with pytest.raises(ConfigError, match="enlarge=2.0, but the run in .* was started with enlarge=1.0"):
        run()(enlarge=2.0)


def test_settings_that_do_not_change_the_result_may_change(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole")
    whole()
    one = run()
    stop_in(one, 4, monkeypatch)
    with pytest.raises(Stopped):
        one(checkpoint_every=3, log_every=1)
    again = run()
    again(checkpoint_every=2, keep_checkpoints=1)
    assert everything(again.path) == everything(whole.path)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(run: Runs) -> None:
    one = run()
    poisoned = Regression(poison=7)
    with pytest.raises(NotFinite, match="step 8: loss nan.*1 steps in a row .max_skipped=0"):
        one(task=poisoned, max_skipped=0)
    assert open_checkpoint(one.path).step == 5
    assert all(p.isfinite().all() for p in poisoned.model.parameters())


def test_a_step_that_is_not_finite_is_left_out_and_counted(run: Runs, caplog: Any) -> None:
    one = run()
    state = one(task=Regression(poison=7))
    assert state.step == 12 and state.ema.updates == 11
    assert (state.skipped, state.skipped_ever) == (0, 1)
    assert "step 8 is left out: loss nan" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(run: Runs) -> None:
    class Wider(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 1))

    run()()
    with pytest.raises(ConfigError, match=r"is of another model: model/0.weight is 8x4 there, 9x4 here"):
        run()(task=Wider(), steps=12)


def test_the_best_checkpoint_outlives_newer_ones_and_a_run_without_gain_stops(run: Runs) -> None:
    class Worse(Regression):
        """Its metric gets no better after the second evaluation."""

        seen = 0

        def measure(self, network: nn.Module, batch: Any, keys: Any) -> Any:
            losses, weights = super().measure(network, batch, keys)["valid_loss"]
            self.seen += 1
            return {"valid_loss": (torch.full_like(losses, -min(self.seen, 8)), weights)}

    one = run()
    state = one(task=Worse(), steps=100, evaluate_every=2, early_stop=3, keep_checkpoints=1)
    assert state.progress.without_gain == 3
    assert state.step == state.progress.best_step + 6
    assert checkpoints(one.path) == [f"step_{step:06d}" for step in (state.progress.best_step, state.step)]
    assert json.loads((one.path / "export/config.json").read_text())["step"] == state.progress.best_step
