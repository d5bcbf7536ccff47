"""Any map-style dataset object, from Python: ``import_dataset(my_dataset, output="/data/mine/train/download")``.

There is no ``source=`` for it, as a configuration must not name code to run.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.distributed import Rank
from pipeline.imaging.headers import ImageError, sniff
from pipeline.partitions import engine
from pipeline.partitions.plan import Input, Partition
from pipeline.samples import IMAGE_COLUMNS, Outcome, SampleError, Schema, label_of, make_key
from pipeline.samples.captions import caption_columns, captions_of, shown_names
from pipeline.sources.annotations import Entry
from pipeline.sources.archives.reader import settle
from pipeline.sources.base import Source
from pipeline.sources.memory_images import pixels_of, storable
from pipeline.stages.download import Download

_IMAGES = ("image", "jpg", "img", "pixel_values")
_LABELS = ("label", "cls", "target")
_LOOKED_AT = 10  # items that tell whether there are labels


class MapDataset(Protocol):
    """What torch calls a map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TorchDataset(Source):
    """Items are ``(image, label or captions)`` or mappings; images PIL, arrays (h, w[, 3]) uint8, bytes or paths."""

    rechecks = True

    def __init__(self, config: DownloadConfig, dataset: MapDataset) -> None:
        super().__init__(config)
        self._dataset = dataset

    def schema(self) -> Schema:
        return {**IMAGE_COLUMNS, **({"label": "int"} if self.config.labels else {})}

    def plan(self) -> Iterator[Partition]:
        size, total = self.config.partition_size, len(self._dataset)
        if size < 1:
            raise ConfigError(f"partition_size={size}: must be at least 1")
        for start in range(0, total, size):
            stop = min(start + size, total)
            yield Partition((Input("dataset", start, stop),), stop - start)

    def samples(self, partition: Partition) -> Iterator[Outcome]:
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
            settle(outcome, data, sniff(data), entry, self.schema())
        except (ImageError, SampleError) as error:
            outcome.reason, outcome.detail = error.reason, error.detail
        except Exception as error:  # whatever a foreign dataset raises is about one item
            first = str(error).partition("\n")[0][:200]
            outcome.detail = f"{type(error).__name__}: {first}" if first else type(error).__name__
            outcome.reason, outcome.retryable = "item_failed", True
        return outcome


def _parts(item: Any) -> tuple[Any, Entry]:
    """The image of an item, and what the item says of it.

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
    """The bytes of an image as they are, or as PNG, without loss."""
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if not isinstance(image, Image.Image):
        array = pixels_of(image)
        if array.dtype != np.uint8:
            raise SampleError("no_image", f"an array of {array.dtype}, not of uint8")
        image = Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    file = io.BytesIO()
    storable(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _has_labels(dataset: MapDataset) -> bool:
    """Whether the first item that can be read has a label."""
    for number in range(min(len(dataset), _LOOKED_AT)):
        try:
            return _parts(dataset[number])[1].label is not None
        except Exception:
            continue
    return False


def import_dataset(dataset: MapDataset, rank: Rank | None = None, **settings: Any) -> dict[str, Any]:
    """Bring all items into the dataset directory ``output=``, or below ``data_dir=``; what ``_SUCCESS`` says.

    Targets that are whole numbers are taken as labels, unless ``labels=False``; further ``settings`` as of
    stage=download.

    Raises:
        ConfigError, StorageError: as the stage does.
    """
    labels = settings.get("labels", _has_labels(dataset))
    config = replace(DownloadConfig(**settings), source="torch_dataset", labels=labels)

    class Import(Download):
        source = TorchDataset(config, dataset)

    return engine.run(Import(config, rank or Rank()))
