"""Statistics of scores in the report, to choose thresholds by: the distribution of each score, correlations between
scores, and images from the lowest to the highest values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.formats.scores import VECTOR, ScoresReader
from pipeline.partitions.dataset import Dataset, SlotReader

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHOWN = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
"""Quantiles whose images are shown."""
_PARTITIONS = 50  # evenly spread partitions whose scores are read
_ROWS = 100_000  # maximum number of rows read from them
_WORDS = 8  # text values that are listed


@dataclass(frozen=True)
class Scores:
    """Scores of some samples: ``columns`` (n,) each, ``keys``, and each sample's upstream partition."""

    columns: dict[str, npt.NDArray[Any]]
    keys: list[str]
    partitions: list[int]

    @property
    def numbers(self) -> dict[str, npt.NDArray[np.float64]]:
        """The numeric columns, with NaN for missing values."""
        return {name: values for name, values in self.columns.items() if values.dtype != object}


def read_scores(dataset: Dataset, spread: list[int]) -> Scores:
    """Scores of the samples in the partitions ``spread`` of an output of stage=score."""
    names = [name for name, kind in dataset.schema.items() if name != "key" and not kind.startswith(VECTOR)]
    texts = {name for name in names if dataset.schema[name] == "str"}
    found: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    keys: list[str] = []
    partitions: list[int] = []
    for index in spread:
        if len(keys) >= _ROWS or index in dataset.released:
            continue
        reader = SlotReader(dataset, index)
        mine = reader.stored()
        if not mine:
            continue
        file = reader.open(mine[0].file)
        assert isinstance(file, ScoresReader)
        table = file.table(names)
        for name in names:
            values = table[name].to_pylist()
            found[name].append(np.array(values, object if name in texts else np.float64))
        keys += [stored.key for stored in mine]
        partitions += [dataset.partition(index).inputs[0].start] * len(mine)
    columns = {name: np.concatenate(values) if values else np.empty(0) for name, values in found.items()}
    return Scores(columns, keys, partitions)


def quantile_rows(scores: Scores) -> Iterator[tuple[str, int, list[float]]]:
    """For each numeric score: its name, the number of samples without it, and its quantiles."""
    for name, values in scores.numbers.items():
        there = values[~np.isnan(values)]
        if len(there):
            yield name, len(values) - len(there), np.quantile(there, QUANTILES).tolist()


def common_values(scores: Scores) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """For each text score: its name and its most common values."""
    for name, values in scores.columns.items():
        if values.dtype == object:
            yield name, [(str(value or ""), count) for value, count in Counter(values.tolist()).most_common(_WORDS)]


def examples(scores: Scores) -> Iterator[tuple[str, list[tuple[float, int, float]]]]:
    """For each numeric score: its name, and for each quantile in :data:`SHOWN` the quantile, the position of the sample
    with the nearest value, and the value. A sample appears only once per score."""
    for name, values in scores.numbers.items():
        order = np.argsort(values, kind="stable")[: int((~np.isnan(values)).sum())]
        positions = dict.fromkeys(int(order[round(q * (len(order) - 1))]) for q in SHOWN) if len(order) else {}
        if len(positions) > 1:
            of = {int(order[round(q * (len(order) - 1))]): q for q in reversed(SHOWN)}
            yield name, [(of[position], position, float(values[position])) for position in positions]


def correlations(scores: Scores) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Names of the scores, and Spearman's rank correlation of each pair, (n, n), over the samples that have both; NaN
    where a score is constant."""
    numbers = {name: values for name, values in scores.numbers.items() if len(np.unique(values[~np.isnan(values)])) > 1}
    names = list(numbers)
    matrix = np.full((len(names), len(names)), np.nan)
    for row, first in enumerate(names):
        for column, second in enumerate(names[: row + 1]):
            both = ~np.isnan(numbers[first]) & ~np.isnan(numbers[second])
            ranks = [_ranks(numbers[name][both]) for name in (first, second)]
            if both.sum() > 1 and all(rank.std() for rank in ranks):
                matrix[row, column] = matrix[column, row] = np.corrcoef(ranks[0], ranks[1])[0, 1]
    return names, matrix


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]
