"""Any map-style dataset object, from Python: ``import_dataset(my_dataset, output="/data/mine/train/download")``.

There is no ``source=`` for it, because a configuration must not name code to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.config.cli import build
from pipeline.config.options import without_effect
from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.distributed import Rank
from pipeline.imaging.headers import ImageError, sniff
from pipeline.partitions import engine
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context
from pipeline.registry import nearest
from pipeline.samples import IMAGE_COLUMNS, Outcome, SampleError, Schema, in_words, label_of, make_key
from pipeline.samples.captions import caption_columns, captions_of, shown_names
from pipeline.sources.annotations import Entry
from pipeline.sources.archive_samples import settle
from pipeline.sources.base import Source
from pipeline.sources.memory_images import pixels_of, png, storable
from pipeline.stages.download import Download

_IMAGES = ("image", "jpg", "img", "pixel_values")
_LABELS = ("label", "cls", "target")
_NAME = "torch_dataset"
_OWN = frozenset(("labels", "partition_size"))
"""Settings that have an effect here, in addition to those of every source and stage."""
_ELSEWHERE = frozenset(("source", "input", "seed", "expect_world_size", "rank_offset", "world_size", "hang_timeout"))
"""Settings that select other data, or that tell a launched process its rank."""
_LOOKED_AT = 10  # items examined for labels


class MapDataset(Protocol):
    """A map-style PyTorch dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TorchDataset(Source):
    """Items are ``(image, label or captions)`` or mappings. Images are PIL images, uint8 arrays (h, w[, 3]), bytes or
    paths."""

    rechecks = True

    def __init__(self, config: DownloadConfig, dataset: MapDataset) -> None:
        super().__init__(config)
        self._dataset = dataset

    def schema(self) -> Schema:
        return {**IMAGE_COLUMNS, **({"label": "int"} if self.config.labels else {})}

    def extra(self) -> dict[str, Any]:
        names = class_names(self._dataset) if self.config.labels else []
        return {"classes": names} if names else {}

    def plan(self) -> Iterator[Partition]:
        size, total = self.config.partition_size, len(self._dataset)
        if size < 1:
            raise ConfigError(f"partition_size={size}: must be at least 1")
        fingerprint = getattr(self._dataset, "_fingerprint", "")  # of Hugging Face datasets
        state = fingerprint if isinstance(fingerprint, str) else ""
        for start in range(0, total, size):
            stop = min(start + size, total)
            yield Partition((Input("dataset", start, stop, etag=state),), stop - start)

    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (span,) = partition.inputs
        for number in range(span.start, span.stop):
            key = make_key(f"{number:09d}")
            if partition.wants(key):
                yield self._outcome(key, number)

    def _outcome(self, key: str, number: int) -> Outcome:
        outcome = Outcome(key, "failed", source="dataset", offset=number)
        try:
            image, entry = _parts(self._dataset[number])
            data = _encoded(image)
            outcome.source_bytes = len(data)
            if len(data) > self.config.max_member_bytes:
                raise SampleError("too_many_bytes", f"{len(data)} bytes")
            settle(outcome, data, sniff(data), entry, self.schema())
        except (ImageError, SampleError) as error:
            outcome.reason, outcome.detail = error.reason, error.detail
        except Exception as error:  # any exception of a user's dataset concerns one item only
            outcome.reason, outcome.detail, outcome.retryable = "item_failed", in_words(error), True
        return outcome


def class_names(dataset: Any) -> list[str]:
    """Names of the classes of a Dataset, or of the datasets that it is made of (Subset, ConcatDataset); empty if it
    does not say, or if they differ."""
    names = getattr(dataset, "classes", None)
    if names is None and isinstance(features := getattr(dataset, "features", None), Mapping):  # of Hugging Face
        names = next((getattr(features[name], "names", None) for name in _LABELS if name in features), None)
    if isinstance(names, list | tuple):
        return [str(name) for name in names]
    parts = getattr(dataset, "datasets", None) or [part for part in [getattr(dataset, "dataset", None)] if part]
    found = [class_names(part) for part in parts]
    return found[0] if found and all(one == found[0] for one in found) else []


def _parts(item: Any) -> tuple[Any, Entry]:
    """Split an item into its image and the other fields.

    Raises:
        SampleError: ``no_image``, ``bad_item``, ``bad_label``.
    """
    if isinstance(item, Mapping):
        image = next((item[name] for name in _IMAGES if item.get(name) is not None), None)
        if image is None:
            raise SampleError("no_image", f"a mapping with {shown_names(item)}; expected {', '.join(_IMAGES)}")
        texts = (captions_of(item[name]) for name in caption_columns(item))
        label = next((item[name] for name in _LABELS if item.get(name) is not None), None)
        return image, Entry(next(filter(None, texts), []), label=label_of(label))
    image, *rest = item if isinstance(item, Sequence) and not isinstance(item, bytes | str) else (item,)
    if len(rest) > 1:
        raise SampleError("bad_item", f"{1 + len(rest)} parts; expected (image, label or captions), or a mapping")
    target = rest[0] if rest else None
    if isinstance(target, str | list | tuple | Mapping):
        return image, Entry(captions_of(target))
    return image, Entry(label=label_of(target))


def _encoded(image: Any) -> bytes:
    """The bytes of an image file, or a lossless PNG of an image in memory."""
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if not isinstance(image, Image.Image):
        array = pixels_of(image)
        if array.dtype != np.uint8:
            raise SampleError("no_image", f"an array of {array.dtype}, not of uint8: leave out the dataset's transform")
        image = Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    return png(storable(image))


def _has_labels(dataset: MapDataset) -> bool:
    """Whether the first item that can be read has a label."""
    for number in range(min(len(dataset), _LOOKED_AT)):
        try:
            return _parts(dataset[number])[1].label is not None
        except Exception:
            continue
    return False


def _require_items(dataset: Any) -> None:
    """Raise ConfigError if ``dataset`` is not a map-style dataset."""
    said = f"import_dataset: {type(dataset).__name__}"
    if isinstance(dataset, Mapping):
        raise ConfigError(f"{said} is a mapping of {shown_names(dataset)}: give one of its datasets")
    try:
        total = len(dataset)
        readable = hasattr(dataset, "__getitem__")
    except TypeError:
        readable = False
    if not readable:
        raise ConfigError(f"{said} has no len() and items by index: give a map-style dataset or a list of its items")
    if not total:
        raise ConfigError(f"{said} has no items")


def import_dataset(dataset: MapDataset, /, rank: Rank | None = None, **settings: Any) -> dict[str, Any]:
    """Import all items into the dataset directory ``output=``, or into ``data_dir=`` as ``dataset=``; return the
    content of ``_SUCCESS``.

    Integer targets are used as labels, unless ``labels=False``. Further ``settings`` are those of stage=download.

    Raises:
        ConfigError, StorageError: As for stage=download, for a setting that has no effect here, and for an object
            that is not a map-style dataset.
    """
    _require_items(dataset)
    known = [field.name for field in fields(DownloadConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"{name}: there is no such setting; {nearest(name, known)}")
    for name in _ELSEWHERE & set(settings):
        raise ConfigError(f"{name}={settings[name]}: has no effect in import_dataset")
    given = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    config = build(DownloadConfig, {"labels": _has_labels(dataset), **given})
    config = replace(config, source=_NAME)
    for name in without_effect(config, set(settings) - _OWN):
        raise ConfigError(f"{name}={settings[name]}: has no effect in import_dataset")
    if not config.output and not (config.data_dir and config.dataset):
        raise ConfigError("import_dataset needs output=, or data_dir= and dataset=")

    class Import(Download):
        source = TorchDataset(config, dataset)

    return engine.run(Import(config, rank or Rank()))
