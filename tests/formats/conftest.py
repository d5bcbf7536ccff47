"""Small photographs of every kind, in class folders, and each storage format made of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from stages.conftest import run_stage

FLEXIBLE = ("tar", "mds", "parquet", "ipc")
FIXED = ("memmap", "hdf5")
FORMATS = (*FLEXIBLE, *FIXED)
COUNT = 2000
SIZE = (32, 40)  # height, width
CLASSES = ("n01440764", "n01443537", "n02123045")


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _sixteen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(image.convert("L"))
    return image


KINDS: tuple[tuple[str, str, Callable[[Image.Image], Image.Image], dict[str, Any]], ...] = (
    ("jpg", "JPEG", lambda image: image, {"quality": 90}),
    ("jpeg", "JPEG", lambda image: image.convert("CMYK"), {}),
    ("JPEG", "JPEG", lambda image: image, {"exif": _exif(6)}),
    ("jpg", "JPEG", lambda image: image.convert("L"), {}),
    ("png", "PNG", _with_alpha, {}),
    ("png", "PNG", _sixteen, {}),
    ("png", "PNG", lambda image: image.quantize(16), {}),
    ("webp", "WEBP", lambda image: image, {"quality": 80}),
)


def photo(number: int) -> Image.Image:
    """A piece of a photograph; its size depends on the number."""
    sources = load_sample_images().images
    source = sources[number % len(sources)]
    width, height = 24 + number % 29, 24 + number % 17
    x, y = number * 37 % (source.shape[1] - width), number * 53 % (source.shape[0] - height)
    return Image.fromarray(source[y : y + height, x : x + width])


def image_file(number: int) -> tuple[str, bytes]:
    """Extension and bytes of image ``number``: the kinds take turns, and one is a GIF."""
    extension, format, change, options = KINDS[number % len(KINDS)]
    if number == 7:
        extension, format, change, options = "gif", "GIF", lambda image: image, {}
    file = io.BytesIO()
    change(photo(number)).save(file, format, **options)
    return extension, file.getvalue()


def write_folder(root: Path, count: int) -> Path:
    for name in CLASSES:
        (root / name).mkdir(parents=True)
    for number in range(count):
        extension, data = image_file(number)
        (root / CLASSES[number % 3] / f"{number:05d}.{extension}").write_bytes(data)
    return root


def convert(source: Path, output: Path, format: str, **settings: object) -> Path:
    """One run of stage=shard; to a fixed format at a fixed size."""
    if format in FIXED:
        settings = {"shape": list(SIZE), "im_mode": "RGB", **settings}
    run_stage("shard", input=str(source), output=str(output), format=format, **settings)
    return output


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 images in three class folders."""
    return write_folder(tmp_path_factory.mktemp("images") / "train", COUNT)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in three class folders."""
    return write_folder(tmp_path_factory.mktemp("small") / "train", 60)


@pytest.fixture(scope="session")
def small(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small folder in each format."""
    root = tmp_path_factory.mktemp("formats")
    return {name: convert(small_folder, root / name, name, partition_size=25) for name in FORMATS}
