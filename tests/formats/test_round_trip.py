"""Any format to any other: the flexible ones keep every byte, the fixed ones every decoded pixel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from formats.conftest import COUNT, FIXED, FLEXIBLE, FORMATS, SIZE, convert
from stages.conftest import digests

from pipeline.formats import Reader
from pipeline.formats.pixel_arrays import to_array
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All 2,000 images in each format."""
    root = tmp_path_factory.mktemp("converted")
    return {name: convert(folder, root / name, name, partition_size=600) for name in FORMATS}


@cache
def originals(folder: Path) -> dict[str, tuple[bytes, int]]:
    """File name → bytes and label."""
    classes = sorted(path.name for path in folder.iterdir())
    return {path.stem: (path.read_bytes(), classes.index(path.parent.name)) for path in folder.glob("*/*")}


@cache
def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {name: to_array(data, "RGB", SIZE) for name, (data, _) in originals(folder).items()}


def name_of(key: str) -> str:
    return key.rpartition("/")[2].rpartition("-")[0]


def check(folder: Path, output: Path, kept_bytes: bool) -> None:
    reader = Reader(output, output="bytes" if kept_bytes else "array")
    assert len(reader) == COUNT
    assert reader.classes == sorted(path.name for path in folder.iterdir())
    names = [name_of(reader.key(index)) for index in range(len(reader))]
    assert sorted(names) == sorted(originals(folder))
    for name, (image, label) in zip(names, reader.__getitems__(range(len(reader))), strict=True):
        data, expected = originals(folder)[name]
        assert label == expected
        if kept_bytes:
            assert image == data
        else:
            assert np.array_equal(image, pixels(folder)[name])


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_back_what_went_in(folder: Path, converted: dict[str, Path], format: str) -> None:
    check(folder, converted[format], format in FLEXIBLE)
    assert list(verify(Dataset.open(converted[format]))) == []


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_format_converts_into_every_other(
    folder: Path, converted: dict[str, Path], tmp_path: Path, source: str, target: str
) -> None:
    output = convert(converted[source], tmp_path / target, target, partition_size=700)
    check(folder, output, source in FLEXIBLE and target in FLEXIBLE)


def test_what_was_recorded_is_what_the_bytes_are(converted: dict[str, Path]) -> None:
    """Real format, size and mode, whatever the file is called."""
    reader = Reader(converted["ipc"])
    rows = {name_of(row["key"]): row for row in reader.rows(range(len(reader)))}
    kinds = [(rows[f"{n:05d}"]["format"], rows[f"{n:05d}"]["mode"]) for n in range(8)]
    assert kinds == [
        ("jpeg", "RGB"),
        ("jpeg", "CMYK"),
        ("jpeg", "RGB"),
        ("jpeg", "L"),
        ("png", "RGBA"),
        ("png", "I;16"),
        ("png", "P;4"),
        ("gif", "P"),
    ]
    assert (rows["00002"]["width"], rows["00002"]["height"]) == (24 + 2, 24 + 2)
    assert (rows["00010"]["width"], rows["00010"]["height"]) == (24 + 10, 24 + 10)
    assert (rows["00018"]["width"], rows["00018"]["height"]) == (24 + 1, 24 + 18)  # 42 × 25, turned by its EXIF tag


@pytest.mark.parametrize("format", FIXED)
def test_pixels_of_another_mode_are_kept_too(small_folder: Path, tmp_path: Path, format: str) -> None:
    for mode in ("L", "RGBA", "I;16"):
        output = convert(small_folder, tmp_path / mode, format, im_mode=mode)
        back = convert(output, tmp_path / f"{mode}-ipc", "ipc")
        files = {path.stem: path.read_bytes() for path in small_folder.glob("*/*")}
        for reader in (Reader(output), Reader(back)):
            for index in range(0, len(reader), 7):
                expected = to_array(files[name_of(reader.key(index))], mode, SIZE)
                assert np.array_equal(reader.array(index), expected)
                assert np.array_equal(np.asarray(reader[index][0]), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_files_are_cut_by_their_size_and_bytes_do_not_depend_on_anything_else(
    small_folder: Path, tmp_path: Path, format: str
) -> None:
    settings = {"shard_bytes": 10_000, "partition_size": 25, "shuffle": True, "seed": 3}
    outputs = [convert(small_folder, tmp_path / name, format, **settings) for name in ("one", "two")]
    assert digests(outputs[0]) == digests(outputs[1])
    if format != "tar":
        sizes = [p.stat().st_size for p in outputs[0].glob("data/000/00000/*") if p.stem.startswith(("im", "sa", "sh"))]
        assert len(sizes) > 1 and max(sizes) < 40_000
    reader = Reader(outputs[0])
    assert len({reader.key(index) for index in range(60)}) == 60
    assert reader.key(0) != Reader(convert(small_folder, tmp_path / "plain", format)).key(0)
