"""An installed package adds a source, a format, an encoder, a task, a stage and a scorer; Latentmill is not changed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from example_plugin import ROOT, STAGES, install, place, python_path, settings
from PIL import Image

from pipeline.partitions.dataset import Dataset


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def line(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the whole line has run, with two ranks."""
    folder = tmp_path_factory.mktemp("line")
    done = call(installed, "launch/submit.py", *settings(folder), "ranks=2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def call(installed: Path | None, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Latentmill where the package is installed, or (None) is not."""
    environment = {**os.environ, **(python_path(installed) if installed else {"PYTHONPATH": str(ROOT)})}
    command = [program] if program.endswith(".py") else ["-m", program]
    return subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def in_process(installed: Path, code: str) -> str:
    """What Python code prints where the package is installed."""
    environment = {**os.environ, **python_path(installed)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def images(dataset: Dataset) -> list[np.ndarray]:
    found = []
    for index in range(dataset.partitions):
        for stored in dataset.samples(index):
            with Image.open(io.BytesIO(stored.read()["jpg"])) as image:
                found.append(np.asarray(image.convert("RGB")))
    return found


def test_its_source_and_stage_are_part_of_the_main_line(line: Path) -> None:
    drawn, mirrored = Dataset.open(place(line, "filter")), Dataset.open(place(line, "mirror"))
    assert drawn.require_success()["counts"]["kept"] == mirrored.require_success()["counts"]["kept"] == 45
    before, after = images(drawn), images(mirrored)
    assert before[0].shape == (48, 48, 3) and before[0].min() == 0 and before[0].max() > 200
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one[::-1, ::-1], other), "upside_down of the dataset's YAML"


def test_its_format_is_read_and_verified_by_the_others(installed: Path, line: Path) -> None:
    shards = place(line, "shard-jsonl")
    first = json.loads((shards / "data/000/00000").glob("*.jsonl").__next__().read_text().splitlines()[0])
    assert first["key"] == "gradients/000000" and first["caption"].startswith("red that fades")
    checked = call(installed, "pipeline.stages.verify", f"input={shards}", "deep=true")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    file = next(shards.glob("data/000/00001/*.jsonl"))
    file.write_bytes(file.read_bytes().replace(b"fades", b"Fades", 1))
    try:
        damaged = call(installed, "pipeline.stages.verify", f"input={shards}")
        assert damaged.returncode == 1 and "00001" in damaged.stdout + damaged.stderr
    finally:
        file.write_bytes(file.read_bytes().replace(b"Fades", b"fades", 1))


def test_its_encoder_made_the_latents_and_its_task_has_learned_them(line: Path) -> None:
    latents = Dataset.open(place(line, "precompute-embedded"))
    extra = latents.header["extra"]
    assert extra["text_encoder"] == {"name": "letters", "version": 1, "length": 16, "width": 36}
    (stored, *_) = latents.samples(0)
    states = np.frombuffer(stored.read()["caption_latents"], np.float16).reshape(16, 36)
    assert [int(row.argmax()) for row in states[:3]] == [ord(letter) - ord("a") for letter in "red"]
    run = line / "data/gradients/runs/compress"
    told = [json.loads(text) for text in (run / "logs/training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in told if "loss" in entry]
    assert losses[-1] < losses[0]
    about = json.loads((run / "export/config.json").read_text())
    assert about["task"] == "compress" and about["model"] == {"channels": 4, "bottleneck": 3}


def test_its_scorer_fills_a_column(installed: Path, line: Path, tmp_path: Path) -> None:
    scored = call(
        installed,
        "pipeline.stages.score",
        f"input={place(line, 'filter')}",
        f"output={tmp_path / 'score'}",
        "scorers=redness",
    )
    assert scored.returncode == 0, scored.stdout + scored.stderr
    dataset = Dataset.open(tmp_path / "score")
    found = [row.read()["redness"] for index in range(dataset.partitions) for row in dataset.samples(index)]
    assert [round(value) for value in found[:6]] == [1, 0, 0, 1, 0, 0], "red, green and blue in turn"


def test_help_shows_its_options_where_they_have_an_effect(installed: Path) -> None:
    assert "mirror" in call(installed, "launch.command", "--help").stdout
    own = call(installed, "latentmill_example.mirror", "--help").stdout
    assert own.startswith("usage: python -m latentmill_example.mirror") and "upside_down" in own
    for stage, choice, name in (
        ("download", "source=gradients", "gradient_edge"),
        ("train", "task=compress", "bottleneck"),
    ):
        shown = call(installed, f"pipeline.stages.{stage}", choice, "--help").stdout
        assert name in shown, shown
        assert name not in call(installed, f"pipeline.stages.{stage}", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["download", "source=gradient"], "source=gradient: did you mean gradients"),
        (["download", "source=gradients", "gradient_edge=4"], "gradient_edge=4: must be at least 8"),
        (["download", "source=shapes", "gradient_edge=16"], "gradient_edge"),
        (["train", "task=compres"], "task=compres: did you mean compress"),
        (["shard", "format=jsonlines"], "format=jsonlines: did you mean jsonl"),
        (["mirro"], "'mirro' is not a command; did you mean mirror"),
    ],
)
def test_mistakes_are_told_with_its_names(installed: Path, arguments: list[str], message: str) -> None:
    done = call(installed, "launch.command", *arguments, "input=a", "output=b")
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_an_option_that_its_encoder_does_not_take_is_named(installed: Path) -> None:
    code = "from pipeline.encoders.base import text_encoder\ntry: text_encoder('letters#layer=last')\n"
    said = in_process(installed, code + "except ValueError as error: print(error)")
    assert said == "text_encoder=letters#layer=last: letters takes length after the #\n"


def test_a_dataset_of_its_stage_says_what_is_missing_where_it_is_not_installed(line: Path) -> None:
    checked = call(None, "pipeline.stages.verify", f"input={place(line, 'shard-jsonl')}")
    said = checked.stdout + checked.stderr
    assert checked.returncode != 0 and "format=jsonl" in said and "Traceback" not in said, said
    done = call(None, "launch/submit.py", *settings(line))
    assert done.returncode == 2 and "mirror" in done.stderr, done.stderr


def test_the_stages_are_those_of_the_package(installed: Path) -> None:
    listed = in_process(installed, "from pipeline.registry import stages; print(stages.installed())")
    assert listed == "['mirror']\n" and "mirror" in STAGES
