"""What we write is read by the libraries that these formats come from, without ours."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from formats.conftest import CLASSES, SIZE
from PIL import Image


@pytest.fixture(scope="module")
def files(small_folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in small_folder.glob("*/*")}


def data_files(output: Path, pattern: str) -> list[str]:
    return sorted(map(str, output.glob(f"data/*/*/{pattern}")))


def test_mosaicml_streaming(small: dict[str, Path], files: set[bytes]) -> None:
    import streaming

    dataset = streaming.StreamingDataset(
        local=str(small["mds"]), shuffle=False, batch_size=1, validate_hash="xxh3_128", allow_unsafe_types=False
    )
    samples = [dataset[index] for index in range(len(dataset))]
    assert len(samples) == 60
    assert {sample["label"] for sample in samples} == {0, 1, 2}
    assert all(isinstance(sample["jpg"], Image.Image) for sample in samples)


def test_webdataset(small: dict[str, Path], files: set[bytes]) -> None:
    import webdataset

    dataset = webdataset.WebDataset(data_files(small["tar"], "*.tar"), shardshuffle=False, empty_check=False)
    samples = list(dataset)
    images = {data for sample in samples for name, data in sample.items() if name in ("jpg", "png", "webp", "gif")}
    assert images == files
    assert [json.loads(sample["json"])["label"] for sample in samples] == [0] * 20 + [1] * 20 + [2] * 20


@pytest.fixture(scope="module")
def tars(small: dict[str, Path]) -> list[str]:
    return data_files(small["tar"], "*.tar")


def test_webdataset_decodes_and_makes_tuples(tars: list[str]) -> None:
    import webdataset

    pictured = ("jpg", "jpeg", "png")  # what its "pil" decodes
    found = list(webdataset.WebDataset(tars, shardshuffle=False))
    expected = {one["__key__"]: one["txt"].decode() for one in found if any(name in one for name in pictured)}
    assert len(found) == 60 and len(expected) > 50
    decoded = webdataset.WebDataset(tars, shardshuffle=2, seed=3).shuffle(10).decode("pil")
    chosen = decoded.select(lambda one: any(name in one for name in pictured))
    tuples = chosen.to_tuple(";".join(pictured), "txt", "json", "__key__").map_tuple(lambda image: image.convert("RGB"))
    seen = {key: (image, text, fields) for image, text, fields, key in tuples}
    assert {key: text for key, (_, text, _) in seen.items()} == expected
    assert all(key.startswith(CLASSES[fields["label"]]) for key, (_, _, fields) in seen.items())
    assert all(image.mode == "RGB" and min(image.size) >= 24 for image, _, _ in seen.values())
    sizes = [len(keys) for keys, _ in chosen.to_tuple("__key__", "txt").batched(8)]
    assert sum(sizes) == len(expected) and set(sizes[:-1]) == {8}


def test_webdataset_expands_lists_of_our_tars(tars: list[str]) -> None:
    import webdataset

    assert len(tars) == 3
    pattern = tars[0].replace("/00000/00000.tar", "/{00000..00002}/00000.tar")
    assert [Path(one["url"]).parent.name for one in webdataset.SimpleShardList(pattern)] == ["00000", "00001", "00002"]
    whole = webdataset.WebDataset("::".join(tars), shardshuffle=False)
    assert len(list(whole)) == 60 and len(list(whole)) == 60  # each epoch
    assert len(list(webdataset.WebDataset(tars, resampled=True).slice(70))) == 70


def test_webdataset_splits_our_tars_among_nodes_and_workers(tars: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import webdataset
    from torch.utils.data import DataLoader

    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        mine = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=webdataset.split_by_node)
        loader = DataLoader(mine.to_tuple("__key__", "txt"), batch_size=None, num_workers=2 - rank)
        seen.append([key for key, _ in loader])
    monkeypatch.delenv("WORLD_SIZE")
    everything = [one["__key__"] for one in webdataset.WebDataset(tars, shardshuffle=False)]
    assert all(seen) and sorted(seen[0] + seen[1]) == sorted(everything)
    loader = webdataset.WebLoader(
        webdataset.WebDataset(tars, shardshuffle=False).to_tuple("__key__", "txt"), batch_size=7
    )
    assert [key for keys, _ in loader for key in keys] == everything


def test_pyarrow(small: dict[str, Path], files: set[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    for kind, pattern in (("parquet", "samples.*.parquet"), ("arrow", "samples.*.arrow")):
        table = ds.dataset(
            data_files(small["parquet" if kind == "parquet" else "ipc"], pattern), format=kind
        ).to_table()
        assert set(table["jpg"].to_pylist()) == files
        assert table["label"].to_pylist() == [0] * 20 + [1] * 20 + [2] * 20
    (first, *_) = data_files(small["ipc"], "samples.*.arrow")
    with pa.memory_map(first) as file:
        assert pa.ipc.open_file(file).read_all().num_rows == 20
    (first, *_) = data_files(small["parquet"], "samples.*.parquet")
    assert pq.ParquetFile(first).read_row_group(0, columns=["key"]).num_rows == 20


def test_hugging_face_datasets(small: dict[str, Path], files: set[bytes], tmp_path: Path) -> None:
    import datasets

    for name, kind, pattern in (("parquet", "parquet", "*s.*.parquet"), ("ipc", "arrow", "*s.*.arrow")):
        found = datasets.load_dataset(
            kind, data_files=data_files(small[name], pattern), split="train", cache_dir=str(tmp_path / kind)
        )
        assert set(found["jpg"]) == files


def test_h5py(small: dict[str, Path]) -> None:
    import h5py

    labels = []
    for path in data_files(small["hdf5"], "*.h5"):
        with h5py.File(path) as file:
            assert file["images"].shape[1:] == (*SIZE, 3)
            assert file["images"][:].std() > 10
            labels += file["label"][:].tolist()
            assert all("/" in key for key in file["key"].asstr()[:])
    assert labels == [0] * 20 + [1] * 20 + [2] * 20


def test_numpy(small: dict[str, Path]) -> None:
    labels: list[int] = []
    for path in data_files(small["memmap"], "images.*.npy"):
        images = np.load(path, mmap_mode="r")
        assert isinstance(images, np.memmap)
        assert images.shape[1:] == (*SIZE, 3) and images.dtype == np.uint8 and images.std() > 10
        labels += np.load(path.replace("images.", "labels."), mmap_mode="r").tolist()
    assert labels == [0] * 20 + [1] * 20 + [2] * 20


def test_class_names_are_stored_in_order(small: dict[str, Path]) -> None:
    for output in small.values():
        assert json.loads((output / "manifest.json").read_text())["classes"] == list(CLASSES)


def test_masks_are_an_array_of_their_own(tmp_path: Path) -> None:
    """(num, height, width, channels), in memmap and in HDF5."""
    import h5py

    from pipeline.formats import DenseMemmapConverter, HDF5Converter

    masks = np.random.default_rng(0).integers(0, 200, (6, *SIZE, 2)).astype(np.uint8)
    items = [(np.zeros((*SIZE, 3), np.uint8), mask) for mask in masks]
    memmap = DenseMemmapConverter(items, tmp_path / "memmap").convert()
    assert np.array_equal(np.load(data_files(memmap, "masks.*.npy")[0], mmap_mode="r"), masks)
    hdf5 = HDF5Converter(items, tmp_path / "hdf5", compression="gzip").convert()
    with h5py.File(data_files(hdf5, "*.h5")[0]) as file:
        assert np.array_equal(file["masks"][:], masks)


def test_tar_members_are_named_as_their_bytes_are(small: dict[str, Path]) -> None:
    import tarfile

    with tarfile.open(data_files(small["tar"], "*.tar")[0]) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    for name, data in members.items():
        extension = name.rpartition(".")[2]
        if extension not in ("txt", "json"):
            expected = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}[extension]
            assert Image.open(io.BytesIO(data)).format == expected
