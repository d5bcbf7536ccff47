"""Random numbers keyed by what they are for, never by the clock, the rank or the order of arrival.

A key is a seed and any number of parts (texts and integers). Equal keys give equal numbers, on any machine, in any
order and under any number of ranks; different keys give independent streams.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

Part = int | str


def digest(seed: int, *parts: Part, size: int = 16) -> bytes:
    """``size`` bytes (at most 64) that depend on the whole key and on nothing else."""
    text = json.dumps([int(seed), *(part if isinstance(part, str) else int(part) for part in parts)])
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def keyed_seed(seed: int, *parts: Part) -> int:
    """A seed in [0, 2^63) for generators that take one number."""
    return int.from_bytes(digest(seed, *parts, size=8), "little") >> 1


def _philox(seed: int, parts: tuple[Part, ...]) -> np.random.Philox:
    return np.random.Philox(key=np.frombuffer(digest(seed, *parts), dtype="<u8").astype(np.uint64))


def generator(seed: int, *parts: Part) -> np.random.Generator:
    """A generator of its own for this key (about 10 us)."""
    return np.random.Generator(_philox(seed, parts))


def uniforms(count: int, seed: int, *parts: Part) -> np.ndarray:
    """``count`` float64 in [0, 1) from the raw bits, so that no change of numpy's distributions can change them."""
    raw = np.asarray(_philox(seed, parts).random_raw(count), dtype=np.uint64)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(shape: tuple[int, ...], seed: int, *parts: Part) -> np.ndarray:
    """Standard normal float32 of ``shape``."""
    return generator(seed, *parts).standard_normal(shape, dtype=np.float32)
