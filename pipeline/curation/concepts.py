"""Finds the concepts that captions name, and balances the samples per concept as MetaCLIP does.

Xu et al., Demystifying CLIP Data (arXiv:2309.16671), algorithm 1: a caption matches an entry of a list if it
contains the entry between two word boundaries. For each of the n samples that match an entry, the entry is drawn with
probability min(1, t / n), and a sample is selected if any of its entries is drawn: rare concepts are kept, common ones
thinned out. Draws are keyed by seed, sample key and entry, so they do not depend on ranks or order.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.config.options import ConfigError
from pipeline.randomness import mix
from pipeline.sources.text_files import lines_of, list_errors, open_text, suffix_of

_APART = str.maketrans({mark: f" {mark} " for mark in ",.;:?!`"})
"""Punctuation that is treated as a word, as in the paper's code."""
_UNIT = 2.0**-53


def normalised(text: str) -> str:
    """Normalize a text to lower-case words and punctuation marks separated by single spaces."""
    return " ".join(text.casefold().translate(_APART).split())


@dataclass(frozen=True)
class Matches:
    """The entries that the captions of n samples match.

    Attributes:
        starts: start of each sample's entries in ``entries``, and the end: int64 (n + 1,).
        entries: indices of the entries, int32 (m,), without repetition within a sample.
    """

    starts: npt.NDArray[np.int64]
    entries: npt.NDArray[np.int32]

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """Index of the sample of each item of ``entries``, (m,)."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


class Concepts:
    """The entries in a file: a JSON list of texts, such as MetaCLIP's ``metadata.json``, or a text with one per line.

    Raises:
        ConfigError: the file cannot be read or contains no entries.
    """

    def __init__(self, path: str) -> None:
        found = (normalised(entry) for entry in _entries(Path(path)))
        self.names = list(dict.fromkeys(name for name in found if name))
        if not self.names:
            raise ConfigError(f"concepts={path}: there is no entry in it")
        self._numbers = {name: number for number, name in enumerate(self.names)}
        lengths: dict[str, set[int]] = defaultdict(set)
        for name in self.names:
            words = name.split()
            lengths[words[0]].add(len(words))
        self._lengths = {first: tuple(sorted(counts)) for first, counts in lengths.items()}
        self._hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, self.names), np.uint64, len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def named(self, captions: Iterable[str]) -> list[int]:
        """Sorted indices of the entries that match any of the captions."""
        found = set()
        for caption in captions:
            words = normalised(caption).split()
            for start, word in enumerate(words):
                for length in self._lengths.get(word, ()):
                    number = self._numbers.get(" ".join(words[start : start + length]))
                    if number is not None:
                        found.add(number)
        return sorted(found)

    def matches(self, samples: Iterable[Iterable[str]]) -> Matches:
        """The matching entries of each sample, given its captions."""
        named = [self.named(captions) for captions in samples]
        starts = np.cumsum([0, *map(len, named)], dtype=np.int64)
        return Matches(starts, np.fromiter((one for entries in named for one in entries), np.int32, int(starts[-1])))

    def counts(self, settled: Mapping[str, int]) -> npt.NDArray[np.int64]:
        """Convert counts by entry name to an array (entries,); entries not in ``settled`` get 0."""
        counts = np.zeros(len(self), np.int64)
        for name, count in settled.items():
            counts[self._numbers[name]] = count
        return counts

    def drawn(
        self, matches: Matches, draws: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64], most: int
    ) -> npt.NDArray[np.bool_]:
        """Whether each sample is selected, (n,).

        Args:
            draws: a random 64-bit number for each sample, (n,).
            counts: number of samples that match each entry, (entries,); if it is at most ``most``, any value up to
                ``most``.
            most: the paper's t.
        """
        going = np.zeros(len(draws), bool)
        samples = matches.samples
        words = mix(draws[samples] ^ self._hashes[matches.entries])
        probability = most / np.maximum(counts, most)[matches.entries]
        going[samples[(words >> np.uint64(11)).astype(np.float64) * _UNIT < probability]] = True
        return going


def rarest(matches: Matches, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Index of each sample's entry with the smallest count, (n,); -1 if it has none."""
    found = np.full(len(matches.starts) - 1, -1, np.int32)
    samples = matches.samples
    order = np.lexsort((-counts[matches.entries], samples))  # for equal indices, the last assignment wins
    found[samples[order]] = matches.entries[order]
    return found


def _entries(path: Path) -> Iterator[str]:
    if suffix_of(path) != ".json":
        yield from lines_of(path)
        return
    with list_errors(path), path.open("rb") as file:
        try:
            listed: Any = json.load(open_text(file)[0])
        except ValueError as error:
            raise ConfigError(f"concepts={path}: not JSON: {error}") from None
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise ConfigError(f"concepts={path}: expected a list of texts")
    yield from listed
