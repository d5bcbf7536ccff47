"""Images in arrays that others have saved: HDF5 files, ``.npy`` files and ``.npz`` archives."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_stage
import h5py
import numpy as np
import pytest
from PIL import Image
from sources.found import download, kept, photo, write
from sources.test_found_data import left_out
from stages.conftest import run_stage as run_with

from pipeline.config.schema import ConfigError
from pipeline.partitions.finalize import Unbalanced
from pipeline.partitions.planning import Stale
from pipeline.sources import hdf5_worker

COUNT = 70
PIXELS = np.random.default_rng(0).integers(0, 255, (COUNT, 12, 9, 3), np.uint8)
LABELS = (np.arange(COUNT) % 7).astype(np.int32)
Arrays = dict[str, np.ndarray]


def as_npy(folder: Path, arrays: Arrays) -> dict[str, Any]:
    for name, array in arrays.items():
        (folder / f"i/{name}").parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"i/{name}.npy", array)
    return {"source": "npy", "input": str(folder / "i")}


def as_npz(folder: Path, arrays: Arrays) -> dict[str, Any]:
    (folder / "i").mkdir()
    np.savez_compressed(folder / "i/a.npz", **arrays)  # type: ignore[arg-type] # numpy's stubs
    return {"source": "npy", "input": str(folder / "i")}


def as_hdf5(folder: Path, arrays: Arrays) -> dict[str, Any]:
    (folder / "i").mkdir()
    with h5py.File(folder / "i/a.h5", "w") as file:
        for name, array in arrays.items():
            texts = array.dtype.kind == "U"
            value = np.array([str(text).encode() for text in array], object) if texts else array
            more = {"chunks": (2, *array.shape[1:]), "compression": "gzip"} if array.ndim > 1 else {}
            file.create_dataset(name, data=value, dtype=h5py.string_dtype() if texts else None, **more)
    return {"source": "hdf5", "input": str(folder / "i")}


KINDS: dict[str, Callable[[Path, Arrays], dict[str, Any]]] = {"npy": as_npy, "npz": as_npz, "hdf5": as_hdf5}


def pixels_of(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["jpg"])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["images labels captions", "x_train y_train prompt_train", "a/data a/target a/text"])
def test_pixels_labels_and_captions_find_each_other_by_their_names(memory: Path, kind: str, names: str) -> None:
    image, label, text = names.split()
    captions = np.array([f"number {n} é" for n in range(COUNT)])
    settings = KINDS[kind](memory, {image: PIXELS, label: LABELS, text: captions})
    success = download(memory, settings, labels=True)
    assert success["counts"]["kept"] == COUNT and success["reasons"] == {}
    rows = kept(memory)
    assert [row["label"] for row in rows] == LABELS.tolist()
    assert [row["caption"] for row in rows] == captions.tolist()
    assert all(np.array_equal(pixels_of(row), pixels) for row, pixels in zip(rows, PIXELS, strict=True))
    fake_stage.assert_sound(memory / "download")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS.transpose(0, 3, 1, 2), PIXELS),
        (np.asfortranarray(PIXELS), PIXELS),
        (PIXELS[..., 0], PIXELS[..., 0]),
        (PIXELS[..., :1], PIXELS[..., 0]),
        (PIXELS[:, None, :, :, 0], PIXELS[..., 0]),
        (PIXELS > 127, np.where(PIXELS > 127, 255, 0)),
    ],
)
def test_layouts_of_pixels(memory: Path, kind: str, array: np.ndarray, expected: np.ndarray) -> None:
    download(memory, KINDS[kind](memory, {"images": array}))
    assert np.array_equal(np.stack([pixels_of(row) for row in kept(memory)]), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": PIXELS.astype(np.float32)}, "no_images: an array .* of float32; expected"),
        ({"images": PIXELS.reshape(COUNT, -1)}, r"no_images: an array \(70, 324\) of uint8"),
        ({"images": PIXELS, "labels": LABELS[1:]}, "uneven_arrays: .*70 images.*69 labels|uneven_arrays: 69 labels"),
        ({"images": PIXELS, "labels": np.array([{}] * COUNT)}, "pickled: .*can run code"),
    ],
)
def test_what_is_no_array_of_images_says_so(memory: Path, kind: str, arrays: Arrays, reason: str) -> None:
    if kind == "hdf5" and "pickled" in reason:
        pytest.skip("HDF5 holds no Python objects")
    with pytest.raises(Unbalanced, match=reason):
        download(memory, KINDS[kind](memory, arrays), labels="labels" in arrays, max_failed_fraction=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_splits_the_one_asked_for_is_taken(memory: Path, kind: str) -> None:
    """As MedMNIST and Keras keep them; labels have an axis of their own."""
    names = {"train": 5, "val": 3, "test": 2}
    arrays = {f"{name}_images": PIXELS[:count] for name, count in names.items()}
    arrays |= {f"{name}_labels": LABELS[:count, None] for name, count in names.items()}
    settings = KINDS[kind](memory, arrays)
    for split, count in (("train", 5), ("valid", 3), ("test", 2)):
        assert download(memory / split, settings, split=split, labels=True)["counts"]["kept"] == count
    with pytest.raises((ConfigError, Unbalanced), match="split=other: there are arrays of images of the splits test, "):
        download(memory / "other", settings, split="other", max_failed_fraction=0.5)
    assert download(memory / "named", settings, image_column="val_images")["counts"]["kept"] == 3


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_several_arrays_of_images_in_one_file_need_a_choice(memory: Path, kind: str) -> None:
    settings = KINDS[kind](memory, {"left/images": PIXELS, "right/images": PIXELS[:4]})
    with pytest.raises(Unbalanced, match="image_column=: several arrays of images; it has left/images, right/images"):
        download(memory, settings, max_failed_fraction=0.5)
    assert download(memory / "right", settings, image_column="right/images")["counts"]["kept"] == 4


def test_files_whose_names_say_nothing_are_all_of_images(memory: Path) -> None:
    settings = as_npy(memory, {"cat": PIXELS[:3], "dog": PIXELS[3:5]})
    assert download(memory, settings)["counts"] | {"kept": 5, "containers": 2} == download(memory, settings)["counts"]


def test_arrays_that_belong_to_none_are_counted(memory: Path) -> None:
    arrays = {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS[:2], "y_test": LABELS[:2], "notes": LABELS}
    download(memory, as_npy(memory, arrays), labels=True)
    assert left_out(memory) == {
        "array_of_another_split": (1, ["x_test.npy"]),
        "array_without_images": (1, ["notes.npy"]),
    }


def test_changed_labels_are_named(memory: Path) -> None:
    settings = as_npy(memory, {"images": PIXELS, "labels": LABELS})
    download(memory, settings, labels=True)
    np.save(memory / "i/labels.npy", LABELS[::-1])
    with pytest.raises(Stale, match="labels.npy was modified"):
        download(memory, settings, labels=True)


def test_encoded_images_and_further_columns(memory: Path) -> None:
    (memory / "i").mkdir()
    with h5py.File(memory / "i/a.h5", "w") as file:
        images = np.empty(4, object)
        images[:] = [np.frombuffer(photo(n), np.uint8) for n in range(4)]
        file.create_dataset("jpg", data=images, dtype=h5py.vlen_dtype(np.uint8))
        file.create_dataset("score", data=np.array([0.5, np.nan, 2, 3], np.float32))
        file.create_dataset("id", data=np.array([b"a", b"b\xff", b"c", b"d"], "S8"))
    settings = {"source": "hdf5", "input": str(memory / "i/a.h5"), "columns": ("score", "id")}
    download(memory, settings)
    rows = kept(memory)
    assert [row["jpg"] for row in rows] == [photo(n) for n in range(4)]
    assert [row["meta"] for row in rows[:2]] == [{"score": 0.5, "id": "a"}, {"score": None, "id": "b\ufffd"}]


@pytest.mark.parametrize("how", ["external", "virtual", "link"])
def test_an_hdf5_file_cannot_bring_in_other_files(memory: Path, how: str) -> None:
    secret = write(memory / "secret", bytes(range(256)) * 4)
    (memory / "i").mkdir()
    with h5py.File(memory / "other.h5", "w") as file:
        file["images"] = PIXELS
    with h5py.File(memory / "i/a.h5", "w") as file:
        if how == "external":
            file.create_dataset("images", (4, 16, 16), np.uint8, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        elif how == "link":
            file["images"] = h5py.ExternalLink(str(memory / "other.h5"), "images")
        else:
            layout = h5py.VirtualLayout(PIXELS.shape, np.uint8)
            layout[:] = h5py.VirtualSource(str(memory / "other.h5"), "images", PIXELS.shape)
            file.create_virtual_dataset("images", layout)
    success = download(memory, {"source": "hdf5", "input": str(memory / "i")})
    assert success["reasons"] == {"failed:no_column" if how == "link" else "failed:other_files": 1}
    assert success["counts"]["kept"] == 0


def test_a_crash_of_the_library_costs_the_file_and_not_the_rank(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = as_hdf5(memory, {"images": PIXELS})
    monkeypatch.setattr("pipeline.sources.hdf5.WORKER", "sources.test_array_files:crash")
    success = download(memory, settings)
    assert success["reasons"] == {"failed:damaged_hdf5": 1}


def crash(task: bytes) -> bytes:
    os.abort()


@pytest.mark.parametrize("said", [b"", b"\0" * 8, b"\xff" * 20, hdf5_worker._packed({"rows": []}, [b"x"])])
def test_an_answer_that_cannot_be_right_is_refused(said: bytes) -> None:
    with pytest.raises(ValueError, match="answer|Expecting|decode"):
        hdf5_worker.understood(said, b'{"rows": [0, 1], "columns": {"a": "a"}, "image": "a"}')


def test_a_pickle_in_the_place_of_an_array_is_never_loaded(memory: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(memory / "exploded"),)

    write(memory / "i/images.npy", pickle.dumps(Bomb()))
    np.save(memory / "i/images2.npy", np.array([Bomb()] * 2), allow_pickle=True)
    settings = {"source": "npy", "input": str(memory / "i")}
    assert download(memory, settings)["reasons"] == {"failed:damaged_npy": 1, "failed:pickled": 1}
    assert not (memory / "exploded").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_go_straight_to_latents(memory: Path, kind: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (6, 40, 32, 3), np.uint8)
    download(memory, KINDS[kind](memory, {"images": pixels, "captions": np.array(["x"] * 6)}))
    given = {"input": str(memory / "download"), "image_resolutions": (32,)}
    assert run_with("precompute", output=str(memory / "latents"), **given)["counts"]["kept"] == 6
