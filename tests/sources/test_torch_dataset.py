"""Datasets given as Python objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_stage
import numpy as np
from PIL import Image
from sources.test_datasets import photo, rows_of

from pipeline.sources.torch_dataset import import_dataset


class Items(list[Any]):
    """A dataset; what is an exception is raised."""

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return item


def test_items_of_every_kind_become_samples(memory: Path) -> None:
    array = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    items = Items(
        [
            (photo(0), "a caption"),
            (Image.fromarray(array), ["one", "two"]),
            {"image": array, "text": "three"},
            array,
            ValueError("broken"),
            (b"no picture", "x"),
        ]
    )
    success = import_dataset(items, output=str(memory / "out"), partition_size=4, max_failed_fraction=1.0)
    assert success["reasons"] == {"failed:item_failed": 1, "failed:unknown_format": 1}
    rows = rows_of(memory / "out")
    assert [row["captions"] for row in rows] == [["a caption"], ["one", "two"], ["three"], []]
    assert [row["format"] for row in rows] == ["jpeg", "png", "png", "png"]
    items[4] = (photo(1), "mended")
    again = import_dataset(
        items, output=str(memory / "out"), partition_size=4, max_failed_fraction=1.0, retry_failed=True
    )
    assert again["counts"]["kept"] == 5
    fake_stage.assert_sound(memory / "out")


def test_labels(memory: Path) -> None:
    import_dataset(Items([(photo(0), 3), (photo(1), np.int64(4))]), output=str(memory / "out"), labels=True)
    assert [row["label"] for row in rows_of(memory / "out")] == [3, 4]
