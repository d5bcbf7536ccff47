"""The examples run, on small data that is laid out as theirs; and ImageNet's classes come in WordNet order."""

from __future__ import annotations

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from formats.conftest import CLASSES, convert, image_file, photo
from PIL import Image
from stages.conftest import run_stage

from pipeline.config.schema import ConfigError
from pipeline.formats import Reader
from pipeline.partitions.dataset import Dataset

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_without_arguments_an_example_says_how_it_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit, match=rf"(?s)python examples/{path.name} "):
        runpy.run_path(str(path), run_name="__main__")


@pytest.fixture(scope="module")
def image_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train in class folders, val in one folder; a CMYK file, a PNG called JPEG, and a file that is cut."""
    root = tmp_path_factory.mktemp("imagenet")
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
        for number in range(12):
            kind = 1 if number == 5 else 4 if number == 6 else 0
            (root / "train" / name / f"{name}_{number}.JPEG").write_bytes(image_file(8 * number + kind)[1])
    cut = root / "train" / CLASSES[0] / f"{CLASSES[0]}_7.JPEG"
    cut.write_bytes(cut.read_bytes()[:200])
    (root / "val").mkdir()
    for number in range(1, 10):
        (root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(image_file(8 * number)[1])
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for number in reversed(range(1, 10)):
            writer.writerow([f"ILSVRC2012_val_{number:08d}", f"{CLASSES[number % 3]} 1 2 3 4 {CLASSES[0]} 5 6 7 8"])
    return root


def val_labels(output: Path) -> dict[int, int]:
    reader = Reader(output, output="bytes")
    return {int(reader.key(i).partition("val_")[2][:8]): reader[i][1] for i in range(len(reader))}


EXPECTED = {number: number % 3 for number in range(1, 10)}


def test_imagenet(image_net: Path, tmp_path: Path) -> None:
    said = run("imagenet.py", image_net, tmp_path, "ipc", image_net / "LOC_val_solution.csv")
    assert "35 of 35 samples seen, each once" in said
    assert Dataset.open(tmp_path / "train").require_success()["reasons"] == {"failed:truncated": 1}
    assert val_labels(tmp_path / "val") == EXPECTED
    rows = [Reader(tmp_path / "train").row(index) for index in range(35)]
    assert {(row["format"], row["mode"]) for row in rows} == {("jpeg", "RGB"), ("jpeg", "CMYK"), ("png", "RGBA")}


def test_the_devkit_counts_classes_in_another_order(image_net: Path, tmp_path: Path) -> None:
    from scipy.io import savemat

    order = (CLASSES[2], CLASSES[0], CLASSES[1])  # of ILSVRC2012_ID
    kind = [("ILSVRC2012_ID", object), ("WNID", object)]
    synsets = np.array([(number, name) for number, name in enumerate(order, 1)], kind)
    (tmp_path / "data").mkdir()
    savemat(tmp_path / "data/meta.mat", {"synsets": synsets})
    truth = tmp_path / "data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{order.index(CLASSES[number % 3]) + 1}\n" for number in range(1, 10)))
    convert(image_net / "val", tmp_path / "out", "tar", labels=str(truth), classes=str(image_net / "train"))
    assert val_labels(tmp_path / "out") == EXPECTED
    assert Reader(tmp_path / "out").classes == list(CLASSES)


def test_images_without_a_label_are_counted_and_wrong_files_named(image_net: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"ILSVRC2012_val_{n:08d} {CLASSES[n % 3]}\n" for n in range(1, 9)))
    settings = {"input": str(image_net / "val"), "format": "mds", "max_failed_fraction": 0.2}
    success = run_stage("shard", output=str(tmp_path / "out"), labels=str(labels), **settings)
    assert success["reasons"] == {"failed:no_label": 1}
    for name, value in (("labels", "nothing.csv"), ("classes", "nothing.txt")):
        with pytest.raises(ConfigError, match=f"{name}=nothing"):
            run_stage("shard", output=str(tmp_path / name), **settings, **{name: value})


def test_caltech256(tmp_path: Path) -> None:
    for number, name in enumerate(("001.ak47", "002.american-flag", "257.clutter")):
        folder = tmp_path / "256_ObjectCategories" / name
        folder.mkdir(parents=True)
        for image in range(1, 13):
            (folder / f"{number + 1:03d}_{image:04d}.jpg").write_bytes(image_file(8 * image + 3 * (image == 5))[1])
    for format in ("ipc", "memmap"):
        said = run("caltech256.py", tmp_path / "256_ObjectCategories", tmp_path / format, format)
        assert "images (32, 3, 224, 224)" in said and "002.american-flag" in said


def test_dense_labels(tmp_path: Path) -> None:
    for name in ("JPEGImages", "SegmentationClass"):
        (tmp_path / name).mkdir()
    for number in range(6):
        image = photo(number)
        image.save(tmp_path / f"JPEGImages/{number}.jpg")
        if number:
            mask = Image.fromarray((np.asarray(image.convert("L")) // 20).astype(np.uint8))
            mask.putpalette(list(range(256)) * 3)
            mask.save(tmp_path / f"SegmentationClass/{number}.png")
    said = run("dense_labels.py", tmp_path / "JPEGImages", tmp_path / "SegmentationClass", tmp_path / "out")
    assert "fixed: 5 pairs, pixels (256, 256, 3), mask (256, 256, 1)" in said
