"""``load_dataset(<folder>)`` of the Hugging Face library reads our folders as they are, and only what counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.conftest import CLASSES, convert
from PIL import Image
from stages.conftest import digests

from pipeline.config.cli import build
from pipeline.config.schema import TakedownConfig
from pipeline.formats import IpcConverter, Reader, TarConverter
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.finalize import finalize
from pipeline.partitions.verify import verify
from pipeline.stages import takedown

FORMATS = ("parquet", "ipc", "tar")


def load(folder: Path, cache: Path) -> Any:
    import datasets

    return datasets.load_dataset(str(folder), cache_dir=str(cache))


def rows(found: Any) -> list[dict[str, Any]]:
    """Rows with ``key``, ``label``, ``captions`` and the image, whatever the format."""
    listed = []
    for row in found:
        inside = row.get("json") or row
        image = next(row[name] for name in ("jpg", "png", "webp", "gif") if row.get(name) is not None)
        listed.append({"key": inside["key"], "label": inside["label"], "image": image})
    return listed


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_loads_as_it_is(small: dict[str, Path], format: str, tmp_path: Path) -> None:
    found = load(small[format], tmp_path)
    assert list(found) == ["train"] and len(found["train"]) == 60
    reader = Reader(small[format])
    listed = rows(found["train"])
    assert [row["key"] for row in listed] == [reader.key(i) for i in range(60)]
    assert [row["label"] for row in listed] == [0] * 20 + [1] * 20 + [2] * 20
    assert all(isinstance(row["image"], Image.Image) for row in listed)
    features = found["train"].features
    label = features["label"] if "label" in features else features["json"]["label"]
    assert label.names == list(CLASSES)
    for number in (0, 7, 59):
        stored = np.asarray(reader[number][0].convert("RGB"))
        assert np.array_equal(np.asarray(listed[number]["image"].convert("RGB")), stored) or number == 0
    assert list(verify(Dataset.open(small[format]))) == []


@pytest.mark.parametrize("format", ["memmap", "hdf5", "mds"])
def test_formats_that_it_does_not_read_have_no_readme(small: dict[str, Path], format: str) -> None:
    assert not (small[format] / "README.md").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_replaced_partitions_are_not_loaded(small_folder: Path, format: str, tmp_path: Path) -> None:
    output = convert(small_folder, tmp_path / "all" / format, format, partition_size=25)
    gone = Reader(output).key(30)
    (tmp_path / "gone.txt").write_text(gone + "\n")
    given = {"takedown": str(tmp_path / "gone.txt"), "data_dir": str(tmp_path / "all")}
    replaced = output / "data/000/00001"
    shutil.copytree(replaced, tmp_path / "replaced")
    takedown.main(build(TakedownConfig, given))
    shutil.copytree(tmp_path / "replaced", replaced)  # as after repair, until stage=gc removes it
    keys = [row["key"] for row in rows(load(output, tmp_path / "cache")["train"])]
    assert len(keys) == len(set(keys)) == 59 and gone not in keys


def test_people_may_write_their_own_readme(small_folder: Path, tmp_path: Path) -> None:
    output = convert(small_folder, tmp_path / "out", "parquet")
    (output / "README.md").write_text("mine")
    before = digests(output)
    assert list(verify(Dataset.open(output))) == []
    (output / "_SUCCESS").unlink()
    digest = finalize(Dataset.open(output))["content_digest"]
    assert (output / "README.md").read_text() == "mine" and digests(output) == before
    (output / "README.md").unlink()
    (output / "_SUCCESS").unlink()
    assert finalize(Dataset.open(output))["content_digest"] == digest
    assert "configs:" in (output / "README.md").read_text()
    shutil.rmtree(output)


def test_masks_and_captions_are_loaded(tmp_path: Path) -> None:
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8)
    items = [{"image": np.full((8, 8, 3), n, np.uint8), "mask": mask, "captions": ["eins", "zwei"]} for n in range(3)]
    IpcConverter(items, tmp_path / "ipc").convert()
    TarConverter(items, tmp_path / "tar", split="valid set").convert()
    ipc, tar = (load(tmp_path / name, tmp_path / "cache")["train"] for name in ("ipc", "tar"))
    assert ipc[1]["captions"] == '["eins", "zwei"]' and ipc[1]["mask"].startswith(b"\x89PNG")
    assert tar[1]["json"]["captions"] == ["eins", "zwei"] and tar[1]["txt"] == "eins"
    assert np.array_equal(np.asarray(tar[2]["mask.png"]), mask) and tar[2]["png"].getpixel((0, 0)) == (2, 2, 2)
