"""Finds samples with similar content by the cosine of their embeddings, in bounded memory.

Each vector is assigned to the cell of the centre with the largest inner product; centres are computed by spherical
k-means on a sample of vectors. A vector is compared with those in its own cell and in the cells of its next nearest
centres (`probes`). Pairs with a cosine of at least a threshold are linked; groups are the connected components
(:func:`pipeline.curation.duplicates.forest`).

The result depends only on the vectors. Products of float16 numbers are multiples of 2^-48, so for vectors of length
about 1 their sums are exact in float64, in any order of summation. Decisions that float32 leaves open (which centre is
nearest, whether a cosine reaches the threshold) are therefore repeated in float64, with the same result on any machine
and for any number of threads.

The work grows as n * sqrt(n): n vectors have about sqrt(probes * n) cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.curation.duplicates import NO_LINKS, Links, forest

Vectors = npt.NDArray[np.float16]
"""(n, d), each of length about 1."""
Places = npt.NDArray[np.int64]

EMBEDDING = "embedding"
"""Column of ``stage=score`` with the embeddings."""
ITERATIONS = 10
PER_CELL = 32
"""Vectors per centre in the k-means sample."""
MOST_CELLS = 1 << 16
_FEW = 4096  # maximum vectors for which all pairs are compared, without cells
_SURE = 1e-4  # error bound of a float32 inner product, with a wide margin
_ROWS, _COLUMNS = 512, 8192  # vectors compared at once


def cells_for(count: int, probes: int, sampled: int) -> int:
    """Number of cells for `count` vectors, `sampled` of which are used for k-means."""
    if count <= _FEW:
        return 1
    return max(1, min(MOST_CELLS, math.isqrt(probes * count), sampled // 8))


def centres(sample: Vectors, count: int) -> Vectors:
    """Compute at most `count` centres (k, d) of `sample` by spherical k-means (Dhillon and Modha, Machine Learning 42,
    2001), starting with the first `count` distinct vectors.

    Centres are rounded to float16. A centre that is nearest to no vector stays unchanged.
    """
    _, first = np.unique(sample, axis=0, return_index=True)
    found: Vectors = sample[np.sort(first)[:count]]
    if len(found) <= 1:
        return found
    for _ in range(ITERATIONS):
        cell = nearest(sample, found, 1)[:, 0]
        order = np.argsort(cell, kind="stable")
        here, starts = np.unique(cell[order], return_index=True)
        sums = np.empty((len(here), sample.shape[1]))
        for column in range(0, sample.shape[1], 64):  # some columns at a time in float64; exact, see above
            part = sample[order, column : column + 64].astype(np.float64)
            sums[:, column : column + 64] = np.add.reduceat(part, starts)
        length = np.sqrt(np.cumsum(sums * sums, axis=1)[:, -1])  # fixed order of rounding on all machines
        good = length > 0
        moved: Vectors = found.copy()
        moved[here[good]] = sums[good] / length[good, None]
        if np.array_equal(moved, found):
            break
        found = moved
    return found


def nearest(vectors: Vectors, centres: Vectors, count: int) -> npt.NDArray[np.int32]:
    """Indices (n, count) of the centres with the largest inner products, in descending order; ties by index."""
    count = min(count, len(centres))
    found = np.empty((len(vectors), count), np.int32)
    whole = np.ascontiguousarray(centres.T, np.float32)
    rows = max(1, (1 << 24) // max(1, len(centres)))
    for start in range(0, len(vectors), rows):
        some = vectors[start : start + rows]
        found[start : start + len(some)] = _nearest(some, centres, some.astype(np.float32) @ whole, count)
    return found


def _nearest(vectors: Vectors, centres: Vectors, near: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int32]:
    """:func:`nearest`, given inner products `near` (n, k) with an error of at most :data:`_SURE`."""
    kept, rows = min(count + 1, near.shape[1]), np.arange(len(near))
    best = np.empty((len(near), kept), np.int64)
    values = np.empty((len(near), kept), np.float32)
    for place in range(kept):  # much faster than argpartition
        best[:, place] = near.argmax(1)
        values[:, place] = near[rows, best[:, place]]
        near[rows, best[:, place]] = -np.inf
    np.put_along_axis(near, best, values, 1)
    for row in np.flatnonzero((-np.diff(values, axis=1) < _SURE).any(1)):
        might = np.flatnonzero(near[row] > values[row, count - 1] - _SURE)
        exact = centres[might].astype(np.float64) @ vectors[row].astype(np.float64)
        chosen = might[np.lexsort((might, -exact))[:count]]
        best[row, :count] = chosen
    return best[:, :count].astype(np.int32)


@dataclass(frozen=True)
class Block:
    """A block of vectors to compare with others.

    Attributes:
        places: positions of the samples, (n,).
        vectors: (n, d).
        unit: the vectors in float32, normalized to length 1.
        squares: exact squared lengths, (n,).
    """

    places: Places
    vectors: Vectors
    unit: npt.NDArray[np.float32]
    squares: npt.NDArray[np.float64]

    @classmethod
    def of(cls, places: Places, vectors: Vectors) -> Block:
        squares = np.empty(len(vectors))
        for start in range(0, len(vectors), _COLUMNS):
            part = vectors[start : start + _COLUMNS].astype(np.float64)
            squares[start : start + _COLUMNS] = np.einsum("ij,ij->i", part, part)
        unit = vectors.astype(np.float32)
        unit /= np.sqrt(squares)[:, None].astype(np.float32)
        return cls(places, vectors, unit, squares)


def linked(left: Block, right: Block, cosine: float) -> Links:
    """Links between samples of `left` and `right`, or within one block if they are the same.

    Their connected components are those of all pairs with a cosine of at least `cosine`.
    """
    same, count = left is right, len(left.places)
    total = count if same else count + len(right.places)
    links, group = NO_LINKS, np.arange(total, dtype=np.int32)
    for row in range(0, count, _ROWS):
        found = [
            _of_tile(left, right, row, column, cosine, group)
            for column in range(row if same else 0, len(right.places), _COLUMNS)
        ]
        if any(map(len, found)):
            links = forest([links, *found])
            graph = coo_array((np.ones(len(links), np.int8), (links[:, 0], links[:, 1])), (total, total))
            group = connected_components(graph, directed=False)[1]
    places = left.places if same else np.concatenate([left.places, right.places])
    return places[links]


def _of_tile(left: Block, right: Block, row: int, column: int, cosine: float, group: npt.NDArray[np.int32]) -> Links:
    """Links that join two groups, between some rows of `left` and some of `right`.

    Samples are numbered consecutively in `left`, then `right` (unless they are the same).
    """
    behind = 0 if left is right else len(left.places)
    high, low = left.unit[row : row + _ROWS], right.unit[column : column + _COLUMNS]
    above, across = group[row : row + len(high)], group[behind + column : behind + column + len(low)]
    if (above == across[0]).all() and (across == across[0]).all():
        return NO_LINKS
    near = high @ low.T
    hit = near >= np.float32(cosine - _SURE)
    hit &= above[:, None] != across
    rows, columns = np.nonzero(hit)
    unsure = np.flatnonzero(near[rows, columns] < cosine + _SURE)
    keep = np.ones(len(rows), bool)
    for start in range(0, len(unsure), _COLUMNS):
        some = unsure[start : start + _COLUMNS]
        keep[some] = _reaches(left, right, rows[some] + row, columns[some] + column, cosine)
    rows, columns = rows[keep], columns[keep]
    # rows linked to the same column form a group: it suffices to link each of them to the first
    first = np.full(len(low), -1, np.int64)
    first[columns[::-1]] = rows[::-1]
    there = np.flatnonzero(first >= 0)
    among = np.zeros((len(high), len(high)), bool)
    among[rows, first[columns]] = True
    one, other = np.nonzero(among)
    return np.concatenate(
        [
            np.stack([row + first[there], behind + column + there], 1),
            np.stack([row + one, row + other], 1)[one != other],
        ]
    )


def _reaches(left: Block, right: Block, rows: Places, columns: Places, cosine: float) -> npt.NDArray[np.bool_]:
    """Whether the cosine of each pair is at least `cosine`, computed exactly."""
    one, other = (block.vectors[at].astype(np.float64) for block, at in ((left, rows), (right, columns)))
    lengths = np.sqrt(left.squares[rows] * right.squares[columns])
    return np.einsum("ij,ij->i", one, other) >= cosine * lengths  # type: ignore[no-any-return]


# ---- vectors on disk, sorted by cell


@dataclass(frozen=True)
class Sorted:
    """Vectors sorted by cell: for each cell, first its own vectors, then its visitors from other cells.

    Attributes:
        starts: starts of each cell's own vectors and visitors, and the end: (2 * cells + 1,).
        places, vectors: positions and vectors, in that order.
    """

    starts: Places
    places: Places
    vectors: Vectors


def by_cell(places: Places, vectors: Vectors, chosen: npt.NDArray[np.int32], cells: int) -> Sorted:
    """Sort vectors (n, d) by cell; `chosen` (n, 1 + probes) has the own cell of each vector, then those it visits."""
    rows, visits = np.indices(chosen.shape)
    number = (2 * chosen.astype(np.int64) + (visits > 0)).ravel()
    order = np.lexsort((places[rows.ravel()], number))
    starts = np.searchsorted(number[order], np.arange(2 * cells + 1))
    mine = rows.ravel()[order]
    return Sorted(starts.astype(np.int64), places[mine], vectors[mine])
