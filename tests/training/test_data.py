"""Classifiers learn from every storage format, and are judged on a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stages.conftest import run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, EvaluateConfig, TrainConfig
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.stages import evaluate, train
from pipeline.training.images import ImageDataset

FORMATS = ("mds", "tar", "parquet", "ipc", "memmap", "hdf5")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A third of the digits of the test set, in each format."""
    root = tmp_path_factory.mktemp("digits")
    run_stage("download", dataset="digits", source="digits", split="test", data_dir=str(root), partition_size=150)
    for format in FORMATS:
        sized = {"shape": [8, 8], "im_mode": "RGB"} if format in ("memmap", "hdf5") else {}
        source = str(root / "digits/test/download")
        run_stage("shard", input=source, output=str(root / format), format=format, partition_size=150, **sized)
    return {format: root / format for format in FORMATS}


def images(folder: Path) -> ImageDataset:
    return ImageDataset(RandomAccess(Dataset.open(folder)), 16)


@pytest.mark.parametrize("format", FORMATS[1:])
def test_any_format_gives_the_same_images_and_labels(digits: dict[str, Path], format: str) -> None:
    everything = np.arange(450)
    ours, reference = (images(digits[name]).batch(everything) for name in (format, "mds"))
    assert len(images(digits[format])) == 450 and len(set(ours["labels"].tolist())) == 10
    assert torch.equal(ours["labels"], reference["labels"])
    assert torch.equal(ours["images"], reference["images"])


def run_of(digits: dict[str, Path], output: Path, **settings: Any) -> TrainConfig:
    more = {"input": str(digits["ipc"]), "output": str(output), "task": "classify", "resolution": 16, "depth": 1}
    more |= {"steps": 40, "batch_size": 32, "lr": 0.01, "warmup_steps": 5, "valid_fraction": 0.1, "threads": 1}
    return build(TrainConfig, {**more, "evaluate_every": 10, "ema_decay": 0.9, **settings})


def test_a_run_is_judged_on_a_page(digits: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    run, page = tmp_path / "run", tmp_path / "page"
    train.main(run_of(digits, run))
    evaluate.main(build(EvaluateConfig, {"checkpoint": str(run), "input": str(digits["mds"]), "output": str(page)}))
    result = json.loads((page / "evaluation.json").read_text())
    assert f"test images: class: {round(450 * result['accuracy'])} of 450" in capsys.readouterr().out
    assert 0.3 < result["accuracy"] < result["top5"] <= 1
    assert sum(map(sum, result["confusion"])) == 450
    for name in ("confusion_matrix", "confusion_matrix_normalised", "calibration", "training_curves"):
        with Image.open(page / f"{name}.png") as plot:
            assert len(plot.convert("RGB").getcolors(2**24) or ()) > 10
    html = (page / "evaluation.html").read_text()
    assert "Worst mistakes" in html and html.count("data:image/png") > 24


def test_what_cannot_be_judged_is_refused(digits: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main(build(EvaluateConfig, {"checkpoint": str(tmp_path), "input": str(digits["mds"])}))
    assert ended.value.code == 2
    with pytest.raises(ConfigError, match="classes=3: the data has labels up to 9"):
        train.task_and_data(run_of(digits, tmp_path / "few", classes=3), Dataset.open(digits["ipc"]))
