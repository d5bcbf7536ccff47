"""The inputs of stage=shard: a dataset directory, a folder of images, or a map-style Dataset of Python objects."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config.schema import ConfigError, DownloadConfig, ShardConfig
from pipeline.formats.base import IMAGE, MASK
from pipeline.formats.pixel_arrays import to_bytes
from pipeline.imaging import transform
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.plan import Input, LeftOut, Partition, file_state
from pipeline.partitions.stage import Context
from pipeline.randomness import Permutation, keyed_seed
from pipeline.samples import (
    IMAGE_COLUMNS,
    Outcome,
    Row,
    SampleError,
    Schema,
    caption_fields,
    content_hash,
    in_words,
    label_of,
    path_text,
    plain,
)
from pipeline.samples.captions import captions_of, repaired
from pipeline.sources.annotations import synset_names
from pipeline.sources.image_folder import ImageFolder, walk
from pipeline.sources.lists import NAME_COLUMNS, open_list
from pipeline.sources.memory_images import pixels_of, storable, upright
from pipeline.sources.text_files import suffix_of
from pipeline.sources.torch_dataset import class_names

_PARTITIONS = 32
"""Minimum number of partitions, so that ranks share the work evenly, unless partitions would become too small."""
_LEAST_BYTES, _MOST_BYTES = 32 << 20, 256 << 20
"""Target size of a partition: smaller ones add commit overhead, larger ones lose more work when a rank is killed."""
_ITEM_BYTES = 128 << 10
"""Assumed size of a Dataset's item until one has been measured."""
_HEADER_COLUMNS: Schema = {"width": "int", "height": "int", "mode": "str"}
_OF_A_DATASET = ("plan", "data", "claims", "events")


def is_image_folder(path: str) -> bool:
    """Whether ``path`` is a folder of files that was not written by a stage."""
    folder = Path(path)
    if not path or not folder.is_dir() or (folder / "plan").is_dir():
        return False
    return any(not name.startswith(".") and name not in _OF_A_DATASET for name in os.listdir(folder))


class Items(ABC):
    """An ordered collection of input samples that can be cut into partitions."""

    def __init__(self, config: ShardConfig) -> None:
        self.config = config

    @abstractmethod
    def schema(self) -> Schema:
        """Names and types of the rows' columns."""

    def extra(self) -> dict[str, Any]:
        """Facts about the samples for the manifest."""
        return {}

    def watched(self) -> dict[str, str]:
        """Files other than the inputs that samples depend on: name → state."""
        return {}

    def left_out(self) -> LeftOut:
        """Files that look like data but were not samples of the last plan."""
        return LeftOut()

    def changed(self, file: Input) -> bool:
        """Whether a planned input has changed."""
        return True

    @abstractmethod
    def plan(self, since: int, sample_bytes: int) -> Iterator[Partition]:
        """Partitions of even size, from upstream partition ``since`` on; ``sample_bytes``: per sample, 0 if unknown."""

    @abstractmethod
    def outcomes(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        """The outcome of each sample of the partition; ``context.extra`` is what :meth:`extra` returned at planning."""

    @abstractmethod
    def some(self) -> Iterator[Row]:
        """Valid samples, starting with the first, from which types and sizes are inferred."""

    def cuts(self, total: int, sample_bytes: float) -> Iterator[tuple[int, int]]:
        """Ranges of even size over ``total`` samples of ``sample_bytes`` bytes each."""
        sample_bytes = max(sample_bytes, 1)
        wanted = min(max(total * sample_bytes / _PARTITIONS, _LEAST_BYTES), _MOST_BYTES)
        size = self.config.partition_size or max(1, int(wanted / sample_bytes))
        count = -(-total // size)
        for number in range(count):
            yield total * number // count, total * (number + 1) // count

    def order(self, positions: npt.NDArray[Any], total: int, *key: int) -> npt.NDArray[Any]:
        """``positions``; with ``shuffle``, mapped by a permutation of ``range(total)`` keyed by seed and ``key``."""
        if not self.config.shuffle:
            return positions
        return Permutation(total, keyed_seed(self.config.seed, "shard", *key))[positions]


class Upstream(Items):
    """The kept samples of a dataset directory."""

    def __init__(self, config: ShardConfig, dataset: Dataset) -> None:
        super().__init__(config)
        self.dataset = dataset

    def schema(self) -> Schema:
        return dict(self.dataset.schema)

    def extra(self) -> dict[str, Any]:
        return dict(self.dataset.header["extra"])

    def plan(self, since: int, sample_bytes: int) -> Iterator[Partition]:
        """Samples that the upstream gained since are partitioned and shuffled separately."""
        starts = self.dataset.places
        first, total = int(starts[since]), int(starts[-1] - starts[since])
        counts = self.dataset.require_success()["counts"]
        for start, stop in self.cuts(total, sample_bytes or counts["bytes"] / max(counts["kept"], 1)):
            yield Partition((Input("upstream", first, first + total), Input("positions", start, stop)), stop - start)

    def outcomes(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        whole, span = partition.inputs
        positions = self.order(np.arange(span.start, span.stop), whole.stop - whole.start, whole.start)
        access = RandomAccess(self.dataset, taken=True)
        for position in positions:
            stored = access.stored(whole.start + int(position))
            outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
            try:
                outcome.row = stored.read()
            except SampleError as error:
                yield _failed(outcome, error)
                continue
            yield _kept(outcome)

    def some(self) -> Iterator[Row]:
        access = RandomAccess(self.dataset)
        for position in range(min(len(access), 100)):
            try:
                yield access.row(position)
            except SampleError:
                continue


class Folder(Items):
    """Images in a folder, read in place."""

    @cached_property
    def source(self) -> ImageFolder:
        config = self.config
        given = DownloadConfig(source="image_folder", input=config.input, copy=True, captions=config.captions)
        return ImageFolder(given)

    @cached_property
    def labels(self) -> dict[str, str]:
        """File name → class, read from the file ``labels``."""
        return read_labels(Path(self.config.labels)) if self.config.labels else {}

    @cached_property
    def classes(self) -> list[str]:
        if self.config.classes:
            return read_classes(Path(self.config.classes))
        return sorted(set(self.labels.values())) if self.labels else self.source.classes

    def schema(self) -> Schema:
        return {**IMAGE_COLUMNS, **_HEADER_COLUMNS, **({"label": "int"} if self.classes else {})}

    def extra(self) -> dict[str, Any]:
        return {"classes": self.classes} if self.classes else {}

    def watched(self) -> dict[str, str]:
        lists = {path: file_state(path) for path in (self.config.labels, self.config.classes) if Path(path).is_file()}
        return self.source.watched() | {Path(path).name: state for path, state in lists.items()}

    def left_out(self) -> LeftOut:
        return self.source.left_out

    def changed(self, file: Input) -> bool:
        return self.source.changed(file)

    def plan(self, since: int, sample_bytes: int) -> Iterator[Partition]:
        files = [file for partition in self.source.plan() for file in partition.inputs]
        if not files:
            raise ConfigError(f"input={self.config.input}: no image below this folder")
        mean = sum(file.size for file in files) / len(files)
        for start, stop in self.cuts(len(files), sample_bytes or mean):
            chosen = self.order(np.arange(start, stop), len(files), 0)
            yield Partition(tuple(files[i] for i in chosen), stop - start)

    def outcomes(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        numbers = {name: number for number, name in enumerate(context.extra.get("classes", []))}
        for outcome in self.source.samples(partition, replace(context, planned={})):
            if outcome.row is not None:
                try:
                    outcome.row |= header_columns(outcome.row[IMAGE])
                    if numbers:
                        outcome.row["label"] = self._label(outcome.source, numbers)
                except SampleError as error:
                    outcome.row = None
                    yield _failed(outcome, error)
                    continue
                outcome = _kept(outcome)
            yield outcome

    def _label(self, path: str, numbers: dict[str, int]) -> int:
        name = path.partition("/")[0]
        if self.labels:
            file = path.rpartition("/")[2]
            name = self.labels.get(path) or self.labels.get(file) or self.labels.get(file.rpartition(".")[0]) or ""
        if name not in numbers:
            raise SampleError("no_label", f"{name!r} is not a class" if name else "not in the file of labels")
        return numbers[name]

    def some(self) -> Iterator[Row]:
        context = Context({"extra": self.extra()})
        for found in walk(self.source.root):
            file = Input(path_text(found.path), size=found.size, mtime_ns=found.mtime_ns)
            for outcome in self.outcomes(Partition((file,), 1), context):
                if outcome.row is not None:
                    yield outcome.row


Collate = Callable[[list[Any]], list[Row]]
"""Turns items of a Dataset into rows with ``image`` and optional further columns; see :func:`rows_of`."""


class Objects(Items):
    """The items of a map-style Dataset.

    Args:
        dataset: an object with ``__len__`` and ``__getitem__``.
        collate: turns a list of items into rows.
        batch_size: number of items that ``collate`` receives at once.
    """

    def __init__(self, config: ShardConfig, dataset: Any, collate: Collate, batch_size: int) -> None:
        super().__init__(config)
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ConfigError(f"input_data: {type(dataset).__name__} has no __len__ and __getitem__")
        if not len(dataset):
            raise ConfigError(f"input_data: {type(dataset).__name__} is empty")
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size

    def schema(self) -> Schema:
        row = next(self.some(), None)
        if row is None:
            raise ConfigError(f"input_data: none of the first items of {type(self.dataset).__name__} can be read")
        known = {**IMAGE_COLUMNS, **_HEADER_COLUMNS, "label": "int", MASK: "bytes"}
        return {name: known.get(name) or kind_of(value) for name, value in row.items()}

    def extra(self) -> dict[str, Any]:
        classes = class_names(self.dataset)
        return {"classes": classes} if classes else {}

    def plan(self, since: int, sample_bytes: int) -> Iterator[Partition]:
        total = len(self.dataset)
        name = type(self.dataset).__qualname__
        for start, stop in self.cuts(total, sample_bytes or _ITEM_BYTES):
            yield Partition((Input(name, 0, total), Input("positions", start, stop)), stop - start)

    def outcomes(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        whole, span = partition.inputs
        positions = self.order(np.arange(span.start, span.stop), whole.stop - whole.start, 0).tolist()
        for start in range(0, len(positions), self.batch_size):
            yield from self._batch(positions[start : start + self.batch_size])

    def some(self) -> Iterator[Row]:
        for position in range(min(len(self.dataset), 100)):
            for outcome in self._batch([position]):
                if outcome.row is not None:
                    yield outcome.row

    def _batch(self, positions: Sequence[int]) -> Iterator[Outcome]:
        found: list[Any] = [self._item(position) for position in positions]
        good = [item for item in found if not isinstance(item, SampleError)]
        rows = iter(self.collate(good) if good else [])
        for position, item in zip(positions, found, strict=True):
            outcome = Outcome(f"{position:09d}", "failed", source=str(position), offset=position)
            try:
                if isinstance(item, SampleError):
                    raise item
                row = next(rows, None)
                if row is None:
                    raise ValueError("_custom_collate_fn returned fewer rows than it received items")
                outcome.row = completed(outcome.key, row)
                outcome.key = outcome.row["key"]
            except SampleError as error:
                yield _failed(outcome, error)
                continue
            yield _kept(outcome)

    def _item(self, position: int) -> Any:
        try:
            return self.dataset[position]
        except Exception as error:  # a user's Dataset may raise anything; only this sample fails
            return SampleError("dataset_raised", in_words(error))


def _kept(outcome: Outcome) -> Outcome:
    row = outcome.row or {}
    outcome.status = "kept"
    outcome.width, outcome.height = row.get("width", 0), row.get("height", 0)
    if not outcome.source_hash and isinstance(data := row.get(IMAGE), bytes):
        outcome.source_bytes, outcome.source_hash = len(data), content_hash(data)
    return outcome


def _failed(outcome: Outcome, error: SampleError) -> Outcome:
    outcome.status, outcome.reason, outcome.detail = "failed", error.reason, error.detail
    outcome.retryable = error.retryable
    return outcome


# ---- rows


def rows_of(items: list[Any]) -> list[Row]:
    """Turn items into rows. An item is ``(image, label)``, ``(image, mask)``, an image, or a mapping with ``image``
    and other columns.

    An image or mask is the bytes or path of a file, a PIL image, an array (h, w[, c]) or a tensor (c, h, w). An integer
    is a label; a string or a list of strings are captions.
    """
    return [_row(item) for item in items]


def _row(item: Any) -> Row:
    if isinstance(item, dict):
        row = dict(item)
    elif isinstance(item, (tuple, list)):
        row = {"image": item[0]}
        if len(item) > 1 and item[1] is not None:
            row[_name_of(item[1])] = item[1]
        if len(item) > 2:
            raise ConfigError(
                f"input_data: an item has {len(item)} parts: give (image, label), a mapping, or your own collate"
            )
    else:
        row = {"image": item}
    if "image" not in row and IMAGE not in row:
        raise ConfigError(f"input_data: an item has no 'image'; it has {', '.join(map(str, row))}")
    return row


def _name_of(target: Any) -> str:
    if isinstance(target, (bool, int, np.integer)) or getattr(target, "ndim", None) == 0:
        return "label"
    texts = isinstance(target, str) or (isinstance(target, (list, tuple)) and all(isinstance(t, str) for t in target))
    return "captions" if texts else MASK


def completed(key: str, row: Row) -> Row:
    """``row`` with the columns that every sample has, and values in their stored form."""
    row = dict(row)
    data, kind = file_of(row.pop("image") if "image" in row else row[IMAGE])
    first = row.pop("caption", [])
    captions = row.pop("captions", [])
    made: Row = {
        "key": repaired(str(row.pop("key", key))),
        IMAGE: data,
        "format": kind,
        **caption_fields(captions_of(captions) or first),
        **(header_columns(data) if kind != "npy" else _npy_columns(data)),
    }
    row.pop(IMAGE, None)
    if "label" in row:
        label = label_of(row.pop("label"))
        if label is None:
            raise SampleError("no_label")
        made["label"] = label
    if row.get(MASK) is not None:
        made[MASK] = file_of(row.pop(MASK), numbers=True)[0]
    return made | {str(name): _plain(value) for name, value in row.items() if name not in made}


def file_of(value: Any, *, numbers: bool = False) -> tuple[bytes, str]:
    """The bytes of an image file and its format; anything else than a file is encoded losslessly.

    ``numbers``: values are numbers, not colours, so palette indices are kept.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
    elif isinstance(value, (str, os.PathLike)):
        try:
            data = Path(value).read_bytes()
        except OSError as error:
            raise SampleError("unreadable", error.strerror or "") from None
    else:
        if isinstance(value, Image.Image):
            value = upright(value) if numbers else storable(value)
        return to_bytes(pixels_of(value, numbers=numbers))
    if data.startswith(b"\x93NUMPY"):
        return data, "npy"
    try:
        return data, transform.probe(data).format
    except transform.ImageError as error:
        raise SampleError(error.reason, error.detail) from None


def header_columns(data: bytes) -> Row:
    """Format, size and mode according to the image's header, regardless of the file name."""
    try:
        header = transform.probe(data)
    except transform.ImageError as error:
        raise SampleError(error.reason, error.detail) from None
    width, height = header.upright
    return {"format": header.format, "width": width, "height": height, "mode": header.mode}


def _npy_columns(data: bytes) -> Row:
    from pipeline.formats.pixel_arrays import from_npy

    array = from_npy(data)
    return {"width": array.shape[1], "height": array.shape[0], "mode": str(array.dtype)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) or hasattr(value, "detach"):
        from pipeline.formats.pixel_arrays import to_npy

        return to_npy(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    return value if isinstance(value, bytes) else plain(value)


def kind_of(value: Any) -> str:
    """The column type for values like this one."""
    if isinstance(value, bytes):
        return "bytes"
    return "int" if isinstance(value, int) else "str" if isinstance(value, str) else "json"


# ---- classes


def read_classes(path: Path) -> list[str]:
    """Class names in label order, from a converted dataset, a folder of class folders, ``.json`` or ``.txt``.

    Raises:
        ConfigError: ``path`` is none of these or names no classes.
    """
    try:
        if (path / "plan").is_dir():
            found = Dataset.open(path).header["extra"].get("classes")
        elif path.is_dir():
            found = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        elif path.suffix == ".json":
            found = json.loads(path.read_text())
        else:
            found = [words[0] for line in path.read_text().splitlines() if (words := line.split())]
    except (OSError, ValueError) as error:
        raise ConfigError(f"classes={path}: cannot be read: {error}") from None
    if isinstance(found, dict):  # name → label
        found = sorted(found, key=lambda name: found[name])
    if not found:
        raise ConfigError(f"classes={path}: names no classes")
    return [str(name) for name in found]


def read_labels(path: Path) -> dict[str, str]:
    """Read a mapping of file name to class.

    Accepts a list with two columns (in ImageNet's ``LOC_val_solution.csv``, the first word of the second counts), a
    ``.json`` mapping, a ``.txt`` with a pair on each line, or ``ILSVRC2012_validation_ground_truth.txt`` of ImageNet's
    devkit. The numbers in the latter are not in WordNet order; ``meta.mat`` in its folder or one above maps them to
    names.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        if path.name.endswith("validation_ground_truth.txt"):
            names = _devkit_names(path)
            numbers = path.read_text().split()
            return {f"ILSVRC2012_val_{n:08d}": names[int(number)] for n, number in enumerate(numbers, 1)}
        return _named_labels(path)
    except ConfigError as error:
        raise ConfigError(f"labels={error}") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"labels={path}: cannot be read: {error}") from None


def _named_labels(path: Path) -> dict[str, str]:
    """Pairs of name and class from a list; if the class is several words, the first is used."""
    labels: dict[str, str] = {}
    for number, row in enumerate(open_list(path, "a file of labels", heading=False).rows(), 1):
        values = [str(value) for value in row.values.values() if isinstance(value, str | int)]
        pair = values[0].split(None, 1) if suffix_of(path) == ".txt" else values
        words = pair[1].split() if len(pair) > 1 else []
        if number == 1 and pair and pair[0].strip().lower() in ("imageid", *NAME_COLUMNS):
            continue  # the header row
        if row.error or not words or not pair[0].strip():
            raise ConfigError(f"{path}: row {number}: {row.error or 'expected a name and a class'}")
        labels[pair[0].strip()] = words[0]
    return labels


def _devkit_names(path: Path) -> dict[int, str]:
    found = next((folder / "meta.mat" for folder in path.parents[:2] if (folder / "meta.mat").is_file()), None)
    if found is None:
        raise ConfigError(f"{path}: meta.mat of the devkit must lie next to it")
    return synset_names(found)
