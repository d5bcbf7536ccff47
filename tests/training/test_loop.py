"""The loop: the same result in parts and over ranks, a log that can be read, rates as scheduled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_training import Regression, Run

from pipeline.config.schema import TrainConfig
from pipeline.distributed.environment import free_port
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.ema import Ema
from pipeline.training.loggers import read_log
from pipeline.training.schedule import learning_rate

Runs = Callable[..., Run]
REPOSITORY = Path(__file__).parents[2]
ONE_RANK = """
import sys
from itertools import pairwise
from pathlib import Path
import torch
from pipeline.distributed import distributed
from tiny_training import Regression, Run

torch.set_num_threads(1)

@distributed(timeout=60)
def main(rank, stop_in):
    run = Run(Path(sys.argv[1]), rank)
    batch, steps = run.data.batch, iter(range(1, 100))
    def counted(positions, epochs=None):
        if next(steps) == stop_in:
            rank.request_stop("SIGTERM")
        return batch(positions, epochs)
    run.data.batch = counted
    run(task=Regression(plain=True))

main(int(sys.argv[2]))
"""


def weights(path: Path) -> dict[str, torch.Tensor]:
    return open_checkpoint(path).tensors["model"]


def test_a_batch_in_parts_gives_the_same_step(run: Runs) -> None:
    whole, parts = run("whole"), run("parts")
    whole(task=Regression(plain=True))
    parts(task=Regression(plain=True), micro_batch=3)
    assert whole.data.seen == parts.data.seen
    torch.testing.assert_close(weights(whole.path), weights(parts.path), atol=1e-5, rtol=1e-4)


def start_ranks(path: Path, stops: list[int]) -> list[int]:
    """Exit codes of one process a rank; rank i gets a stop signal in step ``stops[i]`` (0: never)."""
    port = free_port()
    processes = []
    for rank, stop in enumerate(stops):
        place = {
            "RANK": rank,
            "WORLD_SIZE": len(stops),
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environment["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
        command = [sys.executable, "-c", ONE_RANK, str(path), str(stop)]
        processes.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY))
    return [process.wait(timeout=120) for process in processes]


def test_ranks_learn_what_one_learns_and_all_stop_when_one_is_told_to(run: Runs, tmp_path: Path) -> None:
    one = run("one")
    one(task=Regression(plain=True))
    assert start_ranks(tmp_path / "two", stops=[0, 4]) == [75, 75]
    assert open_checkpoint(tmp_path / "two").step == 4
    resumed = run("two")  # as a single rank
    resumed(task=Regression(plain=True))
    assert resumed.data.seen == one.data.seen[4 * 8 :]
    torch.testing.assert_close(weights(resumed.path), weights(one.path), atol=1e-5, rtol=1e-4)


def test_the_log_has_a_line_for_every_few_steps_and_the_metrics_at_the_end(run: Runs) -> None:
    one = run()
    one(log_every=5, warmup_steps=4, lr=0.01)
    lines = [json.loads(text) for text in (one.path / "logs/training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12, 12]
    assert {"loss", "lr", "grad_norm", "samples_per_second", "epoch", "time"} <= set(lines[0])
    assert lines[-1]["training"] == 0.0
    assert lines[0]["loss"] > lines[2]["loss"]


def test_training_lowers_the_loss(run: Runs) -> None:
    one = run()
    one(steps=150, lr=0.02, log_every=10, task=Regression(plain=True))
    losses = [line["loss"] for line in read_log(one.path) if "loss" in line]
    assert losses[-1] < 0.1 * losses[0]


def test_the_rate_rises_then_falls_to_zero() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=4, steps=20)
    rates = [learning_rate(config, step) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[12] == pytest.approx(0.5) and rates[20] == pytest.approx(0)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert learning_rate(replace(config, warmup_steps=0), 0) == 1.0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {5: 1.0, 99: 1.0}),
        ("step", {29: 1.0, 31: 0.1, 61: 0.01, 99: 0.001}),
        ("wsd", {50: 1.0, 70: 1.0, 85: 0.5005, 100: 0.001}),
        ("cosine", {50: 0.5005, 100: 0.001}),
        ("plateau", {5: 1.0, 99: 1.0}),
    ],
)
def test_schedules(schedule: str, rates: dict[int, float]) -> None:
    config = TrainConfig(lr=1.0, warmup_steps=0, steps=100, min_lr=0.001, schedule=schedule)
    assert {step: learning_rate(config, step) for step in rates} == pytest.approx(rates)
    if schedule == "plateau":
        assert [learning_rate(config, 9, n) for n in (1, 2, 5)] == pytest.approx([0.1, 0.01, 0.001])


def test_averages_follow_the_weights_and_forget_the_start_soon() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 5.0)
    ema = Ema(model, decay=0.9)
    torch.nn.init.constant_(model.weight, 1.0)
    ema.update(model)
    assert float(ema.weights()["weight"]) == pytest.approx(1.4)  # decay 0.1 at first
    for _ in range(200):
        ema.update(model)
    assert float(ema.weights()["weight"]) == pytest.approx(1.0)
    torch.nn.init.constant_(model.weight, 0.0)
    ema.update(model)
    assert float(ema.weights()["weight"]) == pytest.approx(0.9)
