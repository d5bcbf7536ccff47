"""Pairs of like embeddings: all that are compared and reach the threshold, whatever the order and the pieces."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.curation import semantic
from pipeline.curation.duplicates import batches, forest
from pipeline.curation.semantic import Block, Vectors, by_cell, cells_for, centres, linked, nearest

COSINE = 0.95


def vectors(count: int, near: int, width: int = 48, noise: float = 0.03, seed: int = 0) -> Vectors:
    """Random directions, and ``near`` of them again with some noise, of nearly but not quite length 1."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(count, width))
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    again = base[:near] + rng.normal(size=(near, width)) * noise
    whole = np.concatenate([base, again]) * rng.uniform(0.98, 1.02, (count + near, 1))
    return rng.permutation(whole).astype(np.float16)


def by_hand(found: Vectors, cosine: float) -> np.ndarray:
    exact = found.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    return forest([np.argwhere(np.triu(exact @ exact.T >= cosine, 1))])


def search(found: Vectors, cells: int, probes: int, most: int = 10**9) -> np.ndarray:
    """The search with all its steps, in chunks of ``most``."""
    middle = centres(found, cells)
    ordered = by_cell(np.arange(len(found)), found, nearest(found, middle, 1 + probes), len(middle))
    links = []
    for cell in range(len(middle)):
        parts = []
        for part in (0, 1):
            start, stop = ordered.starts[2 * cell + part : 2 * cell + part + 2].tolist()
            cuts = range(start, stop, min(most, max(1, stop - start)))
            parts.append([slice(cut, min(stop, cut + most)) for cut in cuts])
        own, visitors = ([Block.of(ordered.places[c], ordered.vectors[c]) for c in chunks] for chunks in parts)
        for number, left in enumerate(own):
            links += [linked(left, left, COSINE)]
            links += [linked(left, right, COSINE) for right in (*own[number + 1 :], *visitors)]
    return forest(links)


def test_all_pairs_that_reach_the_threshold_are_linked() -> None:
    found = vectors(2600, 700)
    block = Block.of(np.arange(len(found)), found)
    links = linked(block, block, COSINE)
    assert 500 < len(links) < 701
    assert np.array_equal(links, by_hand(found, COSINE))


def test_with_all_cells_probed_nothing_is_missed_and_with_two_little() -> None:
    found = vectors(2600, 700)
    expected = by_hand(found, COSINE)
    assert np.array_equal(search(found, cells=12, probes=11), expected)
    assert len(search(found, cells=12, probes=2)) > 0.97 * len(expected)


def test_the_result_does_not_depend_on_chunks() -> None:
    found = vectors(900, 300)
    assert np.array_equal(search(found, 5, 2), search(found, 5, 2, most=37))


def test_a_threshold_that_float32_cannot_decide_is_decided_exactly() -> None:
    """Cosines of exactly 0.6 and 0.8, and of one step less."""
    pair = np.array([[1, 0, 0], [0.6, 0.8, 0]])
    for cosine, expected in ((0.6, 1), (np.nextafter(0.6, 1), 0)):
        scaled = (pair * [[1], [10 / 16]]).astype(np.float16)  # 0.375, 0.5: exact, and so are their lengths
        block = Block.of(np.array([7, 9]), scaled)
        assert len(linked(block, block, cosine)) == expected


def test_a_crowd_of_the_same_is_one_group() -> None:
    crowd = np.repeat(vectors(2, 0), 9000, axis=0)
    block = Block.of(np.arange(len(crowd)), crowd)
    links = linked(block, block, COSINE)
    assert len(links) == len(crowd) - 2 and set(links[:, 0].tolist()) == {0, 9000}


def test_the_nearest_centres_are_exact_and_of_equals_the_first() -> None:
    found, middle = vectors(500, 0), vectors(60, 0, seed=1)
    middle = np.concatenate([middle, middle[:20], middle[:20]])
    exact = found.astype(np.float64) @ middle.astype(np.float64).T
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :4]
    assert np.array_equal(nearest(found, middle, 4), expected)
    assert np.array_equal(nearest(found, middle[:2], 4), np.argsort(-exact[:, :2], axis=1, kind="stable"))


def test_centres_find_clusters_and_come_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    middle = vectors(7, 0, seed=5).astype(np.float64)
    found = (middle[rng.integers(0, 7, 800)] + rng.normal(size=(800, 48)) * 0.02).astype(np.float16)
    mine = centres(found, 7)
    cells = nearest(found, mine, 1)[:, 0]
    assert np.array_equal(mine, centres(found, 7)) and len(np.unique(cells)) >= 5
    assert len(centres(np.repeat(found[:3], 50, axis=0), 7)) == 3, "as many as there are different vectors"
    # in other pieces, with another order of additions
    monkeypatch.setattr(semantic, "_SURE", 1.0)  # so that everything is decided in float64
    assert np.array_equal(mine, centres(found, 7))


def test_cells_grow_with_the_square_root() -> None:
    assert [cells_for(count, 2, count) for count in (10, 4096, 2_000_000)] == [1, 1, 2000]
    assert cells_for(10**9, 2, 10**6) == 44721 and cells_for(10**9, 2, 8000) == 1000
    assert list(batches(np.array([3, 3, 9, 1, 1]), 6)) == [range(2), range(2, 3), range(3, 5)]
