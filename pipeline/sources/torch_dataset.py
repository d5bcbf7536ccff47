"""Any map-style dataset object, from Python: ``import_dataset(my_dataset, output="/data/mine/train/download")``.

There is no ``source=`` for it, as a configuration must not name code to run.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.config import ConfigError, DownloadConfig
from pipeline.distributed import Rank
from pipeline.headers import ImageError, sniff
from pipeline.partitions import engine
from pipeline.partitions.plan import Input, Partition
from pipeline.samples import IMAGE_COLUMNS, Outcome, Schema, make_key
from pipeline.sources.annotations import Entry
from pipeline.sources.archives.reader import settle
from pipeline.sources.base import Source
from pipeline.sources.lists import CAPTION_COLUMNS, texts
from pipeline.stages.download import Download

_IMAGES = ("image", "jpg", "img", "pixel_values")
_LABELS = ("label", "cls", "target")


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
        except ImageError as error:
            outcome.reason, outcome.detail = error.reason, error.detail
        except Exception as error:  # whatever a foreign dataset raises is about one item
            outcome.reason, outcome.detail, outcome.retryable = "item_failed", type(error).__name__, True
        return outcome


def _parts(item: Any) -> tuple[Any, Entry]:
    if isinstance(item, dict):
        image = next(item[name] for name in _IMAGES if name in item)
        captions = next((item[name] for name in CAPTION_COLUMNS if name in item), None)
        label = next((item[name] for name in _LABELS if name in item), None)
        return image, Entry(texts(captions), {}, None if label is None else int(label))
    image, *rest = item if isinstance(item, Sequence) and not isinstance(item, bytes | str) else (item,)
    target = rest[0] if rest else None
    if isinstance(target, str | list | tuple):
        return image, Entry(texts(list(target) if isinstance(target, tuple) else target))
    return image, Entry(label=None if target is None else int(target))


def _encoded(image: Any) -> bytes:
    """The bytes of an image as they are, or as PNG, without loss."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            raise TypeError(f"an array of {array.dtype}, not of uint8")
        image = Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def import_dataset(dataset: MapDataset, rank: Rank | None = None, **settings: Any) -> dict[str, Any]:
    """Bring all items into the dataset directory ``output=``, or below ``data_dir=``; what ``_SUCCESS`` says.

    ``labels=True`` where targets are classes; further ``settings`` as of stage=download.

    Raises:
        ConfigError, StorageError: as the stage does.
    """
    config = replace(DownloadConfig(**settings), source="torch_dataset")

    class Import(Download):
        source = TorchDataset(config, dataset)

    return engine.run(Import(config, rank or Rank()))
