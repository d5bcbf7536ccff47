"""Random numbers keyed by their purpose, never by the clock, the rank or the order of arrival.

A key is a seed and any number of parts (strings and integers). Equal keys give equal numbers, on any machine, in any
order and with any number of ranks; different keys give independent streams.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Part = int | str
_ROUNDS = 6
_MIN_BITS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64, Steele et al., OOPSLA 2014


def digest(seed: int, *parts: Part, size: int = 16) -> bytes:
    """``size`` bytes (at most 64) that depend only on the key."""
    text = json.dumps([int(seed), *(part if isinstance(part, str) else int(part) for part in parts)])
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def keyed_seed(seed: int, *parts: Part) -> int:
    """A seed in [0, 2^63) for generators that are seeded with one integer."""
    return int.from_bytes(digest(seed, *parts, size=8), "little") >> 1


def _philox(seed: int, parts: tuple[Part, ...]) -> np.random.Philox:
    return np.random.Philox(key=np.frombuffer(digest(seed, *parts), dtype="<u8").astype(np.uint64))


def generator(seed: int, *parts: Part) -> np.random.Generator:
    """A generator for this key; takes about 10 µs to make."""
    return np.random.Generator(_philox(seed, parts))


def uniforms(count: int, seed: int, *parts: Part) -> npt.NDArray[Any]:
    """``count`` float64 in [0, 1), made from raw bits so that they do not depend on numpy's distributions."""
    raw = np.asarray(_philox(seed, parts).random_raw(count), dtype=np.uint64)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(shape: tuple[int, ...], seed: int, *parts: Part) -> npt.NDArray[Any]:
    """Standard normal float32 values of ``shape``."""
    return generator(seed, *parts).standard_normal(shape, dtype=np.float32)


class Permutation:
    """A pseudo-random permutation of ``range(n)`` that is computed, not stored.

    An alternating Feistel network permutes the next power of two; results outside ``range(n)`` are permuted again
    until they fall inside ("cycle walking", Black and Rogaway, CT-RSA 2002). This takes few rounds, because n is more
    than half of the power of two, except for tiny n, where it is fast anyway.

    Args:
        n: number of elements, at most 2^62.
        seed: any integer; equal seeds give equal permutations on every platform.
    """

    def __init__(self, n: int, seed: int) -> None:
        if not 0 <= n <= 2**62:
            raise ValueError(f"a permutation of {n} elements: expected 0 to 2^62")
        bits = max(_MIN_BITS, (n - 1).bit_length() if n else 0)
        self._n = n
        self._left = np.uint64(bits // 2)
        self._right = np.uint64(bits - bits // 2)
        keys = digest(seed, "permutation", n, size=8 * _ROUNDS)
        self._keys = np.frombuffer(keys, dtype="<u8").astype(np.uint64)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: npt.NDArray[Any]) -> npt.NDArray[Any]: ...

    def __getitem__(self, index: int | npt.NDArray[Any]) -> int | npt.NDArray[Any]:
        """The permuted ``index``: an int for an int, int64 of the same shape for an integer array.

        Raises:
            IndexError: an index is outside [0, n).
        """
        given = np.asarray(index)
        if given.size and (given.min() < 0 or given.max() >= self._n):
            raise IndexError(f"index outside of a permutation of {self._n} elements")
        values = self._network(np.atleast_1d(given).astype(np.uint64))
        outside = np.flatnonzero(values >= self._n)
        while outside.size:
            values.flat[outside] = self._network(values.flat[outside])
            outside = outside[values.flat[outside] >= self._n]
        if isinstance(index, np.ndarray):
            return values.astype(np.int64).reshape(given.shape)
        return int(values[0])

    def __iter__(self) -> Iterator[int]:
        block = 1 << 16
        for start in range(0, self._n, block):
            yield from self[np.arange(start, min(start + block, self._n))].tolist()

    def _network(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One pass of the Feistel network over uint64 ``values``; a bijection of [0, 2^(left + right))."""
        left_mask, right_mask = ((np.uint64(1) << width) - np.uint64(1) for width in (self._left, self._right))
        left, right = values >> self._right, values & right_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                right = right ^ (mix(left ^ key) & right_mask)
            else:
                left = left ^ (mix(right ^ key) & left_mask)
        return (left << self._right) | right


def mix(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Mix uint64 ``values`` so that every bit affects all bits (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    found: npt.NDArray[Any] = values ^ (values >> np.uint64(31))
    return found
