"""The digits: every one in train or in test, with its label and its pixels."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.partitions.stage import Context
from pipeline.sources.base import Source, get_source


def source_of(split: str) -> Source:
    return get_source(DownloadConfig(source="digits", split=split), Path("nowhere"), lambda: None)


def test_each_digit_is_in_one_part_as_it_was_scanned() -> None:
    data = load_digits()
    seen = []
    for split, count in (("train", 1347), ("test", 450)):
        source = source_of(split)
        found = [outcome for partition in source.plan() for outcome in source.samples(partition, Context())]
        assert len(found) == count
        for outcome in found:
            assert outcome.row is not None
            assert outcome.row["label"] == data.target[outcome.offset]
            pixels = np.asarray(Image.open(BytesIO(outcome.row["jpg"])))
            assert np.array_equal(np.round(pixels.astype(float) * (16 / 255)), data.images[outcome.offset])
        seen += [outcome.offset for outcome in found]
    assert sorted(seen) == list(range(1797))


def test_another_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="split=valid: digits has train and test"):
        list(source_of("valid").plan())
