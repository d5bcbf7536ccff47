"""Several datasets as one, with samples repeated in proportion to their dataset's weight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.schema import ConfigError
from pipeline.loading import Batches, Weighted
from pipeline.randomness import keyed_seed
from pipeline.stores import is_url
from pipeline.training.feed import bucket_starts
from pipeline.training.tasks.base import Batch


def parse_mix(entries: Sequence[str]) -> list[tuple[Path, float]]:
    """Parse ``<folder>`` or ``<folder>*<weight>`` entries → (folder, weight).

    Raises:
        ConfigError: a weight is not a number above 0.
    """
    parsed = (_weighted("mix", entry, "folder") for entry in entries)
    return [(Path(place) if is_url(place) else Path(place).absolute(), weight) for place, weight in parsed]


def parse_caption_weights(entries: Sequence[str]) -> dict[str, float]:
    """Parse ``<source>`` or ``<source>*<weight>`` entries → weight by source.

    Raises:
        ConfigError: a weight is not a number above 0, or a source has two.
    """
    weights: dict[str, float] = {}
    for entry in entries:
        source, weight = _weighted("caption_weights", entry, "source")
        if source in weights:
            raise ConfigError(f"caption_weights={entry}: there are two weights for {source}")
        weights[source] = weight
    return weights


def _weighted(option: str, entry: str, what: str) -> tuple[str, float]:
    name, _, weight = entry.rpartition("*") if "*" in entry else (entry, "", "1")
    try:
        number = float(weight)
    except ValueError:
        raise ConfigError(f"{option}={entry}: expected <{what}>*<weight>") from None
    if not 0 < number < float("inf"):
        raise ConfigError(f"{option}={entry}: the weight must be above 0")
    return name, number


def _spans(parts: Sequence[Batches]) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Bucket size → start and end of its samples in each part; without buckets, all under ()."""
    if not bucket_starts(parts[0]):
        return {(): [(0, len(part)) for part in parts]}
    known = [dict(zip(part.order.sizes, pairwise(bucket_starts(part)), strict=True)) for part in parts]  # type: ignore[attr-defined]
    sizes = sorted({size for spans in known for size in spans})
    return {size: [spans.get(size, (0, 0)) for spans in known] for size in sizes}


def _seed(seed: int, size: tuple[int, ...]) -> int:
    return keyed_seed(seed, "bucket", *size) if size else seed


class Mixed:
    """Several datasets as one, with samples repeated in proportion to their dataset's weight.

    See :class:`pipeline.loading.sampler.Weighted`.

    Args:
        parts: datasets with their weights, all above 0.
    """

    def __init__(self, parts: Sequence[tuple[Batches, float]], seed: int) -> None:
        self._parts = [part for part, _ in parts]
        weights = [weight for _, weight in parts]
        self._buckets = [
            Weighted([last - first for first, last in spans], weights, _seed(seed, size), min(weights))
            for size, spans in _spans(self._parts).items()
        ]
        self._firsts = [[first for first, _ in spans] for spans in _spans(self._parts).values()]
        self._starts = np.cumsum([0, *map(len, self._buckets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def bucket_starts(self) -> tuple[int, ...]:
        """As :attr:`TrainingLatents.bucket_starts`."""
        return tuple(self._starts.tolist()) if bucket_starts(self._parts[0]) else ()

    def batch(self, positions: npt.NDArray[Any], epochs: npt.NDArray[Any] | None = None) -> Batch:
        """Read a batch from the parts, in the order of ``positions``; with buckets, all must be in one. The parts also
        receive how often each sample was seen before, including repetitions within an epoch."""
        bucket = int(np.searchsorted(self._starts, positions[0], "right")) - 1 if len(positions) else 0
        weighted = self._buckets[bucket]
        places = positions - self._starts[bucket]
        owners, inside = weighted.parts.locate(weighted.samples(places))
        seen = None if epochs is None else weighted.seen(places, epochs)
        inside = inside + np.array(self._firsts[bucket], np.int64)[owners]
        batches, order = [], []
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            batches.append(self._parts[number].batch(inside[mine], None if seen is None else seen[mine]))
            order.append(mine)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return {name: torch.cat([batch[name] for batch in batches])[back] for name in batches[0]}
