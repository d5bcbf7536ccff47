"""Concepts in captions and MetaCLIP's balancing, beside the plainest code for both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.options import ConfigError
from pipeline.curation.concepts import Concepts, normalised, rarest


def concepts(folder: Path, entries: list[str]) -> Concepts:
    (folder / "metadata.json").write_text(json.dumps(entries))
    return Concepts(str(folder / "metadata.json"))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog, on a lawn", ["dog"]),
        ("dogs and hotdog", []),
        ("New  York: a Dog!", ["dog", "new york"]),
        ("york new", []),
        ("in new york, new york", ["new york"]),
        ("Washington, D.C. by night", ["washington, d.c."]),
        ("STRASSE or Straße", ["straße"]),
        ("", []),
    ],
)
def test_entries_are_found_as_whole_words(tmp_path: Path, caption: str, expected: list[str]) -> None:
    known = concepts(tmp_path, ["dog", "New York", "Washington, D.C.", "Straße", "dog ", ""])
    assert len(known) == 4, "of entries that are the same, one; none that is empty"
    assert [known.names[number] for number in known.named([caption])] == sorted(
        map(normalised, expected), key=known.names.index
    )


def test_matches_are_those_of_a_search_for_each_entry(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = ["a", "b", "c", "d,", "e"]
    texts = [" ".join(random.choice(words, random.integers(0, 9))) for _ in range(300)]
    known = concepts(tmp_path, [" ".join(random.choice(words, random.integers(1, 4))) for _ in range(40)])
    found = known.matches([text] for text in texts)
    for number, text in enumerate(texts):
        expected = [at for at, name in enumerate(known.names) if f" {name} " in f" {normalised(text)} "]
        assert found.entries[found.starts[number] : found.starts[number + 1]].tolist() == expected
    counts = np.arange(len(known))
    plain = [min(found.entries[start:stop], default=-1) for start, stop in zip(found.starts, found.starts[1:])]  # noqa: B905
    assert rarest(found, counts).tolist() == plain


def test_samples_are_kept_with_the_probability_of_the_paper(tmp_path: Path) -> None:
    known = concepts(tmp_path, ["rare", "common", "frequent"])
    captions = ["common", "frequent", "common frequent", "rare common", "none"]
    counts, most = known.counts({"common": 40, "frequent": 100}), 10
    draws = np.random.default_rng(1).integers(0, 2**64, 4_000, np.uint64)
    shares = {}
    for caption in captions:
        matches = known.matches([caption] for _ in range(len(draws)))
        shares[caption] = known.drawn(matches, draws, counts, most).mean()
    # as algorithm 1 has it: any entry whose draw is below t / count
    expected = {"common": 0.25, "frequent": 0.1, "common frequent": 1 - 0.75 * 0.9, "rare common": 1.0, "none": 0.0}
    assert shares == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("text", "message"), [("{}", "list of texts"), ("[1]", "list of texts"), ("[", "not JSON")])
def test_what_is_no_list_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "concepts.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Concepts(str(tmp_path / "concepts.json"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="no entry"):
        Concepts(str(tmp_path / "empty.txt"))
