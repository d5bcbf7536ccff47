"""Readers: what they give, in which processes, and that they never give bytes that have changed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from formats.conftest import CLASSES, FIXED, FORMATS, SIZE, convert, write_folder
from PIL import Image

import pipeline.formats as formats
from pipeline.config.schema import ConfigError
from pipeline.formats import Reader, blocks
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify
from pipeline.storage import StorageError

CLASS_OF = {
    "tar": formats.TarReader,
    "mds": formats.MDSReader,
    "parquet": formats.ParquetReader,
    "ipc": formats.IpcReader,
    "memmap": formats.MemmapReader,
    "hdf5": formats.HDF5Reader,
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_sample_is_an_image_and_its_label(small: dict[str, Path], format: str) -> None:
    reader = CLASS_OF[format](small[format])
    image, label = reader[5]
    assert isinstance(image, Image.Image) and label in (0, 1, 2)
    assert len(reader) == len(list(reader)) == 60
    assert reader.classes == list(CLASSES) and reader.class_to_idx["n01443537"] == 1
    assert reader.schema["label"] == "int"
    assert reader[-1][1] == reader[59][1] == 2
    assert "samples: 60" in repr(reader) and format in repr(reader) and "n01440764" in repr(reader)
    with pytest.raises(IndexError, match="no sample 60"):
        reader[60]


@pytest.mark.parametrize("format", FORMATS)
def test_transforms_are_applied_and_batches_come_in_the_order_asked_for(small: dict[str, Path], format: str) -> None:
    reader = Reader(small[format], lambda image: image.size, lambda label: label * 10)
    order = [44, 3, 59, 3, 0]
    assert reader.__getitems__(order) == [reader[index] for index in order]
    assert {target for _, target in reader.__getitems__(range(60))} == {0, 10, 20}


@pytest.mark.parametrize("format", FIXED)
def test_pixels_of_fixed_size_come_as_they_lie_in_the_file(small: dict[str, Path], format: str) -> None:
    reader = Reader(small[format], output="array")
    array, _ = reader[3]
    assert array.shape == (*SIZE, 3) and array.dtype == np.uint8
    assert not array.flags.writeable and not array.flags.owndata  # a view of the file
    assert np.array_equal(np.asarray(Reader(small[format])[3][0]), array)


def test_other_outputs_targets_and_modes(small: dict[str, Path]) -> None:
    data, caption = Reader(small["ipc"], output="bytes", target="key")[0]
    assert isinstance(data, bytes) and caption.startswith("n01440764/")
    assert {image.mode for image, _ in Reader(small["parquet"], mode="RGB")} == {"RGB"}
    assert {image.mode for image, _ in Reader(small["memmap"], mode="L")} == {"L"}
    pixels, _ = Reader(small["mds"], output="array", mode="RGB")[0]
    assert pixels.ndim == 3


def test_wrong_arguments_are_named(small: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has format ipc, not tar: use IpcReader"):
        formats.TarReader(small["ipc"])
    with pytest.raises(ConfigError, match="output=pil: expected one of image, array, bytes"):
        Reader(small["ipc"], output="pil")
    with pytest.raises(ConfigError, match="verify=maybe"):
        Reader(small["ipc"], verify="maybe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no column mask"):
        formats.DenseIpcReader(small["ipc"])
    with pytest.raises(ConfigError, match="does not exist"):
        Reader(tmp_path / "nothing")
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(ConfigError, match="is not a dataset directory"):
        Reader(tmp_path)


# ---- processes

LOADER = """
import sys
from pipeline.formats import Reader
from pipeline.loading import Concatenated

if __name__ == "__main__":
    from torch.utils.data import DataLoader

    readers = Concatenated([Reader(path, output=output) for path, output in zip(sys.argv[2::2], sys.argv[3::2])])
    for reader in readers.datasets:
        reader[0]  # opened before the workers are made
    loader = DataLoader(readers, batch_size=7, num_workers=2, multiprocessing_context=sys.argv[1], collate_fn=list,
                        worker_init_fn=Reader.worker_init_fn)
    samples = [sample for batch in loader for sample in batch]
    assert [label for _, label in samples] == ([0] * 20 + [1] * 20 + [2] * 20) * len(readers.datasets)
    for index, (image, _) in enumerate(samples):
        assert bytes(image) == bytes(readers[index][0])
    for image, _ in samples[-60:]:  # views: not copied, but mapped here, too
        assert not image.flags.writeable and image.base is not None and image.base.path.endswith(".arrow")
"""


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_a_dataloader_with_two_workers(small: dict[str, Path], tmp_path: Path, context: str) -> None:
    """All formats in one, so that workers import torch once."""
    script = tmp_path / "load.py"
    script.write_text(LOADER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    arguments = [word for name in FORMATS for word in (small[name], "array" if name in FIXED else "bytes")]
    command = [sys.executable, str(script), context, *map(str, arguments), str(small["ipc"]), "view"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_views_are_the_same_bytes_without_a_copy(small: dict[str, Path], format: str) -> None:
    views, copies = Reader(small[format], output="view"), Reader(small[format], output="bytes")
    for index in range(0, 60, 7):
        view, label = views[index]
        assert (bytes(view), label) == copies[index]
        if format not in FIXED:
            assert not view.flags.writeable and not view.flags.owndata
            assert (view > 300).sum() == 0 and type(view.max()) is np.uint8
            copy = pickle.loads(pickle.dumps(view))
            assert type(copy) is np.ndarray and bytes(copy) == bytes(view)


def test_a_view_goes_to_another_process_by_its_place_and_only_while_the_file_is_the_same(
    small_folder: Path, tmp_path: Path
) -> None:
    output = convert(small_folder, tmp_path / "out", "ipc")
    view, _ = Reader(output, output="view")[4]
    sent = bytes(ForkingPickler.dumps(view))
    assert len(sent) < 400 < len(view)
    assert bytes(ForkingPickler.loads(sent)) == bytes(view)
    part = view[10:20]
    assert bytes(ForkingPickler.loads(ForkingPickler.dumps(part))) == bytes(view)[10:20]
    for changed in (view[::2], view.copy(), view.astype(np.int64)):
        assert np.array_equal(ForkingPickler.loads(ForkingPickler.dumps(changed)), changed)
    (path,) = output.glob("data/*/*/*.arrow")
    shutil.copy(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    blocks._mapped.cache_clear()
    with pytest.raises(StorageError, match="was replaced while it was read"):
        ForkingPickler.loads(sent)


def _labels(reader: Reader) -> list[int]:
    return [label for _, label in reader]


@pytest.mark.parametrize("format", FORMATS)
def test_it_can_be_pickled_and_forked_at_any_time(small: dict[str, Path], format: str) -> None:
    reader = Reader(small[format])
    reader[0]
    assert len(pickle.dumps(reader)) < 10_000
    assert _labels(pickle.loads(pickle.dumps(reader))) == _labels(reader)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_labels, [reader, reader]) == [_labels(reader)] * 2


def test_a_pickled_reader_notices_that_its_data_has_been_replaced(small_folder: Path, tmp_path: Path) -> None:
    convert(small_folder, tmp_path / "a", "ipc")
    reader = pickle.dumps(Reader(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    convert(small_folder, tmp_path / "a", "ipc", shuffle=True)
    with pytest.raises(StorageError, match="has changed since this reader was created"):
        pickle.loads(reader)[0]


# ---- bytes that have changed


def _all_read(output: Path) -> bool:
    """Whether every sample can be read."""
    reader = Reader(output, output="bytes")
    try:
        for index in range(len(reader)):
            reader.row(index)
    except StorageError:
        return False
    return True


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_byte_anywhere_in_a_data_file_is_detected(tmp_path: Path, format: str) -> None:
    """At 200 random places, by the reader or by verify."""
    output = convert(write_folder(tmp_path / "images", 6), tmp_path / "copy", format, partition_size=4)
    files = sorted(p for p in output.glob("data/*/*/*") if p.name not in ("record.json", "ledger.parquet"))
    chosen = random.Random(format)
    dataset = Dataset.open(output)
    by_reader = 0
    for _ in range(200):
        path = chosen.choices(files, [file.stat().st_size for file in files])[0]
        at, bit = chosen.randrange(path.stat().st_size), 1 << chosen.randrange(8)
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ bit]))
        detected = not _all_read(output)
        by_reader += detected
        assert detected or any(finding.file == path.name for finding in verify(dataset)), f"{path}, byte {at}"
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([byte]))
    assert by_reader == 200  # these files are smaller than a block: no byte can hide
    assert _all_read(output)


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_names_file_and_sample(small: dict[str, Path], tmp_path: Path, format: str) -> None:
    output = tmp_path / "copy"
    shutil.copytree(small[format], output)
    path = next(p for p in sorted(output.glob("data/000/00001/*")) if p.stem.startswith(("im", "sa", "sh", "0")))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    reader = Reader(output)
    reader[3]
    key = reader.key(25)
    with pytest.raises(StorageError, match=f"sample {key} in data/000/00001/{path.name} is damaged") as caught:
        reader[25]
    assert "stage=repair" in str(caught.value)
    with pytest.raises(StorageError):
        reader[25]  # every time
    with pytest.raises(StorageError, match=key):
        Reader(output, output="view")[25]
    path.write_bytes(bytes(data)[:-1])
    with pytest.raises(StorageError, match="bytes instead of"):
        Reader(output, verify="never")[25]


def test_only_touched_blocks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pipeline.storage", "pipeline.formats.blocks"):
        monkeypatch.setattr(f"{module}.BLOCK", 1 << 16)
    items = [np.full((100, 100, 3), n, np.uint8) for n in range(40)]
    output = formats.MemmapConverter(items, tmp_path / "out").convert()
    path = output / "data/000/00000/images.00000.npy"
    data = bytearray(path.read_bytes())
    data[30_000 * 30] ^= 1
    path.write_bytes(data)
    reader = Reader(output, output="array")
    assert reader[3][0][0, 0, 0] == 3
    with pytest.raises(StorageError, match="sample 000000030"):
        reader[30]
    assert Reader(output, output="array", verify="never")[30][0].shape == (100, 100, 3)
    always, first = Reader(output, output="array", verify="always"), Reader(output, output="array")
    assert always[3][0][0, 0, 0] == first[3][0][0, 0, 0] == 3
    data[30_000 * 3 + 5000] ^= 1
    path.write_bytes(data)
    first[3]  # checked once
    with pytest.raises(StorageError):
        always[3]
