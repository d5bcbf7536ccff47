"""Embedded data: scikit-learn's 1,797 labelled digits of 8x8 pixels, with fixed splits ``train`` and ``test``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context
from pipeline.randomness import Permutation
from pipeline.registry import sources
from pipeline.samples import IMAGE_COLUMNS, Outcome, Schema, caption_fields, content_hash
from pipeline.sources.base import Source

_TEST = 450


@sources.register("digits")
class Digits(Source):
    """1,347 training and 450 test images; the random split is fixed."""

    rechecks = True

    def extra(self) -> dict[str, Any]:
        return {"classes": [str(digit) for digit in range(10)]}

    def schema(self) -> Schema:
        return {**IMAGE_COLUMNS, "label": "int"}

    def plan(self) -> Iterator[Partition]:
        if self.config.split not in ("train", "test"):
            raise ConfigError(f"split={self.config.split}: digits has train and test")
        for start in range(0, len(self._chosen), self.config.partition_size):
            stop = min(start + self.config.partition_size, len(self._chosen))
            yield Partition((Input(f"digits-{self.config.split}", start, stop),), stop - start)

    @cached_property
    def _chosen(self) -> npt.NDArray[Any]:
        order = Permutation(len(self._all[1]), 0)[np.arange(len(self._all[1]))]
        return np.sort(order[:_TEST] if self.config.split == "test" else order[_TEST:])

    @cached_property
    def _all(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        from sklearn.datasets import load_digits

        data = load_digits()
        return np.round(data.images * (255 / 16)).astype(np.uint8), data.target

    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (some,) = partition.inputs
        for index in self._chosen[some.start : some.stop].tolist():
            file = BytesIO()
            Image.fromarray(self._all[0][index]).save(file, "PNG")
            data, label = file.getvalue(), int(self._all[1][index])
            key = f"{label}/{index:04d}"
            row = {"key": key, "jpg": data, "format": "png", "label": label, **caption_fields([])}
            yield Outcome(
                key,
                "kept",
                source="digits",
                offset=index,
                source_bytes=len(data),
                source_hash=content_hash(data),
                width=8,
                height=8,
                row=row,
            )
