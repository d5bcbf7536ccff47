"""Mixed datasets: how often each sample is seen, and that batches come in the order asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.schema import ConfigError
from pipeline.training.mixture import Mixed, parse_caption_weights, parse_mix


class Numbers:
    """Samples ``first``, ``first + 1``, ..."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def batch(self, positions: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        assert positions.max(initial=0) < self.count
        return {"x": torch.from_numpy(positions + self.first)}


def test_in_an_epoch_samples_come_as_often_as_their_weights_say() -> None:
    mixture = Mixed([(Numbers(0, 10), 1.0), (Numbers(100, 6), 2.5)], seed=0)
    assert len(mixture) == 10 + 15
    seen = mixture.batch(np.arange(25))["x"].tolist()
    assert sorted(x for x in seen if x < 100) == list(range(10))
    counts = [seen.count(x) for x in range(100, 106)]
    assert sorted(counts) == [2, 2, 2, 3, 3, 3]


def test_the_order_is_that_asked_for() -> None:
    mixture = Mixed([(Numbers(0, 10), 1.0), (Numbers(100, 6), 1.0)], seed=0)
    whole = mixture.batch(np.arange(16))["x"]
    chosen = np.array([15, 0, 7, 12, 0])
    assert torch.equal(mixture.batch(chosen)["x"], whole[torch.from_numpy(chosen)])


def test_each_time_that_a_sample_comes_has_a_number_of_its_own() -> None:
    class Seen(Numbers):
        def batch(self, positions: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
            assert epochs is not None
            return {**super().batch(positions), "seen": torch.from_numpy(epochs)}

    mixture = Mixed([(Seen(0, 10), 1.0), (Seen(100, 6), 2.5)], seed=0)
    epochs = [mixture.batch(np.arange(25), np.full(25, epoch)) for epoch in range(3)]
    times = [(x, n) for batch in epochs for x, n in zip(batch["x"].tolist(), batch["seen"].tolist(), strict=True)]
    assert len(set(times)) == len(times) == 75
    assert {n for x, n in times if x < 100} == {0, 1, 2}


def test_weights_are_parsed() -> None:
    assert parse_mix(["/a/b", "/c*0.5"]) == [(Path("/a/b"), 1.0), (Path("/c"), 0.5)]
    for wrong in ("/a*two", "/a*0", "/a*-1"):
        with pytest.raises(ConfigError, match="mix="):
            parse_mix([wrong])
    assert parse_caption_weights(["original", "recaption*3"]) == {"original": 1.0, "recaption": 3.0}
