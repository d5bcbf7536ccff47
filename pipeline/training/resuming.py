"""Checks whether a run can resume from its earlier state, and with which settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.config.schema import ConfigError, TrainConfig, default_of, identity
from pipeline.distributed import Rank
from pipeline.storage import Folder
from pipeline.training.checkpoint import Checkpoints, checked_record
from pipeline.training.parallel import precision_of, set_matmul_precision
from pipeline.training.schedule import learning_rate


def settled(config: TrainConfig, found: tuple[str, dict[str, Any]] | None, folder: Folder, rank: Rank) -> TrainConfig:
    """``config`` with settings resolved that depend on the device and on the run that is resumed.

    Raises:
        ConfigError: the run was started with other settings.
    """
    before = found[1]["facts"]["config"] if found else {}
    precision = precision_of(config.precision, rank.device, before.get("precision", ""))
    config = replace(config, precision=precision)
    if found:
        _require_same(before, identity(config), folder, found[1]["step"])
        if rank.is_main:
            rank.log.info("resuming after step %d of %d", found[1]["step"], config.steps)
            if config.steps != before["steps"]:
                rank.log.info(
                    "the run had %d steps: the learning rate goes on as if it had had %d from the start: %.3g",
                    before["steps"],
                    config.steps,
                    learning_rate(config, found[1]["step"], found[1]["facts"]["progress"]["reductions"]),
                )
    set_matmul_precision(precision, rank.device)
    if rank.is_main:
        rank.log.info("precision=%s on %s", precision, rank.device.type)
    return config


def newest_record(checkpoints: Checkpoints, rank: Rank) -> tuple[str, dict[str, Any]] | None:
    """Name and record of the newest checkpoint, the same on all ranks; None if there is none."""
    newest = checkpoints.newest(rank.log) if rank.is_main else None
    name = str(rank.broadcast(newest.name if newest else ""))
    if not name:
        return None
    with checkpoints.folder.folder(name) as folder:
        record = folder.read_sealed("checkpoint.json") if not rank.is_main else checked_record(folder)
    assert record is not None
    return name, record


def _require_same(theirs: dict[str, Any], ours: dict[str, Any], folder: Folder, step: int) -> None:
    """Raises ConfigError if a run resumes with other settings; only a finished run may get more steps."""
    longer = ours["steps"] > theirs["steps"] <= step
    for name, value in ours.items():
        was = theirs.get(name, default_of(TrainConfig, name))  # the setting may not have existed yet
        if was == value or (longer and name in ("steps", "epochs")):
            continue
        hint = "use that, or another name="
        if name in ("steps", "epochs"):
            hint = f"it is at step {step}: finish it first, then it can be extended; or use another name="
        raise ConfigError(f"{name}={value}, but the run in {folder.path} was started with {name}={was}: {hint}")


def require_same_data(facts: dict[str, Any], samples: int, folder: Folder) -> None:
    """Raises ConfigError if a run resumes with another number of samples, which its sampler's state does not fit."""
    if facts["sampler"]["n"] != samples:
        run = folder.path.parent
        raise ConfigError(
            f"the run in {run} was trained on {facts['sampler']['n']} samples, but now there are {samples}: samples "
            "were removed (by a takedown, for example) or added since, and it cannot resume. What it has learned of "
            "removed samples stays in its weights. Choose: name=other trains a new model on the samples that are "
            f"left; with start_from={run} it begins with the weights of this one (not for task=classify)"
        )
