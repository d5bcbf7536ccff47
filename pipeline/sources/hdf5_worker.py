"""Reads HDF5 files in a separate process, because the HDF5 library can crash on damaged files.

Tasks are JSON, answers are JSON followed by the bytes of the images, for :mod:`pipeline.imaging.worker_pool`.
"""

from __future__ import annotations

import json
import math
import struct
from functools import lru_cache
from typing import Any

import h5py
import numpy as np

from pipeline.samples import SampleError, plain
from pipeline.samples.captions import clean_caption, repaired
from pipeline.sources.memory_images import image_reader

_HEAD = struct.Struct("<Q")
_MOST_ARRAYS = 10_000
_LARGEST_ROW = 1 << 30


def answer(task: bytes) -> bytes:
    """Answer a task: ``{"arrays": path}`` or ``{"rows": [start, stop], ...}``."""
    said = json.loads(task)
    try:
        if "arrays" in said:
            return _packed({"arrays": _arrays(said["arrays"])}, [])
        return _rows(said)
    except SampleError as error:
        return _packed({"reason": error.reason, "detail": error.detail}, [])
    except MemoryError:
        return _packed({"reason": "too_many_bytes", "detail": "out of memory"}, [])
    except Exception as error:  # h5py raises almost any exception
        return _packed({"reason": "damaged_hdf5", "detail": type(error).__name__}, [])


def understood(said: bytes | bytearray, task: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Parse an answer to ``task`` into its JSON and images. Raises ValueError if it is not a valid answer."""
    if len(said) < _HEAD.size:
        raise ValueError("no answer")
    (length,) = _HEAD.unpack_from(said)
    end = _HEAD.size + length
    head = json.loads(bytes(said[_HEAD.size : end]))
    if not isinstance(head, dict) or not _fits(head, json.loads(task)):
        raise ValueError("another answer than was asked for")
    sizes = head["sizes"]
    if end + sum(sizes) != len(said):
        raise ValueError("an answer of the wrong length")
    images = []
    for size in sizes:
        images.append(bytes(said[end : end + size]))
        end += size
    return head, images


def _fits(head: dict[str, Any], asked: dict[str, Any]) -> bool:
    sizes, rows = head.get("sizes"), head.get("rows", [])
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size >= 0 for size in sizes):
        return False
    if "reason" in head:
        reason, detail = head["reason"], head.get("detail")
        return isinstance(reason, str) and reason.isidentifier() and isinstance(detail, str) and not sizes
    if "arrays" in asked:
        arrays = head.get("arrays")
        return isinstance(arrays, dict) and all(isinstance(length, int) and length >= 0 for length in arrays.values())
    start, stop = asked["rows"]
    if not isinstance(rows, list) or len(rows) != stop - start or not all(isinstance(row, dict) for row in rows):
        return False
    others = set(asked["columns"]) - {asked["image"]}
    good = [row["values"] for row in rows if "error" not in row and isinstance(row.get("values"), dict)]
    failed = [row for row in rows if isinstance(row.get("error"), str)]
    return len(good) == len(sizes) == len(rows) - len(failed) and all(set(values) == others for values in good)


def _packed(head: dict[str, Any], images: list[bytes]) -> bytes:
    text = json.dumps(head | {"sizes": [len(image) for image in images]}).encode()
    return b"".join([_HEAD.pack(len(text)), text, *images])


@lru_cache(1)
def _opened(path: str, state: str) -> h5py.File:
    return h5py.File(path, "r", locking=False)


def _arrays(path: str) -> dict[str, int]:
    """Return the lengths of a file's arrays by their paths in the file.

    Raises:
        SampleError: ``other_files`` if an array refers to data in another file, which could be any local file.
    """
    found: dict[str, int] = {}

    def note(name: str, item: Any) -> bool | None:
        if isinstance(item, h5py.Dataset) and item.shape and item.dtype.names is None:
            if item.external or item.is_virtual:
                raise SampleError("other_files", f"the data of {clean_caption(name, 80)} lie in another file")
            found[repaired(name)] = int(item.shape[0])
        return True if len(found) > _MOST_ARRAYS else None

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(note)
    return found


def _rows(said: dict[str, Any]) -> bytes:
    """Read the rows [start, stop) of the arrays ``columns``; the column ``image`` holds the images."""
    file = _opened(said["path"], said["state"])
    start, stop = said["rows"]
    columns = {column: file[name] for column, name in said["columns"].items()}
    images = columns[said["image"]]
    encoded = _reader(images, said["most"])
    rows: list[dict[str, Any]] = []
    data: list[bytes] = []
    whole = _slices(columns, start, stop)
    for number in range(start, stop):
        try:
            items = {c: array[number - start] for c, array in whole.items()} if whole else {}
            items = items or {column: array[number] for column, array in columns.items()}
            image = encoded(items.pop(said["image"]))
            values = {column: _value(item) for column, item in items.items()}
        except SampleError as error:
            rows.append({"error": f"{error.reason}: {error.detail}"})
        except Exception as error:
            rows.append({"error": f"damaged: {type(error).__name__}"})
        else:
            rows.append({"values": values})
            data.append(image)
    return _packed({"rows": rows}, data)


def _slices(columns: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Read all rows at once; return an empty dict if some of them cannot be read."""
    try:
        return {column: array[start:stop] for column, array in columns.items()}
    except Exception:
        return {}


def _reader(images: Any, most: int) -> Any:
    """Return a function that converts an item of the HDF5 dataset ``images`` into an image file."""
    if images.ndim == 1 and (kind := h5py.check_vlen_dtype(images.dtype)) is not None and kind == np.uint8:
        return lambda item: np.asarray(item, np.uint8).tobytes()
    if images.ndim == 1 and h5py.check_string_dtype(images.dtype) is not None:
        return lambda item: item if isinstance(item, bytes) else str(item).encode()
    if math.prod(images.shape[1:]) * images.dtype.itemsize > _LARGEST_ROW:
        raise SampleError("too_many_bytes", f"an item of shape {images.shape[1:]}")
    return image_reader(images.shape, images.dtype, most)


def _value(item: Any) -> Any:
    """Convert ``item`` for JSON. Raises SampleError ``bad_field``."""
    if isinstance(item, bytes):
        return repaired(item.rstrip(b"\0"))
    if isinstance(item, np.ndarray) and item.dtype.kind == "O":
        return [_value(part) for part in item.tolist()]
    if isinstance(item, np.ndarray) and item.size == 1 and item.dtype.kind in "iuf":
        item = item.reshape(())
    return plain(item)
