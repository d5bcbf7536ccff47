"""stage=train as a program: what it refuses leaves a run as it is, and what goes wrong is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stages.conftest import run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.stages.train import main
from pipeline.telemetry.events import last_events

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("digits")
    run_stage("download", output=str(place / "download"), source="digits", fraction=0.05)
    run_stage("filter", input=str(place / "download"), output=str(place / "filter"), min_image_size=0)
    run_stage("shard", input=str(place / "filter"), output=str(place / "shard"))
    return place / "shard"


def settings(shards: Path, run: Path, **more: Any) -> dict[str, Any]:
    small = {
        "task": "classify",
        "resolution": 8,
        "depth": 1,
        "steps": 2,
        "batch_size": 8,
        "warmup_steps": 1,
        "threads": 1,
    }
    return {"input": str(shards), "output": str(run), **small, **more}


def fit(shards: Path, run: Path, **more: Any) -> None:
    main(build(TrainConfig, settings(shards, run, **more)))


def test_a_refused_command_leaves_a_finished_run_finished_and_more_epochs_extend_it(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fit(shards, run, steps=1000, epochs=0.2)
    for refused in ({"steps": 1000, "epochs": 0.2, "lr": 0.5}, {"steps": 1000, "epochs": 0.1}):
        with pytest.raises(ConfigError, match="but the run in .* was started with"):
            fit(shards, run, **refused)
        assert [event["event"] for event in last_events(run)] == ["finish"]
    fit(shards, run, steps=1000, epochs=0.4)
    assert {event["event"] for event in last_events(run)} == {"finish"}
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_many_tokens_are_warned_of_with_their_cost(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.training.tasks.classify._MANY_TOKENS", 3)
    fit(shards, tmp_path / "run")
    assert "cuts images of 8 px into patches of 4 px: 4 tokens, 0.0 GFLOP" in capsys.readouterr().err
    fit(shards, tmp_path / "other", patch=4)  # as asked for
    assert "cuts images" not in capsys.readouterr().err


def test_a_loss_that_stays_nan_ends_in_one_line(shards: Path, tmp_path: Path) -> None:
    arguments = settings(shards, tmp_path / "run", steps=9, lr=1e30, clip_norm=1e30, max_skipped=1).items()
    command = [sys.executable, "-m", "pipeline.stages.train", *(f"{name}={value}" for name, value in arguments)]
    environment = {**os.environ, "LATENTMILL_LOG": "ERROR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "2 steps in a row (max_skipped=1)" in done.stderr and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: step ")]
