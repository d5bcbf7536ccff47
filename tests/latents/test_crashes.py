"""Ranks that are killed while they encode lose nothing, repeat nothing, and leave nothing that others could see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_stage import committed, rank_of, rows
from latents.conftest import COUNT, Make

from pipeline.config.cli import build
from pipeline.config.schema import PrecomputeConfig
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.stages.precompute import Precompute

FEATURES = {"image_features": "embedded", "features_resolution": (24, 32)}
SETTINGS = {"image_resolutions": (32, 64), "vae": "embedded16", "batch_size": "5", **FEATURES}
_KILLED = """
import os, signal, sys
from importlib import import_module
from pipeline.config.cli import config_for
from pipeline.stages import get_stage
name = sys.argv.pop(1)
stage, main = get_stage(name), import_module(f"pipeline.stages.{name}").main
process, left = stage.process, [int(sys.argv.pop(1))]
def killing(self, partition, context):
    for outcome in process(self, partition, context):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        yield outcome
stage.process = killing
main(config_for(name))
"""


def killed(rank: int, ranks: int, sample: int, *settings: str, stage: str = "precompute") -> subprocess.Popen[str]:
    """A rank of ``stage`` that is killed at its ``sample``-th sample."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment = {**os.environ, **place, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", _KILLED, stage, str(sample), *settings]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("ranks", [1, 3])
def test_killed_ranks_lose_and_repeat_nothing(make: Make, tmp_path: Path, ranks: int) -> None:
    reference = make("batches-of-five", batch_size="5", **FEATURES)
    place = tmp_path / "latents"
    given = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in SETTINGS.items()]
    given += [f"input={reference.header['upstream']['path']}", f"output={place}", "workers=1"]
    lives = [killed(0, 2, 15, *given), killed(1, 2, 8, *given)]  # in its second partition, and in its first
    for life in lives:
        _, said = life.communicate(timeout=300)
        assert life.returncode == -signal.SIGKILL, said
    before = committed(place)
    assert 0 < len({path.split("/")[2] for path in before}) < reference.partitions
    config = build(PrecomputeConfig, {**SETTINGS, "input": reference.header["upstream"]["path"], "output": str(place)})
    engine.run(Precompute(config, rank_of(ranks - 1, ranks)))
    after = committed(place)
    assert before.items() <= after.items() and after == committed(reference.root.path)
    keys = [row["key"] for row in rows(place)]
    assert len(keys) == len(set(keys)) == COUNT == len(Dataset.open(place))
