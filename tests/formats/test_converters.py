"""Converters: the same bytes by every way, any number of processes, any Dataset, and what goes wrong is said."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.conftest import FIXED, FLEXIBLE, FORMATS, SIZE, image_file, photo
from PIL import Image
from stages.conftest import digests

import pipeline.formats as formats
from pipeline import storage
from pipeline.config.schema import ConfigError
from pipeline.distributed import Place, Rank
from pipeline.formats import Reader, ResizeAndConvert
from pipeline.partitions.dataset import Dataset
from pipeline.samples import Row
from pipeline.stages.repair import repair
from pipeline.storage import StorageError

CLASS_OF: dict[str, type[formats.Converter]] = {
    "tar": formats.TarConverter,
    "mds": formats.MDSConverter,
    "parquet": formats.ParquetConverter,
    "ipc": formats.IpcConverter,
    "memmap": formats.MemmapConverter,
    "hdf5": formats.HDF5Converter,
}


class Photos:
    """A map-style Dataset of PIL images and labels; some of them may raise."""

    classes = ("even", "odd")

    def __init__(self, count: int = 20, bad: tuple[int, ...] = ()) -> None:
        self.count = count
        self.bad = bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index in self.bad:
            raise RuntimeError(f"no image {index}")
        return photo(index).resize((SIZE[1], SIZE[0])), index % 2


def sized(format: str) -> dict[str, Any]:
    return {"shape": SIZE, "im_mode": "RGB"} if format in FIXED else {}


# ---- one engine


@pytest.mark.parametrize("format", FORMATS)
def test_python_and_command_line_give_the_same_bytes(small_folder: Path, tmp_path: Path, format: str) -> None:
    CLASS_OF[format](small_folder, tmp_path / "python", num_workers=3, **sized(format)).convert()
    command = [sys.executable, "-m", "pipeline.stages.shard", f"input={small_folder}", f"output={tmp_path / 'program'}"]
    command += [f"format={format}", *(["shape=[32,40]", "im_mode=RGB"] if format in FIXED else [])]
    subprocess.run(command, check=True, capture_output=True)
    assert digests(tmp_path / "python") == digests(tmp_path / "program")


def test_the_process_of_the_caller_stays_as_it_was(small_folder: Path, tmp_path: Path) -> None:
    """Its pyarrow goes on knowing pandas, which is not imported: a second, for nothing."""
    script = (
        "import sys; from pipeline import formats\n"
        f"formats.ParquetConverter({str(small_folder)!r}, {str(tmp_path / 'out')!r}, num_workers=2).convert()\n"
        "assert 'pandas' not in sys.modules\n"
        "import pandas, pyarrow\n"
        "assert pyarrow.array(pandas.Series([1.0, None])).null_count == 1\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("workers", [1, 2, 5, 12])
def test_any_number_of_processes_shares_the_work(small_folder: Path, tmp_path: Path, workers: int) -> None:
    """One, and more than there are files, too."""
    output = formats.IpcConverter(small_folder, tmp_path / "out", images_per_file=7, num_workers=workers).convert()
    counts = [Dataset.open(output).record(index)["counts"]["kept"] for index in range(9)]  # type: ignore[index]
    assert sum(counts) == 60 and max(counts) - min(counts) <= 1
    other = formats.IpcConverter(small_folder, tmp_path / "one", images_per_file=7).convert()
    assert digests(output) == digests(other)


def test_it_goes_on_after_a_kill(tmp_path: Path) -> None:
    script = (
        "import sys, time; sys.path.insert(0, 'tests'); from formats.test_converters import Photos\n"
        "from pipeline.formats import IpcConverter\n"
        "class Slow(Photos):\n"
        "    def __getitem__(self, index):\n"
        "        if index == 33: print('here', flush=True); time.sleep(1000)\n"
        "        return super().__getitem__(index)\n"
        "Slow.__qualname__ = 'Photos'\n"
        "IpcConverter(Slow(40), sys.argv[1], images_per_file=10).convert()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("data/000/[0-9]*/*")}
    assert len({p.parent for p in kept}) == 3
    formats.IpcConverter(Photos(40), tmp_path / "out", images_per_file=10, lease=0.5).convert()
    assert all(p.stat().st_mtime_ns == before for p, before in kept.items())
    formats.IpcConverter(Photos(40), tmp_path / "whole", images_per_file=10).convert()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_several_programs_that_a_launcher_started_share_the_work(small_folder: Path, tmp_path: Path) -> None:
    script = "import sys; from pipeline.formats import MDSConverter as C; C(*sys.argv[1:], 10, dist=True).convert()"
    processes = []
    for rank in range(3):
        variables = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-c", script, str(small_folder), str(tmp_path / "out")]
        processes.append(subprocess.Popen(command, env=variables))
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    formats.MDSConverter(small_folder, tmp_path / "one", 10).convert()
    assert digests(tmp_path / "out") == digests(tmp_path / "one")


# ---- Datasets


@pytest.mark.parametrize("format", FORMATS)
def test_a_dataset_of_images_and_labels(tmp_path: Path, format: str) -> None:
    """images_per_file is not divisible by batch_size, nor the count by it."""
    data = Photos()
    output = CLASS_OF[format](data, tmp_path / "out", images_per_file=7, batch_size=4, num_workers=2).convert()
    reader = Reader(output)
    assert len(reader) == 20 and reader.classes == ["even", "odd"]
    for index, (image, label) in enumerate(reader):
        assert np.array_equal(np.asarray(image), np.asarray(data[index][0]))
        assert label == index % 2


def test_a_dataset_of_files_keeps_their_bytes_and_captions(tmp_path: Path) -> None:
    items = [{"image": image_file(n)[1], "captions": [f"a {n}", "b"], "score": n / 3, "id": n} for n in range(9)]
    reader = Reader(formats.ParquetConverter(items, tmp_path / "out").convert(), output="bytes")
    assert [image for image, _ in reader] == [item["image"] for item in items]
    row = reader.row(4)
    assert (row["captions"], row["caption"], row["score"], row["id"]) == (["a 4", "b"], "a 4", 4 / 3, 4)
    assert reader[0][1] == "a 0"  # without labels or masks, the caption


def test_tensors_and_arrays_that_are_no_picture(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7, 9, 6)).astype(np.float32)
    for name in ("memmap", "hdf5", "ipc"):
        reader = Reader(CLASS_OF[name](list(values), tmp_path / name).convert(), output="array")
        assert np.array_equal(np.stack([array for array, _ in reader]), values)
        assert reader.row(0)["format"] == "npy"


@pytest.mark.parametrize("converter", [formats.DenseMemmapConverter, formats.DenseIpcConverter])
def test_dense_labels_keep_their_values(tmp_path: Path, converter: type[formats.Converter]) -> None:
    chosen = np.random.default_rng(1)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    values = {}
    for number in range(8):
        photo(number).resize((50, 30)).save(tmp_path / f"images/{number}.jpg")
        values[f"{number}"] = chosen.integers(0, 21, (30, 50)).astype(np.uint8)
        mask = Image.fromarray(values[f"{number}"])
        if number % 2:  # as VOC has them: indices of a palette
            mask.putpalette([chosen.integers(256) for _ in range(768)])
        mask.save(tmp_path / f"masks/{number}.png")
    pair = (tmp_path / "images", tmp_path / "masks")
    encode = {"encode": "png"} if converter is formats.DenseIpcConverter else {}
    output = converter(pair, tmp_path / "out", shape=(60, 100), im_mode="RGB", **encode).convert()
    kind = formats.DenseMemmapReader if converter is formats.DenseMemmapConverter else formats.DenseIpcReader
    reader = kind(output)
    assert len(reader) == 8
    for index, (image, mask) in enumerate(reader):
        assert image.size == (100, 60)
        expected = values[reader.key(index).rpartition("-")[0]].repeat(2, 0).repeat(2, 1)
        assert np.array_equal(mask.reshape(60, 100), expected)


def test_resize_and_convert_takes_height_first_and_leaves_masks_alone() -> None:
    image = ResizeAndConvert((20, 30))(photo(0).convert("CMYK"))
    assert (image.size, image.mode) == ((30, 20), "RGB")
    assert ResizeAndConvert((20, 30), keep_ratio=True)(Image.new("RGB", (100, 20))).size == (30, 20)
    mask = np.array([[0, 200], [7, 255]], np.uint8)
    assert np.array_equal(ResizeAndConvert((4, 4), mask=True)(mask), mask.repeat(2, 0).repeat(2, 1))
    with pytest.raises(ConfigError, match="expected \\(height, width\\)"):
        ResizeAndConvert((0, 3))


# ---- hooks


class Doubled(formats.MemmapConverter):
    def _custom_collate_fn(self, batch: list[Any]) -> list[Row]:
        return [{"image": image, "label": label + 100, "batch": len(batch)} for image, label in batch]

    def _init_arrays(self, writer: Any, count: int, first: Row) -> dict[str, np.ndarray]:
        return {name: array * 0 + 7 for name, array in super()._init_arrays(writer, count, first).items()}

    def _write_data_to_disk(self, writer: Any, number: int, arrays: Any, rows: list[Row]) -> Any:
        return super()._write_data_to_disk(writer, number, {n: 255 - a for n, a in arrays.items()}, rows)


class Shouted(formats.TarConverter):
    def _write_data_to_disk(self, writer: Any, row: Row) -> None:
        super()._write_data_to_disk(writer, {**row, "caption": "HELLO"})


def test_hooks(tmp_path: Path) -> None:
    reader = Reader(Doubled(Photos(), tmp_path / "fixed", 10, batch_size=4).convert(), output="array")
    assert [label for _, label in reader] == [100, 101] * 10
    assert np.array_equal(reader[3][0], 255 - np.asarray(Photos()[3][0]))
    assert [reader.row(i)["batch"] for i in range(10)] == [4] * 8 + [2] * 2
    assert Reader(Shouted(Photos(), tmp_path / "flexible").convert()).row(0)["caption"] == "HELLO"


# ---- what goes wrong


def test_unequal_sizes_name_the_file_and_the_cure(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n0\d+/.* is 2\d×2\d×3, but format=memmap holds images of one size.*shape="):
        formats.MemmapConverter(small_folder, tmp_path / "out", im_mode="RGB").convert()
    with pytest.raises(ConfigError, match=r"has mode .*, but format=hdf5 holds images of one mode.*im_mode=RGB"):
        formats.HDF5Converter(small_folder, tmp_path / "two", shape=SIZE, num_workers=2).convert()
    assert not list((tmp_path / "out").glob("data/*/*"))  # nothing half done


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (0, 3)}, "shape="),
        ({"shape": (3, 4)}, "say how to store them, encode=png or encode=jpeg"),
        ({"im_mode": "BGR", "encode": "png"}, "im_mode=BGR: known: I;16, L"),
        ({"encode": "jpeg", "quality": 0}, "quality=0"),
        ({"encode": "bmp"}, "encode=bmp"),
        ({"compression": "gzip"}, "only format=hdf5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"images_per_file": -1}, "images_per_file=-1"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_wrong_settings_are_named(small_folder: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        formats.IpcConverter(small_folder, tmp_path / "out", **settings).convert()


def test_inputs_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a")
    with pytest.raises(ConfigError, match="no such folder"):
        formats.IpcConverter(tmp_path / "nothing", tmp_path / "out").convert()
    with pytest.raises(ConfigError, match="no image below this folder"):
        formats.IpcConverter(tmp_path / "text", tmp_path / "out1").convert()
    with pytest.raises(ConfigError, match="not a dataset directory"):
        formats.IpcConverter(tmp_path / "empty", tmp_path / "out2").convert()
    with pytest.raises(ConfigError, match="is empty"):
        formats.IpcConverter([], tmp_path / "out3").convert()
    with pytest.raises(ConfigError, match="no __len__"):
        formats.IpcConverter(iter([1]), tmp_path / "out4").convert()


def test_items_that_raise_and_files_that_are_damaged_are_counted_and_named(tmp_path: Path) -> None:
    output = formats.IpcConverter(Photos(20, bad=(4, 5)), tmp_path / "out", max_failed_fraction=0.2).convert()
    assert Dataset.open(output).require_success()["reasons"] == {"failed:dataset_raised": 2}
    assert len(Reader(output)) == 18
    with pytest.raises(StorageError, match="3 of 20 samples failed"):
        formats.IpcConverter(Photos(20, bad=(4, 5, 6)), tmp_path / "strict").convert()
    folder = tmp_path / "folder/a"
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(image_file(8 * number)[1])
    (folder / "3.jpg").write_bytes(b"")
    (folder / "4.jpg").write_bytes((folder / "5.jpg").read_bytes()[:300])
    (folder / "6.jpg").unlink()
    (folder / "6.jpg").symlink_to("nowhere")
    output = formats.TarConverter(tmp_path / "folder", tmp_path / "images", max_failed_fraction=0.2).convert()
    reasons = Dataset.open(output).require_success()["reasons"]
    assert reasons == {"failed:empty": 1, "failed:truncated": 1, "failed:missing": 1}


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_loses_nothing(
    small_folder: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(operation: str, path: str, do: Any) -> Any:
        if operation == "write" and "/00002" in path.replace("/.0", "/0"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return do()

    converter = CLASS_OF[format](small_folder, tmp_path / "out", images_per_file=20, **sized(format))
    monkeypatch.setattr(storage, "interpose", full)
    with pytest.raises(StorageError, match="cannot write partition 2: No space left on device"):
        converter.convert()
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "out/data/000").iterdir()) == ["00000", "00001"]
    assert len(Reader(converter.convert())) == 60


def test_what_came_from_a_dataset_is_repaired_by_its_converter(tmp_path: Path) -> None:
    converter = formats.IpcConverter(Photos(), tmp_path / "out", images_per_file=10)
    before = digests(converter.convert())
    assert not converter.repair()
    path = tmp_path / "out/data/000/00001/samples.00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"from a Python Dataset, .* call \.repair\(\) of the converter"):
        repair(tmp_path / "out", Rank(Place()))
    assert converter.repair()
    assert len(list(Reader(tmp_path / "out"))) == 20
    name = "samples.00000.arrow"
    assert digests(tmp_path / "out")[f"data/000/00001.1/{name}"] == before[f"data/000/00001/{name}"]


def test_an_input_that_has_changed_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(image_file(8 * number)[1])
    formats.IpcConverter(folder, tmp_path / "out").convert()
    (folder / "9.jpg").write_bytes(image_file(8)[1])
    with pytest.raises(ConfigError, match="the input has changed since it was planned"):
        formats.IpcConverter(folder, tmp_path / "out").convert()
    formats.IpcConverter(folder, tmp_path / "out", overwrite=True, num_workers=2).convert()
    assert len(Reader(tmp_path / "out")) == 5


@pytest.mark.parametrize("format", FLEXIBLE)
def test_bytes_are_encoded_anew_only_if_asked(small_folder: Path, tmp_path: Path, format: str) -> None:
    output = CLASS_OF[format](small_folder, tmp_path / "out", encode="jpeg", quality=90, shape=(20, 30)).convert()
    reader = Reader(output)
    assert {(image.format, image.size, image.mode) for image, _ in reader} == {("JPEG", (30, 20), "RGB")}
    assert {row["format"] for row in reader.rows(range(5))} == {"jpeg"}
