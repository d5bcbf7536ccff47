"""The order of samples: every one exactly once an epoch, whatever the number of ranks, through any number of lives."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.loading import LatentDataset, Permutation, Sampler, order


@given(n=st.integers(0, 3000), seed=st.integers(0, 2**64))
def test_a_permutation_is_a_bijection(n: int, seed: int) -> None:
    permuted = Permutation(n, seed)[np.arange(n)]
    assert permuted.dtype == np.int64
    assert np.array_equal(np.sort(permuted), np.arange(n))


@given(n=st.integers(1, 2**62), seed=st.integers(), index=st.data())
def test_single_elements_are_those_of_the_array_and_stay_inside(n: int, seed: int, index: Any) -> None:
    some = index.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    permutation = Permutation(n, seed)
    array = permutation[np.array(some)]
    assert [permutation[i] for i in some] == array.tolist()
    assert len(set(array.tolist())) == len(some)
    assert array.min() >= 0 and array.max() < n


def test_a_permutation_keeps_the_shape_and_refuses_what_is_outside() -> None:
    permutation = Permutation(10, 0)
    assert permutation[np.zeros((2, 3), int)].shape == (2, 3)
    assert permutation[np.array([], int)].shape == (0,)
    assert sorted(permutation) == list(range(10)) and len(permutation) == 10
    for outside in (-1, 10, np.array([3, 10])):
        with pytest.raises(IndexError):
            permutation[outside]
    with pytest.raises(ValueError, match="expected 0 to 2"):
        Permutation(-1, 0)


def test_a_permutation_is_the_same_on_every_platform() -> None:
    assert list(Permutation(8, 1)) == [6, 3, 1, 5, 0, 4, 2, 7]
    assert Permutation(10**12, 5)[0] == 511806593357


def test_permutations_look_random() -> None:
    """Of 500 permutations of 1000: how often tenth i goes to tenth j; chi-square of 81 degrees of freedom."""
    counts = np.zeros((10, 10))
    for seed in range(500):
        np.add.at(counts, (np.arange(1000) // 100, Permutation(1000, seed)[np.arange(1000)] // 100), 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 140


def test_all_orders_of_three_are_about_equally_frequent() -> None:
    orders, counts = np.unique([list(Permutation(3, seed)) for seed in range(1200)], axis=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 150


def _epoch(n: int, batch_size: int, world_size: int, lives: list[int]) -> list[list[int]]:
    """Samples of each step, ranks one after the other; ``lives``: steps after which the run is killed and resumed."""
    samplers = [Sampler(n, batch_size, 3, rank, world_size) for rank in range(world_size)]
    steps = []
    for step in range(2 * n // batch_size):
        if step in lives:
            state = samplers[0].state()
            samplers = [Sampler(n, batch_size, 3, rank, world_size) for rank in range(world_size)]
            for sampler in samplers:
                sampler.load(state)
        steps.append([int(i) for sampler in samplers for i in sampler.positions()])
        for sampler in samplers:
            sampler.advance()
    return steps


@given(n=st.integers(1, 200), batch=st.integers(1, 50), world=st.integers(1, 8), lives=st.lists(st.integers(1, 20)))
def test_any_number_of_ranks_and_lives_sees_the_same_batches(n: int, batch: int, world: int, lives: list[int]) -> None:
    batch = max(batch, world)
    assert _epoch(n, batch, world, lives) == _epoch(n, batch, 1, [])


@given(n=st.integers(1, 200), batch=st.integers(1, 50))
def test_each_epoch_holds_each_sample_once_though_batches_cross_its_end(n: int, batch: int) -> None:
    stream = list(chain.from_iterable(_epoch(n, batch, 1, [])))
    for epoch in range(len(stream) // n):
        samples = stream[epoch * n : (epoch + 1) * n]
        assert sorted(samples) == list(range(n))
        assert samples == list(order(3, epoch, n))


def test_batches_are_never_empty_for_a_rank_nor_differ_by_more_than_one() -> None:
    sizes = [len(Sampler(100, 10, 0, rank, 4).positions()) for rank in range(4)]
    assert sum(sizes) == 10 and max(sizes) - min(sizes) == 1
    with pytest.raises(ValueError, match="batch_size=3 is less than one sample for each of 4 ranks"):
        Sampler(100, 3, 0, 0, 4)
    with pytest.raises(ValueError, match="no samples"):
        Sampler(0, 3, 0)


@pytest.mark.parametrize("change", [{"seed": 4}, {"n": 99}])
def test_a_position_in_other_data_is_refused(change: dict[str, int]) -> None:
    state = Sampler(100, 10, 3).state()
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        Sampler(**{"n": 100, "batch_size": 10, "seed": 3, **change}).load(state)


class Stored:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, positions: Any) -> list[dict[str, Any]]:
        return [self._rows[i] for i in positions]


def _stored(count: int) -> Stored:
    rows = []
    for i in range(count):
        image, text = np.full((2, 3, 3), i, np.float16), np.full((4, 5), -i, np.float16)
        rows.append({"key": str(i), "caption": "", "latents_24": image.tobytes(), "caption_latents": text.tobytes()})
    return Stored(rows)


def test_latents_come_as_tensors_in_the_order_asked_for() -> None:
    data = LatentDataset(_stored(6), (2, 3, 3), (4, 5), 24)
    batch = data.batch(np.array([5, 0, 3]))
    assert len(data) == 6
    assert batch["image_latents"].shape == (3, 2, 3, 3) and batch["caption_latents"].shape == (3, 4, 5)
    assert batch["image_latents"][:, 0, 0, 0].tolist() == [5, 0, 3]
    assert batch["caption_latents"].mean((1, 2)).tolist() == [-5, 0, -3]


def test_a_sample_of_another_shape_or_without_the_column_is_named() -> None:
    with pytest.raises(ValueError, match="sample '1' has no column 'latents_512'; it has caption"):
        LatentDataset(_stored(2), (2, 3, 3), (4, 5), 512).batch(np.array([1]))
    with pytest.raises(ValueError, match=r"sample '0': latents_24 holds 18 values, expected \(4, 3, 3\)"):
        LatentDataset(_stored(2), (4, 3, 3), (4, 5), 24).batch(np.array([0]))


def test_importing_the_sampler_does_not_import_torch() -> None:
    program = "import sys, pipeline.loading, pipeline.encoders.base; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
