"""Classifiers learn from stored images; what is done to an image depends on seed, epoch and sample alone."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.schema import ConfigError, EvaluateConfig, TrainConfig
from pipeline.distributed import Rank, Stopped
from pipeline.metrics.classes import scores
from pipeline.storage import Folder
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.feed import split
from pipeline.training.images import Augmentation, ImageDataset, mixes
from pipeline.training.loop import train
from pipeline.training.tasks.base import Keys
from pipeline.training.tasks.classify import Classify, _mixed

EVERYTHING: dict[str, Any] = {"crop_scale": 0.5, "flip": 0.5, "rotate": 20.0, "shear": 0.1, "shift": 2.0}
EVERYTHING |= {"randaugment": 2, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}


class Stripes:
    """Pictures of stripes, upright or level, stored as PNG."""

    def __len__(self) -> int:
        return 60

    def rows(self, positions: Any) -> list[dict[str, Any]]:
        return [self._row(int(position)) for position in positions]

    def _row(self, i: int) -> dict[str, Any]:
        random = np.random.default_rng(i)
        pixels = np.full((16, 16, 3), 255 * (np.arange(16)[:, None, None] // 2 % 2), np.uint8)
        pixels = pixels if i % 2 else pixels.transpose(1, 0, 2)
        file = BytesIO()
        Image.fromarray((pixels * 0.7 + random.integers(0, 70, pixels.shape)).astype(np.uint8)).save(file, "PNG")
        return {"key": f"{'level' if i % 2 else 'upright'}/{i}", "jpg": file.getvalue(), "label": i % 2}


def config(**settings: Any) -> TrainConfig:
    small = {"task": "classify", "steps": 12, "batch_size": 8, "depth": 1, "warmup_steps": 2, "valid_fraction": 0.2}
    return TrainConfig(**{**small, "ema_decay": 0.8, "evaluate_every": 4, "checkpoint_every": 5, **settings})


def keys(positions: np.ndarray, epoch: int = 0, step: int = 0) -> Keys:
    return Keys(0, step, np.arange(len(positions)), positions, np.full(len(positions), epoch))


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return ImageDataset(Stripes(), 16)


def test_images_come_as_stored_with_their_labels(data: ImageDataset) -> None:
    batch = data.batch(np.array([5, 2]))
    assert batch["images"].shape == (2, 3, 16, 16) and batch["images"].dtype == torch.uint8
    assert batch["labels"].tolist() == [1, 0]
    assert data.names == {0: "upright", 1: "level"}


def test_an_augmented_image_depends_on_seed_epoch_and_sample_alone(data: ImageDataset) -> None:
    augment = Augmentation(config(**EVERYTHING))
    some, part = np.arange(6), np.array([4, 1])
    whole = augment(data.batch(some)["images"], keys(some, epoch=3))
    torch.testing.assert_close(augment(data.batch(part)["images"], keys(part, epoch=3)), whole[part], rtol=0, atol=0)
    assert not torch.equal(augment(data.batch(some)["images"], keys(some, epoch=4)), whole)


def test_no_augmentation_leaves_images_as_they_are(data: ImageDataset) -> None:
    images = data.batch(np.arange(6))["images"]
    assert torch.equal(Augmentation(config())(images, keys(np.arange(6))), images)


def test_crops_are_taken_from_larger_images_and_evaluation_sees_their_middle(data: ImageDataset) -> None:
    task = Classify(config(resolution=12, crop_scale=0.5), data)
    batch = data.batch(np.arange(6))
    assert task.prepare(batch, keys(np.arange(6)))["images"].shape == (6, 3, 12, 12)
    seen = task.prepare(batch, keys(np.arange(6), step=-1))["images"]
    assert torch.equal(seen, batch["images"][:, :, 2:14, 2:14])
    assert task.preprocessing()["size"] == 12 and task.preprocessing()["edge"] == 16


def test_mirrored_images_are_mirrored(data: ImageDataset) -> None:
    images = data.batch(np.arange(6))["images"]
    assert torch.equal(Augmentation(config(flip=1.0))(images, keys(np.arange(6))), images.flip(3))


def test_pairs_are_mixed_alike_on_any_number_of_ranks() -> None:
    whole = Keys(0, 3, np.arange(8), np.arange(8), np.zeros(8))
    halves = [Keys(0, 3, np.arange(i, i + 4), np.arange(4), np.zeros(4)) for i in (0, 4)]
    both = config(mixup=0.8, cutmix=1.0)
    parts = [mixes(half, both, 16, 16) for half in halves]
    for name, values in mixes(whole, both, 16, 16).items():
        assert torch.equal(values, torch.cat([part[name] for part in parts]))
    with pytest.raises(ConfigError, match="batch_size= must be a multiple of twice the number of ranks"):
        mixes(Keys(0, 3, np.arange(3, 6), np.arange(3), np.zeros(3)), both, 16, 16)


def test_labels_are_mixed_as_much_as_pixels() -> None:
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    targets = torch.eye(2)
    for box in ([0, 0, 0, 0], [0, 4, 0, 4]):
        keep = torch.full((2,), 0.75)
        mixed, labels = _mixed(images, targets, keep, torch.tensor([box, box]))
        assert mixed.mean((1, 2, 3)).tolist() == pytest.approx([0.25, 0.75])
        assert labels.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def fit(path: Path, data: ImageDataset, rank: Rank | None = None, **settings: Any) -> None:
    path.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    training, valid = split(data, 0.2, 0)
    with Folder.open(path) as folder:
        task = Classify(config(**settings), data)
        train(task, training, config(**settings), rank or Rank(), folder, valid)


def test_stripes_are_told_apart_and_the_best_checkpoint_exported(data: ImageDataset, tmp_path: Path) -> None:
    fit(tmp_path / "run", data, steps=60, lr=0.01, evaluate_every=10, early_stop=3)
    found = open_checkpoint(tmp_path / "run", "best")
    assert found.facts["progress"]["best"] == 1.0
    assert found.facts["classes"] == ["upright", "level"]
    assert open_checkpoint(tmp_path / "run").step < 60  # stopped early
    files = {path.name for path in (tmp_path / "run/export").iterdir()}
    assert files == {"model.safetensors", "config.json", "preprocessing.json", "README.md"}


def test_training_with_every_augmentation_and_workers_goes_on_to_the_bit(data: ImageDataset, tmp_path: Path) -> None:
    settings = {**EVERYTHING, "drop_path": 0.3, "dropout": 0.1, "micro_batch": 4}
    fit(tmp_path / "whole", data, **settings)
    stopping = Rank()
    for rank, workers in ((stopping, 1), (Rank(), 0)):
        if rank is stopping:
            rank.saved = lambda: stopping.request_stop("SIGUSR2")  # type: ignore[method-assign]
            with pytest.raises(Stopped):
                fit(tmp_path / "run", data, rank, workers=workers, **settings)
        else:
            fit(tmp_path / "run", data, rank, workers=workers, **settings)
    whole, ours = (open_checkpoint(tmp_path / name) for name in ("whole", "run"))
    assert whole.facts == ours.facts
    for part, tensors in whole.tensors.items():
        assert all(torch.equal(tensor, ours.tensors[part][name]) for name, tensor in tensors.items())


def test_scores_of_known_predictions() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7]])
    result = scores(probabilities, np.array([0, 0, 1, 1]))
    assert result["accuracy"] == 0.5 and result["top5"] == 1.0
    assert result["confusion"] == [[1, 1], [1, 1]]
    assert result["classes"][0] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert result["ece"] == pytest.approx((0.1 + 0.6 + 0.8 + 0.3) / 4)


def test_more_classes_in_the_data_than_said_are_refused(data: ImageDataset) -> None:
    with pytest.raises(ConfigError, match="classes=1: the data has labels up to 1"):
        Classify(config(classes=1), data)
    assert EvaluateConfig().metric == ""
