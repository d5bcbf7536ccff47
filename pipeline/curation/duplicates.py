"""Finds exact and near duplicates in a dataset and selects which ones to keep, in bounded memory.

Exact duplicates have equal source bytes (XXH3-128). Near duplicates have perceptual hashes
(:mod:`pipeline.imaging.phash`) that differ in at most `hamming` bits. Groups are the connected components of both
relations; the copy with the highest resolution is kept, and among equals the one with the smallest key. The result
depends only on the samples, not on their order.

Near pairs are found by locality-sensitive hashing: two samples are compared if they agree in all bits of any of
`TABLES` fixed, randomly chosen sets of bits. For n samples, a set has about log2(n) bits, so the work grows as n log n.
Among a million samples, pairs that differ in 8 bits are found with a probability of 99.99 %, in 16 bits with 90 %.

The work is divided into units. A unit has one set of bits (or the content hash) and one bucket, the samples whose
chosen bits have the same remainder. It reads all samples, but holds only those of its bucket in memory, at `ROW_COST`
bytes each. Its result is a list of links that form a star for each group; the union over all units does not depend on
the number of buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.imaging.phash import BITS

TABLES = 32
ROW_COST = 128
"""Memory in bytes that a unit needs per sample of its bucket, including sorting."""
ROW = np.dtype([("content", "<u8", 2), ("look", "<u8", 2), ("known", "?", 2), ("pixels", "<i8"), ("place", "<i8")])
"""A sample: content hash, perceptual hash, whether it has each of them, number of pixels, position in the dataset."""
Rows = npt.NDArray[np.void]
Links = npt.NDArray[np.int64]
"""(n, 2): positions of two samples of the same group, the smallest position of the group first."""
NO_LINKS: Links = np.empty((0, 2), np.int64)

_MOST = 2000  # maximum neighbours to compare a sample with, in each table
_AT_ONCE = 1 << 22  # pairs that are collected before they are reduced to a forest
_CONTENT = -1


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of work: bucket `bucket` of `buckets` for the set of bits `table` (-1: content hash)."""

    table: int
    bucket: int
    buckets: int


def rows(content: Iterable[str], look: Iterable[str], pixels: npt.ArrayLike, places: npt.ArrayLike) -> Rows:
    """Build samples (n,) of type `ROW` from hashes in hexadecimal digits (empty: none), pixels and positions."""
    words, known = zip(_words(content), _words(look), strict=True)
    found = np.empty(len(words[0]), ROW)
    found["content"], found["look"] = words
    found["known"] = np.stack(known, 1)
    found["pixels"], found["place"] = pixels, places
    return found


def _words(hashes: Iterable[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Hashes as words (n, 2), and whether each exists, (n,)."""
    digits = list(hashes)
    words = np.frombuffer(bytes.fromhex("".join([text or _NOTHING for text in digits])), "<u8").reshape(-1, 2)
    return words, np.array([bool(text) for text in digits], bool)


_NOTHING = "0" * 32


def units(count: int, hamming: int, memory: int) -> list[Unit]:
    """Divide the work on `count` samples into units of about `memory` bytes; `hamming` < 0: only exact duplicates."""
    buckets = max(1, -(-count * ROW_COST // memory))
    tables = [_CONTENT, *(range(TABLES) if hamming >= 0 else ())]
    return [Unit(table, bucket, buckets) for table in tables for bucket in range(buckets)]


def links(samples: Iterable[Rows], unit: Unit, count: int, hamming: int) -> Links:
    """Find the links of `unit` among `samples`, which arrive in pieces with `count` samples in total."""
    width = min(32, max(12, count.bit_length()))
    parts = [_of_bucket(some, unit, width) for some in samples]
    words, values, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    if unit.table == _CONTENT:
        order, new = _by_word(words)
        return _same(places[order], new)
    return _near(words, values, places, hamming)


def _of_bucket(
    samples: Rows, unit: Unit, width: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Hashes (n, 2), values of the chosen bits and positions of the samples with a hash in the unit's bucket."""
    by_content = unit.table == _CONTENT
    words = samples["content" if by_content else "look"]
    values = words[:, 0] if by_content else _values(words, _chosen_bits(unit.table, width))
    mine = samples["known"][:, 0 if by_content else 1] & (values % np.uint64(unit.buckets) == unit.bucket)
    return words[mine], values[mine], samples["place"][mine]


def _chosen_bits(table: int, width: int) -> list[int]:
    return sorted(range(BITS), key=lambda bit: xxhash.xxh3_64_intdigest(f"{table}.{bit}"))[:width]


def _values(words: npt.NDArray[np.uint64], chosen: list[int]) -> npt.NDArray[np.uint64]:
    """Extract the chosen bits of hashes (n, 2) as numbers (n,)."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(-1, BITS // 8)
    number = np.arange(256)
    values = np.zeros(len(words), np.uint64)
    for octet in range(BITS // 8):
        known = np.zeros(256, np.uint64)
        for place, bit in enumerate(chosen):
            if bit // 8 == octet:
                known |= ((number >> bit % 8 & 1) << place).astype(np.uint64)
        if known.any():
            values |= known[octets[:, octet]]
    return values


def _by_word(words: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """An order that makes equal hashes (n, 2) adjacent, and whether each position starts a new hash."""
    order = np.lexsort((words[:, 1], words[:, 0]))
    new = np.ones(len(order), bool)
    new[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    return order, new


def _same(places: npt.NDArray[np.int64], new: npt.NDArray[np.bool_]) -> Links:
    """Link each sample to the first one of its run; `new` marks the starts of runs."""
    found: Links = np.stack([places[new][np.cumsum(new) - 1], places], 1)[~new]
    return found


def _near(
    words: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64], places: npt.NDArray[np.int64], hamming: int
) -> Links:
    """Link samples with equal hashes, and those with equal values whose hashes differ in at most `hamming` bits."""
    order, new = _by_word(words)
    same = _same(places[order], new)
    order = order[new]
    order = order[np.argsort(values[order], kind="stable")]
    words, values, places = words[order], values[order], places[order]
    found, held = [same], len(same)
    start = np.arange(len(order))
    for distance in range(1, _MOST):
        start = start[: np.searchsorted(start, len(order) - distance)]
        start = start[values[start] == values[start + distance]]
        if not len(start):
            break
        close = start[np.bitwise_count(words[start] ^ words[start + distance]).sum(1) <= hamming]
        found.append(np.stack([places[close], places[close + distance]], 1))
        held += len(close)
        if held > _AT_ONCE:
            found = [forest(found)]
            held = len(found[0])
    return forest(found)


def forest(parts: Iterable[Links]) -> Links:
    """Merge links into connected components, each as a star around its smallest position, in order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([NO_LINKS, *parts])
    if not len(pairs):
        return NO_LINKS
    places, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), (len(places), len(places)))
    group = connected_components(graph, directed=False)[1]
    _, first = np.unique(group, return_index=True)
    centre = places[first[group]]
    found: Links = np.stack([centre, places], 1)[centre != places]
    return found


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The duplicates to drop, sorted by position; each array is (n,)."""

    places: npt.NDArray[np.int64]
    exact: npt.NDArray[np.bool_]
    """Whether the bytes equal those of the copy that is kept."""
    stays: npt.NDArray[np.int64]
    """Position of the copy that is kept."""


def members(stars: Links) -> npt.NDArray[np.int64]:
    """Sorted positions of all samples in groups."""
    return np.unique(stars)


def decide(
    stars: Links, samples: Rows, by_key: npt.NDArray[np.int64], age: npt.NDArray[np.int64] | None = None
) -> Verdicts:
    """Decide which samples of the groups `stars` to drop.

    Args:
        samples: rows of all `members`, in that order.
        by_key: rank of each sample when sorted by key.
        age: generation of each sample; one of the oldest generation is kept.
    """
    places = members(stars)
    centre = places.copy()
    centre[np.searchsorted(places, stars[:, 1])] = stars[:, 0]
    order = np.lexsort((by_key, -samples["pixels"], np.zeros(len(places)) if age is None else age, centre))
    new = np.ones(len(order), bool)
    new[1:] = centre[order][1:] != centre[order][:-1]
    goes, stays = order[~new], order[new][np.cumsum(new) - 1][~new]
    content = samples["content"]
    exact = (content[goes] == content[stays]).all(1) & samples["known"][goes, 0]
    back = np.argsort(goes)
    return Verdicts(places[goes][back], exact[back], places[stays][back])


def batches(sizes: npt.NDArray[np.int64], most: int) -> Iterator[range]:
    """Yield ranges of consecutive partitions or cells with about `most` samples in total, given their `sizes`."""
    first, held = 0, 0
    for index, size in enumerate(sizes.tolist()):
        if held and held + size > most:
            yield range(first, index)
            first, held = index, 0
        held += size
    if first < len(sizes):
        yield range(first, len(sizes))
