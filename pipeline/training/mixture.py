"""Several data sets as one, each seen as often as its weight says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config.schema import ConfigError
from pipeline.loading import Batches, Weighted
from pipeline.training.tasks.base import Batch


def parse_mix(entries: Sequence[str]) -> list[tuple[Path, float]]:
    """``<folder>`` or ``<folder>*<weight>`` each → folder and weight.

    Raises:
        ConfigError: a weight is no number above 0.
    """
    parsed = []
    for entry in entries:
        folder, star, weight = entry.rpartition("*")
        try:
            parsed.append((Path(folder if star else entry).absolute(), float(weight) if star else 1.0))
        except ValueError:
            raise ConfigError(f"mix={entry}: expected <folder>*<weight>") from None
        if not 0 < parsed[-1][1] < float("inf"):
            raise ConfigError(f"mix={entry}: the weight must be above 0")
    return parsed


class Mixed:
    """Several data sets as one, each seen as often as its weight says, see :class:`pipeline.loading.loader.Weighted`.

    Args:
        parts: data sets with their weights, all above 0.
    """

    def __init__(self, parts: Sequence[tuple[Batches, float]], seed: int) -> None:
        self._parts = [part for part, _ in parts]
        self._weighted = Weighted([len(part) for part in self._parts], [weight for _, weight in parts], seed)

    def __len__(self) -> int:
        return len(self._weighted)

    def batch(self, positions: np.ndarray) -> Batch:
        """As the parts' batches, in the order asked for."""
        owners, inside = self._weighted.parts.locate(self._weighted.samples(positions))
        batches, places = [], []
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            batches.append(self._parts[number].batch(inside[mine]))
            places.append(mine)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        return {name: torch.cat([batch[name] for batch in batches])[back] for name in batches[0]}
