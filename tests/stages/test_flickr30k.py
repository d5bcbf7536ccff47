"""Flickr30k as it is published, from the download to captions of its test images, by Karpathy's split."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sources.hub import put_repo
from sources.packing import zip_of
from sources.server import Server

from pipeline.config import cli
from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.distributed import Rank, Stopped
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.stage import place_of
from pipeline.stages import get_stage
from pipeline.storage import Folder
from pipeline.training.feed import Picked
from pipeline.training.loggers import read_log
from pipeline.training.loop import train
from pipeline.training.tasks.base import Keys
from pipeline.training.tasks.caption import Caption

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (20, 40, 220), "yellow": (230, 220, 30)}
SPLITS = ("train", "train", "val", "train", "restval", "test")
COUNT = 24


def split_of(number: int) -> str:
    return SPLITS[number // 4]


def captions_of(number: int) -> list[str]:
    colour = list(COLOURS)[number % 4]
    return [f"{article} {colour} {noun} ." for article in ("A", "One") for noun in ("wall", "door")] + [
        f"All {colour} ."
    ]


def photo(number: int) -> bytes:
    pixels = np.full((260, 270 + number, 3), COLOURS[list(COLOURS)[number % 4]], np.int64)
    noise = np.random.default_rng(number).integers(-9, 9, pixels.shape)
    file = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All images, downloaded, sharded, and as features; and Karpathy's file."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("flickr30k")
    table = io.StringIO()
    writer = csv.DictWriter(table, ["raw", "sentids", "split", "filename", "img_id"])
    writer.writeheader()
    images = [{"filename": f"{1000 + n}.jpg", "split": split_of(n), "imgid": n} for n in range(COUNT)]
    for n, image in enumerate(images):
        raw = json.dumps(captions_of(n))
        about = {"raw": raw, "sentids": "[]", "img_id": n, "filename": image["filename"], "split": image["split"]}
        writer.writerow(about)
    archive = zip_of({f"flickr30k-images/{1000 + n}.jpg": photo(n) for n in range(COUNT)})
    (place / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    shared = ["dataset=flickr30k", "split=all", f"data_dir={place}"]
    with Server() as server, pytest.MonkeyPatch.context() as patch:
        files = {"flickr30k-images.zip": archive, "flickr_annotations_30k.csv": table.getvalue().encode()}
        put_repo(server, "nlphuji/flickr30k", files)
        patch.setenv("HF_ENDPOINT", server.url(""))
        patch.delenv("HF_TOKEN", raising=False)
        stage("download", *shared, "allow_private_hosts=true", "check_space=false")
    for name in ("filter", "shard", "features"):
        stage(name, *shared)
    return place


def stage(name: str, *arguments: str) -> None:
    success = engine.run(get_stage(name)(cli.load(name, arguments), Rank()))
    assert success["counts"]["kept"] == COUNT


def settings(data: Path, *more: str) -> TrainConfig:
    arguments = ["task=caption", "dataset=flickr30k", "split=all", f"data_dir={data}", "max_length=24", "batch_size=8"]
    arguments += ["lr=0.01", "warmup_steps=4", "ema_decay=0.5", "log_every=1", "vocab_size=300"]
    config: TrainConfig = cli.load("train", [*arguments, *more])
    return config


def features_of(data: Path) -> Dataset:
    return Dataset.open(place_of(settings(data), "features"))


def numbers(data: Path, places: np.ndarray) -> set[int]:
    keys = RandomAccess(features_of(data))
    return {int(keys.key(int(place)).rpartition("/")[2].removesuffix("-jpg")) - 1000 for place in places}


def test_training_by_karpathys_split(data: Path, tmp_path: Path) -> None:
    file = data / "dataset_flickr30k.json"
    config = settings(data, f"split_file={file}", "steps=12", "export_every=2")
    features = features_of(data)

    def life(rank: Rank) -> None:
        task, trained, valid = Caption.from_config(config, features)
        assert isinstance(task, Caption) and isinstance(trained, Picked) and isinstance(valid, Picked)
        seen = {name: numbers(data, part.at) for name, part in (("train", trained), ("valid", valid))}
        assert seen["train"] == {n for n in range(COUNT) if split_of(n) in ("train", "restval")}
        assert seen["valid"] == {n for n in range(COUNT) if split_of(n) == "val"}
        with Folder.open(tmp_path / "run", create=True) as run:
            train(task, trained, config, rank, run, valid)

    stopped = Rank()
    stopped.saved = lambda: stopped.request_stop("SIGUSR2")  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        life(stopped)
    life(Rank())
    steps = [line["step"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 13))
    exports = sorted(path.name for path in (tmp_path / "run/exports").iterdir())
    assert [name.partition("-valid_loss_")[0] for name in exports] == ["epoch_002", "epoch_004", "epoch_006"]

    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "run" / "exports" / exports[-1], alone)
    shutil.rmtree(tmp_path / "run")
    command = [sys.executable, "-m", "pipeline.stages.caption", f"checkpoint={alone}", f"output={tmp_path / 'out'}"]
    command += [f"image_path={data / 'flickr30k/all/shard-mds'}", f"split_file={file}", "split=test"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": ""}  # without Java
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "bleu_4" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    written = {int(line["image"].rpartition("/")[2].removesuffix("-jpg")) - 1000: line for line in lines}
    assert set(written) == {n for n in range(COUNT) if split_of(n) == "test"}
    assert all(line["references"] == captions_of(n) for n, line in written.items())


def test_what_does_not_go_together_is_said(data: Path, tmp_path: Path) -> None:
    features = features_of(data)
    file = data / "dataset_flickr30k.json"
    with pytest.raises(ConfigError, match="leave out valid_input=, valid_fraction="):
        Caption.from_config(settings(data, f"split_file={file}", "valid_fraction=0.1"), features)
    other = tmp_path / "other.csv"
    other.write_text("filename,split\n1.jpg,train\n")
    with pytest.raises(ConfigError, match="assigns none of these 24 images to train"):
        Caption.from_config(settings(data, f"split_file={other}"), features)
    with pytest.raises(ConfigError, match="flip=0.5: .*encoder="):
        Caption.from_config(replace(settings(data, f"split_file={file}"), flip=0.5), features)


def test_pictures_of_training_alone_are_augmented(data: Path) -> None:
    shards = Dataset.open(data / "flickr30k/all/shard-mds")
    plain, _, _ = Caption.from_config(settings(data, "encoder=embedded"), shards)
    task, trained, _ = Caption.from_config(settings(data, "encoder=embedded", "flip=0.5", "crop_scale=0.5"), shards)
    positions = np.arange(6)
    batch = trained.batch(positions)

    def pixels(which: object, step: int, epoch: int, some: slice = slice(None)) -> torch.Tensor:
        assert isinstance(which, Caption)
        keys = Keys(0, step, positions[some], positions[some], np.full(len(positions[some]), epoch))
        return which.prepare({name: tensor[some] for name, tensor in batch.items()}, keys)["pixels"]

    first = pixels(task, 1, 0)
    assert torch.equal(first, pixels(task, 9, 0))  # of the epoch and the sample, not of the step
    assert torch.equal(first[2:4], pixels(task, 1, 0, slice(2, 4)))  # nor of those next to it
    assert not torch.equal(first, pixels(task, 1, 1))
    assert not torch.equal(first, pixels(plain, 1, 0))
    assert torch.equal(pixels(task, -1, 0), pixels(plain, -1, 0)) and torch.equal(
        pixels(plain, 1, 0), pixels(plain, 1, 1)
    )
