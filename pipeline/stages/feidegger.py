"""stage=feidegger: prepare FEIDEGGER, dresses with German captions (github.com/zalandoresearch/feidegger).

Runs download and filter in ``<output_dir>/work``, which fetch and check each image once, with retries; then resizes
all images to one size and packs them into one file. Running the same command again resumes.

    images/<split>/<key>.png             the processed images
    feidegger_mamba_dataset.h5           pixels once per image (n, h, w, 3) uint8; tokens per caption; splits
    feidegger_mamba_metadata.csv         a row for each caption
    tokenizer/                           vocab.json, merges.txt, tokenizer.json
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.schema import ConfigError, FeideggerConfig
from pipeline.imaging import transform
from pipeline.partitions.dataset import Dataset, SlotReader, Stored, Unfinished
from pipeline.randomness import digest
from pipeline.registry import stages

if TYPE_CHECKING:
    from pipeline.encoders.tokenizer import Tokenizer

DATASET = "feidegger_mamba_dataset.h5"
METADATA = "feidegger_mamba_metadata.csv"
SPLITS = ("train", "val", "test")
_SMALLEST = 32  # pixels: smaller images are dropped


@dataclass
class DressImage:
    """A kept image; images with equal ``content`` are put in the same split."""

    stored: Stored
    content: str
    captions: list[str]
    split: str = ""


@stages.register("feidegger", FeideggerConfig)
def main(config: FeideggerConfig) -> None:
    with errors_as_one_line():
        check(config)
        filtered = fetch(config)
        report = pack(filtered, config)
    print("\n".join(f"{name}: {value}" for name, value in report.items()))


def check(config: FeideggerConfig) -> None:
    """Check that the settings fit together.

    Raises:
        ConfigError: names the settings that do not.
    """
    if config.valid_fraction + config.test_fraction >= 1:
        raise ConfigError(
            f"valid_fraction={config.valid_fraction}, test_fraction={config.test_fraction}: nothing is left to train on"
        )


# ---- download and filter


def fetch(config: FeideggerConfig) -> Path:
    """Download and filter all images; returns the finished dataset directory."""
    work = Path(config.output_dir).absolute() / "work"
    lists = f"urls=[{config.data_path}]" if "://" in config.data_path else f"input={Path(config.data_path).absolute()}"
    hosts = [f"allow_private_hosts={str(config.allow_private_hosts).lower()}"]
    download = ["source=url_list", lists, "caption_column=descriptions", f"output={work / 'download'}", *hosts]
    download += [f"max_failed_fraction={config.max_failed_fraction}"]
    before = (work / "download/plan").is_dir() and _retryable(work / "download")
    _stage("download", [*download, *(["retry_failed=true"] if before else [])])
    if not before and _retryable(work / "download"):
        _stage("download", [*download, "retry_failed=true"])
    sizes = [f"min_image_size={_SMALLEST}", f"max_image_size={max(config.image_size)}"]
    workers = [f"workers={config.num_workers}"]
    _stage("filter", [f"input={work / 'download'}", f"output={work / 'filter'}", *sizes, *workers])
    return work / "filter"


def _retryable(place: Path) -> bool:
    """Whether images failed with a transient error."""
    dataset = Dataset.open(place)
    for index in range(dataset.partitions):
        if not dataset.root.exists(dataset.path_of(index)):
            continue
        table = SlotReader(dataset, index).ledger(["outcome", "retryable"]).to_pydict()
        if any(o == "failed" and r for o, r in zip(table["outcome"], table["retryable"], strict=True)):
            return True
    return False


def _stage(name: str, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", f"pipeline.stages.{name}", *arguments], check=False)
    if done.returncode:
        again = "the same command tries failed images again; max_failed_fraction= allows more failures"
        print(f"error: stage={name} did not finish, see above{f': {again}' * (name == 'download')}", file=sys.stderr)
        raise SystemExit(done.returncode)


# ---- packing


def pack(filtered: str | Path, config: FeideggerConfig) -> dict[str, object]:
    """Write the images of a finished dataset directory to ``output_dir``, replacing each existing file atomically.

    Memory holds one batch of pixels and all captions.

    Returns:
        Number of images in each split, number of captions, and the path of the HDF5 file.

    Raises:
        ConfigError: there are no images with captions.
    """
    output = Path(config.output_dir).absolute()
    output.mkdir(parents=True, exist_ok=True)
    images = list(find(filtered))
    if not images:
        raise ConfigError(f"{filtered} has no images with captions")
    divide(images, config)
    tokenizer = tokenizer_of(images, config)
    tokenizer.save(output / "tokenizer")
    attempt = output / f".{DATASET}.{os.getpid()}"
    try:
        with h5py.File(attempt, "w") as file:
            _write_captions(file, images, tokenizer, config)
            _write_pixels(file, images, output, config)
        os.replace(attempt, output / DATASET)
    finally:
        attempt.unlink(missing_ok=True)
    _write_metadata(output, images)
    counts = {split: sum(image.split == split for image in images) for split in SPLITS}
    return {**counts, "captions": sum(len(image.captions) for image in images), "dataset": output / DATASET}


def find(filtered: str | Path) -> Iterator[DressImage]:
    """The kept images that have captions."""
    dataset = Dataset.open(filtered)
    try:
        dataset.require_success()
    except Unfinished as error:
        raise ConfigError(str(error)) from None
    for index in range(dataset.partitions):
        for stored in SlotReader(dataset, index).stored():
            row = stored.read()
            captions = [caption for caption in row["captions"] if caption]
            if captions:
                yield DressImage(stored, hashlib.sha256(row["jpg"]).hexdigest(), captions)


def divide(images: list[DressImage], config: FeideggerConfig) -> None:
    """Assign each image a split, keyed by seed and content, so that copies of an image are in the same split."""
    contents = sorted({p.content for p in images}, key=lambda content: digest(config.seed, "split", content))
    test, valid = (round(len(contents) * f) for f in (config.test_fraction, config.valid_fraction))
    split_of = {c: "test" if i < test else "val" if i < test + valid else "train" for i, c in enumerate(contents)}
    for image in images:
        image.split = split_of[image.content]


def tokenizer_of(images: list[DressImage], config: FeideggerConfig) -> Tokenizer:
    """The pretrained tokenizer that the settings name, or a BPE trained on the captions of the training split."""
    from pipeline.encoders.tokenizer import pretrained, train_bpe

    if config.language_model != "bpe":
        return pretrained(config.language_model)
    return train_bpe((c for image in images if image.split == "train" for c in image.captions), 8000)


def _write_captions(file: h5py.File, images: list[DressImage], tokenizer: Tokenizer, config: FeideggerConfig) -> None:
    owners = np.repeat(np.arange(len(images)), [len(image.captions) for image in images])
    texts = [caption for image in images for caption in image.captions]
    shape = (len(texts), config.max_length)
    ids = file.create_dataset("input_ids", shape, np.int32)
    mask = file.create_dataset("attention_mask", shape, np.uint8)
    for start in range(0, len(texts), 1024):
        tokens = tokenizer.encode(texts[start : start + 1024], config.max_length)
        ids[start : start + len(tokens)] = tokens
        mask[start : start + len(tokens)] = tokens != tokenizer.pad
    text = h5py.string_dtype()
    file.create_dataset("captions", data=np.array(texts, object), dtype=text)
    file.create_dataset("image_index", data=owners)
    file.create_dataset("keys", data=np.array([image.stored.key for image in images], object), dtype=text)
    splits = np.array([SPLITS.index(image.split) for image in images])
    for number, split in enumerate(SPLITS):
        file.create_dataset(f"splits/{split}", data=np.flatnonzero(splits[owners] == number))
    file.attrs["tokenizer"] = json.dumps(tokenizer.to_json(), ensure_ascii=False)
    file.attrs["seed"], file.attrs["max_length"] = config.seed, config.max_length


def _write_pixels(file: h5py.File, images: list[DressImage], output: Path, config: FeideggerConfig) -> None:
    height, width = config.image_size
    shape = (len(images), height, width, 3)
    pixels = file.create_dataset("images", shape, np.uint8)
    for split in SPLITS:
        (output / "images" / split).mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), config.batch_size):
        batch = images[start : start + config.batch_size]
        resized = [_resized(one, (width, height)) for one in batch]
        pixels[start : start + len(batch)] = np.stack(resized)
        for one, image in zip(batch, resized, strict=True):
            data = BytesIO()
            Image.fromarray(image).save(data, "PNG")
            (output / _file_of(one)).write_bytes(data.getvalue())


def _resized(image: DressImage, size: tuple[int, int]) -> npt.NDArray[Any]:
    data = image.stored.read()["jpg"]
    pixels = transform.decode(data, transform.probe(data, transform.Limits()))
    return np.asarray(transform.resize(pixels, size))


def _file_of(image: DressImage) -> str:
    return f"images/{image.split}/{image.stored.key.replace('/', '_')}.png"


def _write_metadata(output: Path, images: list[DressImage]) -> None:
    attempt = output / f".{METADATA}.{os.getpid()}"
    with attempt.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["caption_index", "image_index", "key", "split", "image", "caption"])
        captions = ((i, image, caption) for i, image in enumerate(images) for caption in image.captions)
        for number, (index, image, caption) in enumerate(captions):
            table.writerow([number, index, image.stored.key, image.split, _file_of(image), caption])
    os.replace(attempt, output / METADATA)


if __name__ == "__main__":
    main(config_for("feidegger"))
