"""The order of samples: every one exactly once an epoch, whatever the number of ranks, through any number of lives."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.formats import MDSConverter
from pipeline.loading import (
    Concatenated,
    Epochs,
    Loader,
    Mixture,
    Permutation,
    RemoteMds,
    Sampler,
    ShardLocal,
    order,
    sequential,
)


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


@settings(deadline=None)
@given(n=st.integers(1, 200), batch=st.integers(1, 50), world=st.integers(1, 8), lives=st.lists(st.integers(1, 20)))
def test_any_number_of_ranks_and_lives_sees_the_same_batches(n: int, batch: int, world: int, lives: list[int]) -> None:
    batch = max(batch, world)
    assert _epoch(n, batch, world, lives) == _epoch(n, batch, 1, [])


@settings(deadline=None)
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


def test_importing_the_sampler_does_not_import_torch() -> None:
    program = "import sys, pipeline.loading.loader, pipeline.encoders.base; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- other orders, and loaders


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any),
    window=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_shard_local_order_is_a_permutation_that_stays_in_a_window_of_blocks(
    sizes: list[int], window: int, seed: int
) -> None:
    starts = np.cumsum([0, *sizes])
    n = int(starts[-1])
    chosen = ShardLocal(starts, window)(seed, 0, n)[np.arange(n)]
    assert np.array_equal(np.sort(chosen), np.arange(n))
    blocks = np.searchsorted(starts, chosen, "right") - 1
    _, last = np.unique(blocks[::-1], return_index=True)
    first = {block: int(np.argmax(blocks == block)) for block in set(blocks.tolist())}
    for block in first:  # from its first to its last sample, no more than a window of blocks is touched
        span = blocks[first[block] : n - int(last[sorted(first).index(block)])]
        assert len(set(span.tolist())) <= window


def test_shard_local_order_differs_by_epoch_and_can_be_asked_anywhere() -> None:
    order_of = ShardLocal([0, 10, 20, 30, 47], 2)
    one, two = (order_of(1, epoch, 47)[np.arange(47)] for epoch in (0, 1))
    assert not np.array_equal(one, two)
    assert np.array_equal(order_of(1, 0, 47)[np.array([40, 3])], one[[40, 3]])
    with pytest.raises(ValueError, match="hold 47 samples, but there are 48"):
        order_of(1, 0, 48)
    with pytest.raises(ValueError, match="starts must increase"):
        ShardLocal([0, 5, 3])


def test_a_mixture_has_the_shares_that_it_was_given_and_each_dataset_its_epochs() -> None:
    mixture = Mixture([Epochs(100, 1), Epochs(40, 2), Epochs(7, 3)], [0.5, 0.3, 0.2], seed=4, block=64)
    stream = mixture.samples(np.arange(6400))
    owners = np.searchsorted([100, 140, 147], stream, "right")
    assert np.bincount(owners).tolist() == [3200, 1920, 1280]
    for stop in range(64, 6400, 64):
        assert np.abs(np.bincount(owners[:stop], minlength=3) - np.array([0.5, 0.3, 0.2]) * stop).max() <= 1
    for number, (first, n) in enumerate([(0, 100), (100, 40), (140, 7)]):
        own = stream[owners == number] - first
        for epoch in range(len(own) // n):
            assert sorted(own[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert np.array_equal(mixture.samples(np.array([5000, 17, 17])), stream[[5000, 17, 17]])
    for weights in ([1.0], [1.0, 0.0, 1.0], [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match="weight"):
            Mixture([Epochs(3, 0)] * 3, weights, 0)


LIVES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=5)
"""(ranks, batch size, batches until the stop) of each life."""
STREAMS = {
    "shuffled": lambda n: None,
    "shard-local": lambda n: Epochs(n, 3, ShardLocal([0, n // 3, n // 2, n], 2)),
    "sequential": lambda n: Epochs(n, 3, sequential),
}


@pytest.mark.parametrize("stream", STREAMS)
@settings(deadline=None, max_examples=50)
@given(n=st.integers(3, 150), epochs=st.integers(1, 3), lives=LIVES)
def test_any_sequence_of_ranks_batch_sizes_and_stops_gives_each_sample_once_an_epoch_in_one_order(
    stream: str, n: int, epochs: int, lives: list[tuple[int, int, int]]
) -> None:
    def samplers(ranks: int, batch: int) -> list[Sampler]:
        return [
            Sampler(n, max(batch, ranks), 3, rank, ranks, stream=STREAMS[stream](n), epochs=epochs)
            for rank in range(ranks)
        ]

    state = samplers(1, 1)[0].state()
    seen: list[int] = []
    for ranks, batch, steps in [*lives, (2, 7, 10**6)]:
        running = samplers(ranks, batch)
        for sampler in running:
            sampler.load(state)
        for _ in range(steps):
            if running[0].finished:
                break
            seen += [int(sample) for sampler in running for sample in sampler.positions()]
            for sampler in running:
                sampler.advance()
        state = running[-1].state()
    alone = samplers(1, n * epochs)[0]
    assert seen == alone.positions().tolist()
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_state_of_another_order_is_refused() -> None:
    state = Sampler(60, 8, 3).state()
    with pytest.raises(ValueError, match="stream="):
        Sampler(60, 8, 3, stream=Epochs(60, 3, sequential)).load(state)
    with pytest.raises(ValueError, match="the stream is of 60 samples, not of 61"):
        Sampler(61, 8, 3, stream=Epochs(60, 3))


class Squares:
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> int:
        return index * index


def test_loaders_go_on_with_other_ranks_and_workers_whatever_was_read_ahead() -> None:
    """(ranks, workers, batch size, batches until the stop) of each life; every rank has a loader of its own."""
    state = Sampler(50, 1, 9).state()
    seen: list[int] = []
    for ranks, workers, batch, steps in [(1, 2, 7, 3), (3, 0, 8, 2), (2, 1, 5, 4), (1, 0, 50, 99)]:
        loaders = [
            Loader(Squares(), Sampler(50, batch, 9, rank, ranks, epochs=2), num_workers=workers, collate_fn=list)
            for rank in range(ranks)
        ]
        for loader in loaders:
            loader.load_state_dict(state)
        for batches in islice(zip(*loaders, strict=True), steps):
            seen += chain.from_iterable(batches)
            state = loaders[-1].state_dict()
    expected = [*order(9, 0, 50), *order(9, 1, 50)]
    assert seen == [index * index for index in expected]
    with pytest.raises(ValueError, match="batch_size is set by the sampler"):
        Loader(Squares(), Sampler(50, 1, 9), batch_size=3)


def test_mixed_datasets_are_numbered_as_the_mixture_numbers_them() -> None:
    both = Concatenated([Squares(), ["a", "b", "c"]])
    assert len(both) == 53 and [both[0], both[49], both[50], both[52]] == [0, 2401, "a", "c"]
    mixture = Mixture([Epochs(50, 1), Epochs(3, 1)], [1, 1], seed=2, block=10)
    samples = list(islice(Loader(both, Sampler(53, 10, 2, stream=mixture), collate_fn=list), 4))
    assert [sum(isinstance(value, str) for value in batch) for batch in samples] == [5, 5, 5, 5]


def test_remote_mds_is_read_by_streaming_dataset_in_our_order(tmp_path: Path) -> None:
    pytest.importorskip("streaming")
    items = [{"image": np.full((4, 4, 3), n, np.uint8), "label": n} for n in range(12)]
    MDSConverter(items, tmp_path / "remote", images_per_file=5).convert()
    dataset = RemoteMds(str(tmp_path / "remote"), str(tmp_path / "cache"))
    loader = Loader(dataset, Sampler(12, 5, 1, epochs=1), collate_fn=list)
    assert [sample["label"] for batch in loader for sample in batch] == list(order(1, 0, 12))
