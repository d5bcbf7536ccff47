"""Which concepts captions name, and how many samples of each go on: MetaCLIP's balancing.

Xu et al., Demystifying CLIP Data (arXiv:2309.16671), algorithm 1: a caption names an entry of a list if the entry is a
part of it, from one word boundary to another. An entry that n samples name is drawn with the probability min(1, t / n)
for each of them, and a sample goes on if any of its entries is drawn: rare concepts stay, common ones are thinned out.
Here each draw is keyed by the seed, the sample's key and the entry, so that it does not depend on ranks or order.
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
"""Punctuation that is a word of its own, as in the paper's code."""
_UNIT = 2.0**-53


def normalised(text: str) -> str:
    """Words, with a space between them: punctuation stands apart, and upper and lower case are the same."""
    return " ".join(text.casefold().translate(_APART).split())


@dataclass(frozen=True)
class Matches:
    """The entries that the captions of n samples name.

    Attributes:
        starts: where those of each sample begin, and the end: int64 (n + 1,).
        entries: their numbers, int32 (m,), of a sample each once.
    """

    starts: npt.NDArray[np.int64]
    entries: npt.NDArray[np.int32]

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """The sample of each entry, (m,)."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


class Concepts:
    """The entries in a file: a JSON list of texts, as MetaCLIP's ``metadata.json``, or a text with one on each line.

    Raises:
        ConfigError: the file cannot be read, or there is no entry in it.
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
        """Numbers of the entries that any of the captions names, each once, in ascending order."""
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
        """The same for each sample, of which the captions are given."""
        named = [self.named(captions) for captions in samples]
        starts = np.cumsum([0, *map(len, named)], dtype=np.int64)
        return Matches(starts, np.fromiter((one for entries in named for one in entries), np.int32, int(starts[-1])))

    def counts(self, settled: Mapping[str, int]) -> npt.NDArray[np.int64]:
        """How many samples name each entry, (entries,), where ``settled`` says so by name; 0 of others."""
        counts = np.zeros(len(self), np.int64)
        for name, count in settled.items():
            counts[self._numbers[name]] = count
        return counts

    def drawn(
        self, matches: Matches, draws: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64], most: int
    ) -> npt.NDArray[np.bool_]:
        """Which samples go on, (n,).

        Args:
            draws: a random word for each sample, (n,).
            counts: of the entries that more than ``most`` samples name, how many do, (entries,); of others any number
                up to ``most``.
            most: the paper's t.
        """
        going = np.zeros(len(draws), bool)
        samples = matches.samples
        words = mix(draws[samples] ^ self._hashes[matches.entries])
        probability = most / np.maximum(counts, most)[matches.entries]
        going[samples[(words >> np.uint64(11)).astype(np.float64) * _UNIT < probability]] = True
        return going


def rarest(matches: Matches, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Of each sample the entry with the smallest count, (n,); -1 of those that name none."""
    found = np.full(len(matches.starts) - 1, -1, np.int32)
    samples = matches.samples
    order = np.lexsort((-counts[matches.entries], samples))  # of equal indices the last assignment stays
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
