"""FEIDEGGER's chain: from a release's JSON and a server that fails, to a file that a DataLoader reads."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from sources.server import Reply, Server, body, status
from stages.conftest import run_stage
from torch.utils.data import DataLoader

from pipeline.config.cli import build, load
from pipeline.config.schema import ConfigError, FeideggerConfig, TrainConfig
from pipeline.distributed import Rank
from pipeline.feidegger import FeideggerMambaDataset
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.finalize import Unbalanced
from pipeline.stages import feidegger, get_stage
from pipeline.stages.feidegger import DATASET, check, pack
from pipeline.training.tasks.caption import Caption

COUNT, CAPTIONS, SIZE = 20, 3, (40, 30)


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes, two of them the same, with German captions."""
    place = tmp_path_factory.mktemp("dresses")
    (place / "images").mkdir()
    captions = {}
    for number in range(COUNT):
        pixels = np.random.default_rng(max(1, number)).integers(0, 256, (50 + 4 * number, 60, 3), np.uint8)
        pixels = pixels if number else np.random.default_rng(1).integers(0, 256, (54, 60, 3), np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{number}.png")
        captions[f"{number}.png"] = [f"Schönes Kleid Nummer {number}, Länge {i}" for i in range(CAPTIONS)]
    (place / "captions.json").write_text(json.dumps(captions))
    source = {"source": "image_folder", "captions": str(place / "captions.json"), "partition_size": 8}
    run_stage("download", input=str(place / "images"), output=str(place / "download"), **source)
    run_stage("filter", input=str(place / "download"), output=str(place / "filter"), min_image_size=32)
    return place / "filter"


def config(output: Path, **settings: Any) -> FeideggerConfig:
    small = {"image_size": list(SIZE), "max_length": 24, "batch_size": 6}
    return build(FeideggerConfig, {"output_dir": str(output), **small, **settings})


@pytest.fixture(scope="module")
def packed(filtered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed")
    pack(filtered, config(output))
    return output


def test_pixels_lie_there_once_as_uint8(packed: Path) -> None:
    with h5py.File(packed / DATASET) as file:
        assert file["images"].shape == (COUNT, *SIZE, 3) and file["images"].dtype == np.uint8
        assert file["images"].id.get_storage_size() == COUNT * SIZE[0] * SIZE[1] * 3
        assert file["input_ids"].shape == (COUNT * CAPTIONS, 24)
        with (packed / "feidegger_mamba_metadata.csv").open(encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        assert [row["caption"] for row in rows] == [text.decode() for text in file["captions"]]
        for row in rows[::7]:
            picture = np.asarray(Image.open(packed / row["image"]))
            assert (picture == file["images"][int(row["image_index"])]).all()


def test_splits_are_disjoint_by_picture(packed: Path) -> None:
    with h5py.File(packed / DATASET) as file:
        indices = {name: split[:] for name, split in file["splits"].items()}
        owners = {name: set(file["image_index"][:][split].tolist()) for name, split in indices.items()}
        contents = {name: {file["images"][i].tobytes() for i in split} for name, split in owners.items()}
    assert sorted(np.concatenate(list(indices.values()))) == list(range(COUNT * CAPTIONS))
    assert sum(map(len, owners.values())) == COUNT and min(map(len, owners.values())) >= 1
    assert sum(map(len, contents.values())) == COUNT - 1  # the image that is there twice is in one split


def test_the_split_depends_on_the_seed_alone(filtered: Path, packed: Path, tmp_path: Path) -> None:
    def keys(place: Path) -> list[str]:
        return sorted(str(p.relative_to(place)) for p in (place / "images").rglob("*.png"))

    pack(filtered, config(tmp_path / "same", batch_size=5))
    pack(filtered, config(tmp_path / "other", seed=1))
    assert keys(tmp_path / "same") == keys(packed) != keys(tmp_path / "other")


def test_a_loader_with_workers_reads_it(packed: Path) -> None:
    data = FeideggerMambaDataset(packed, "train")
    data[0]  # an open file must not reach the workers
    batches = list(DataLoader(data, batch_size=8, num_workers=4))
    assert sum(len(batch["image"]) for batch in batches) == len(data)
    first = batches[0]
    assert first["image"].shape == (8, 3, *SIZE) and first["image"].dtype == torch.float32
    assert first["image"].min() >= 0 and first["image"].max() <= 1
    assert first["input_ids"].shape == first["attention_mask"].shape == (8, 24)
    texts = data.tokenizer.decode(first["input_ids"])
    assert texts[0].startswith("Schönes Kleid Nummer")
    assert (first["attention_mask"].sum(1) == (first["input_ids"] != data.tokenizer.pad).sum(1)).all()
    with pytest.raises(ConfigError, match="split=dev"):
        FeideggerMambaDataset(packed, "dev")


def test_a_mamba_model_trains_on_it(packed: Path) -> None:
    settings = {"task": "caption", "decoder": "mamba", "encoder": "embedded", "input": str(packed / DATASET)}
    task, data, valid = Caption.from_config(build(TrainConfig, settings), None)
    assert valid is not None and len(data) + len(valid) < COUNT
    assert task.model.config.decoder == "mamba"  # type: ignore[union-attr]
    assert data.batch(np.arange(2))["tokens"].shape == (2, CAPTIONS, 24)


def test_arguments_as_scripts_give_them(tmp_path: Path) -> None:
    arguments = f"--data_path x.json --output_dir {tmp_path} --image_size 96 64 --max_length 32 --batch_size 8"
    more = "--num_workers 3 --language_model google/flan-t5-base --seed 7"
    read = load("feidegger", [*arguments.split(), *more.split()])
    assert (read.image_size, read.max_length, read.num_workers, read.seed) == ((96, 64), 32, 3, 7)
    with pytest.raises(ConfigError, match="image_size"):
        check(load("feidegger", ["--output_dir", "x", "--image_size", "224"]))


def test_from_a_server_that_fails(filtered: Path, tmp_path: Path) -> None:
    """Everything that can be had comes, once; what is gone is left out, and the second run asks for nothing."""
    with Server() as server:
        rows = []
        for number in range(12):
            picture = (filtered.parent / "images" / f"{number}.png").read_bytes()
            captions = [f"Kleid {number}, {i}" for i in range(CAPTIONS)]
            url = server.put(f"/{number}.png", _heals(picture) if number == 3 else picture)
            rows.append({"url": url, "descriptions": captions, "split": str(number % 10)})
        del server.replies["/5.png"]
        (tmp_path / "release.json").write_text(json.dumps(rows), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline.stages.feidegger", "--data_path", str(tmp_path / "release.json")]
        command += ["--output_dir", str(tmp_path / "out"), "--image_size", "40", "30", "--num_workers", "1"]
        command += ["--allow_private_hosts", "true", "--max_failed_fraction", "0.2", "--test_fraction", "0.2"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.asked("/3.png") == 2
        asked = len(server.requests)
        again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert again.returncode == 0, again.stdout + again.stderr
        assert len(server.requests) - asked <= 1  # what was gone may be asked for once more
    with h5py.File(tmp_path / "out" / DATASET) as file:
        assert file["images"].shape == (11, *SIZE, 3)
        assert len(file["captions"]) == 11 * CAPTIONS


def test_what_a_server_that_was_down_has_not_given_is_asked_for_again(
    filtered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = (filtered.parent / "images/2.png").read_bytes()
    monkeypatch.setattr(feidegger, "_stage", lambda name, given: engine.run(get_stage(name)(load(name, given), Rank())))
    with Server() as server:
        urls = [server.put(f"/{number}.png", status(503)) for number in range(4)]
        rows = [{"url": url, "descriptions": [f"Kleid {url}"]} for url in urls]
        (tmp_path / "release.json").write_text(json.dumps(rows))
        given = config(
            tmp_path / "out", data_path=str(tmp_path / "release.json"), allow_private_hosts=True, num_workers=0
        )
        with pytest.raises(Unbalanced, match="4 of 4"):
            feidegger.fetch(given)
        for number in range(4):
            server.put(f"/{number}.png", picture)
        made = Dataset.open(feidegger.fetch(given))
    assert made.require_success()["counts"]["kept"] == 4


def test_a_chain_that_failed_says_what_the_same_command_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feidegger.sys, "executable", "false")
    with pytest.raises(SystemExit):
        feidegger._stage("download", [])
    assert "the same command tries failed images again; max_failed_fraction=" in capsys.readouterr().err


def _heals(picture: bytes) -> Reply:
    fails = iter([True])

    def reply(request: BaseHTTPRequestHandler) -> None:
        if next(fails, False):
            request.send_error(500)
        else:
            body(picture)(request)

    return reply
