"""Finds exact and near duplicates in a whole dataset, and chooses which to keep, in bounded memory.

Exact: equal source bytes (their XXH3-128). Near: perceptual hashes (:mod:`pipeline.imaging.phash`) that differ in at
most `hamming` bits. Duplicates are the connected components of both; the highest-resolution copy stays, among equals
the one with the smallest key. All of it is a function of the samples alone, in whatever order they come.

Near pairs are found by locality-sensitive hashing: two are compared if they agree in all of some randomly chosen bits,
in any of `TABLES` choices (fixed ones). Among n samples a choice has about log2(n) bits, so that the work grows as
n log n. Of a million, pairs that differ in 8 bits are found with a probability of 99.99 %, in 16 with 90 %.

The work falls into units, each of one choice of bits (or the content) and of one bucket, the samples whose chosen bits
have the same remainder: a unit looks at all samples in turn, but holds those of its bucket only, at `ROW_COST` bytes
each. What a unit finds it says as links: a star for each group. Their union does not depend on the number of buckets.
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
"""Bytes of memory that a unit takes for each sample of its bucket, sorting included."""
ROW = np.dtype([("content", "<u8", 2), ("look", "<u8", 2), ("known", "?", 2), ("pixels", "<i8"), ("place", "<i8")])
"""A sample: hash of its bytes, perceptual hash, whether it has them, pixels, position in the dataset."""
Rows = npt.NDArray[np.void]
Links = npt.NDArray[np.int64]
"""(n, 2): places of two samples that belong together, the smallest of its group first."""
NO_LINKS: Links = np.empty((0, 2), np.int64)

_MOST = 2000  # neighbours that a sample is compared with in a table: if more agree, all are alike
_AT_ONCE = 1 << 22  # pairs that are held before they are made a forest
_CONTENT = -1


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the work: bucket number `bucket` of `buckets` in the choice of bits `table` (-1: by content)."""

    table: int
    bucket: int
    buckets: int


def rows(content: Iterable[str], look: Iterable[str], pixels: npt.ArrayLike, places: npt.ArrayLike) -> Rows:
    """Samples (n,) of type `ROW`; hashes as hexadecimal digits, empty where there is none."""
    words, known = zip(_words(content), _words(look), strict=True)
    found = np.empty(len(words[0]), ROW)
    found["content"], found["look"] = words
    found["known"] = np.stack(known, 1)
    found["pixels"], found["place"] = pixels, places
    return found


def _words(hashes: Iterable[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Hashes (n, 2), and which there are."""
    digits = list(hashes)
    words = np.frombuffer(bytes.fromhex("".join([text or _NOTHING for text in digits])), "<u8").reshape(-1, 2)
    return words, np.array([bool(text) for text in digits], bool)


_NOTHING = "0" * 32


def units(count: int, hamming: int, memory: int) -> list[Unit]:
    """The work on `count` samples, in pieces that take about `memory` bytes; `hamming` below 0: only exact ones."""
    buckets = max(1, -(-count * ROW_COST // memory))
    tables = [_CONTENT, *(range(TABLES) if hamming >= 0 else ())]
    return [Unit(table, bucket, buckets) for table in tables for bucket in range(buckets)]


def links(samples: Iterable[Rows], unit: Unit, count: int, hamming: int) -> Links:
    """What belongs together by `unit`, of `samples` that come in pieces, `count` in all."""
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
    """Hashes (n, 2), their values and the places of what is of the unit's bucket and has a hash."""
    by_content = unit.table == _CONTENT
    words = samples["content" if by_content else "look"]
    values = words[:, 0] if by_content else _values(words, _chosen_bits(unit.table, width))
    mine = samples["known"][:, 0 if by_content else 1] & (values % np.uint64(unit.buckets) == unit.bucket)
    return words[mine], values[mine], samples["place"][mine]


def _chosen_bits(table: int, width: int) -> list[int]:
    return sorted(range(BITS), key=lambda bit: xxhash.xxh3_64_intdigest(f"{table}.{bit}"))[:width]


def _values(words: npt.NDArray[np.uint64], chosen: list[int]) -> npt.NDArray[np.uint64]:
    """The chosen bits of hashes (n, 2), as numbers (n,)."""
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
    """An order in which equal hashes (n, 2) are neighbours, and where in it another one begins."""
    order = np.lexsort((words[:, 1], words[:, 0]))
    new = np.ones(len(order), bool)
    new[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    return order, new


def _same(places: npt.NDArray[np.int64], new: npt.NDArray[np.bool_]) -> Links:
    """Links of those that follow one another up to the next `new` one."""
    found: Links = np.stack([places[new][np.cumsum(new) - 1], places], 1)[~new]
    return found


def _near(
    words: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64], places: npt.NDArray[np.int64], hamming: int
) -> Links:
    """Samples of equal hashes, and of hashes that differ in at most `hamming` bits among those of equal values."""
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
    """The same groups as all of `parts` make together, each as a star around its smallest place, in order."""
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
    """What goes, in the order of places: (n,) each."""

    places: npt.NDArray[np.int64]
    exact: npt.NDArray[np.bool_]
    """Whether its bytes are those of the one that stays."""
    stays: npt.NDArray[np.int64]
    """Place of the one that stays."""


def members(stars: Links) -> npt.NDArray[np.int64]:
    """Places of all samples in groups, in order."""
    return np.unique(stars)


def decide(
    stars: Links, samples: Rows, by_key: npt.NDArray[np.int64], age: npt.NDArray[np.int64] | None = None
) -> Verdicts:
    """What goes of the groups `stars`.

    Args:
        samples: rows of all `members`, in that order.
        by_key: rank of each by its key.
        age: generation that each came with: what came first stays, whatever came later.
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
    """Ranges of consecutive partitions or cells that hold about `most` samples together; `sizes`: of each."""
    first, held = 0, 0
    for index, size in enumerate(sizes.tolist()):
        if held and held + size > most:
            yield range(first, index)
            first, held = index, 0
        held += size
    if first < len(sizes):
        yield range(first, len(sizes))
