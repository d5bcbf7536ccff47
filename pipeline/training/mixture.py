"""Several data sets as one, each seen as often as its weight says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config import ConfigError
from pipeline.loading import Batches, Permutation
from pipeline.randomness import keyed_seed
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


class Mixture:
    """Samples of all parts, in epochs in which a sample of weight 2 comes twice as often as one of weight 1.

    In an epoch, each sample of the part with the least weight comes once. Where a weight is no multiple of that one, a
    keyed choice of a part's samples comes once more than the others.

    Args:
        parts: data sets with their weights, all above 0.
    """

    def __init__(self, parts: Sequence[tuple[Batches, float]], seed: int) -> None:
        least = min(weight for _, weight in parts)
        self._parts = [part for part, _ in parts]
        sizes = [max(1, round(len(part) * weight / least)) for part, weight in parts]
        self._starts = np.cumsum([0, *sizes])
        self._orders = [Permutation(len(part), keyed_seed(seed, "mix", n)) for n, part in enumerate(self._parts)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, positions: np.ndarray) -> Batch:
        """As the parts' batches, in the order asked for."""
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        batches, places = [], []
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            inside = (positions[mine] - self._starts[number]) % len(self._parts[number])
            batches.append(self._parts[number].batch(self._orders[number][inside]))
            places.append(mine)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        return {name: torch.cat([batch[name] for batch in batches])[back] for name in batches[0]}
