"""Scores of captions, against pycocoevalcap and against numbers that can be recognized by hand."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.config.schema import ConfigError
from pipeline.metrics.caption_metrics import (
    Cider,
    bleu_counts,
    bleu_of,
    caption_scores,
    ptb_words,
    rouge_l,
    with_java,
    words,
)

_WORDS = ["a", "the", "red", "blue", "small", "dog", "cat", "runs", "sits", "on", "under", "near", "and", "two", "tree"]


def sets(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Captions that share much with their references, some nothing, some very short."""
    rng = random.Random(seed)
    candidates, references = [], []
    for _ in range(count):
        base = rng.choices(_WORDS, k=rng.randint(1, 14))
        captions = [" ".join(_changed(base, rng)) for _ in range(rng.randint(1, 5))]
        references.append(captions)
        candidates.append(" ".join(_changed(base, rng) if rng.random() < 0.9 else rng.choices(_WORDS, k=3)))
    return candidates, references


def _changed(base: list[str], rng: random.Random) -> list[str]:
    return [rng.choice(_WORDS) if rng.random() < 0.3 else word for word in base if rng.random() < 0.95] or base[:1]


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_those_of_pycocoevalcap(seed: int) -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider as TheirCider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = sets(500, seed)
    theirs = dict(enumerate(references))
    ours = {number: [candidate] for number, candidate in enumerate(candidates)}
    bleu, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
    cider, ciders = TheirCider().compute_score(theirs, ours)
    rouge, _ = Rouge().compute_score(theirs, ours)
    expected = {**{f"bleu_{n}": score for n, score in enumerate(bleu, 1)}, "rouge_l": rouge, "cider": cider}
    assert caption_scores(candidates, references) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    scorer = Cider(references)
    each = [scorer.score(*pair) for pair in zip(candidates, references, strict=True)]
    assert each == pytest.approx(list(ciders), abs=1e-9)


def test_by_hand() -> None:
    same = "a small red circle"
    assert rouge_l(same, [same]) == pytest.approx(1.0)
    assert bleu_of(bleu_counts(same, [same])) == pytest.approx([1.0] * 4)
    assert bleu_of(bleu_counts("a red", [same]))[0] == pytest.approx(0.36787944)  # half as long: e^(1 - 4/2)
    assert rouge_l("blue", [same]) == 0.0
    documents = [[same], ["a large blue square"], ["two green dogs run"]]
    assert Cider(documents).score(same, [same]) == pytest.approx(10.0)
    assert Cider(documents).score("", [same]) == 0.0


def test_words_of_any_language() -> None:
    assert words('Ein schwarzes  Kleid, "knielang".') == "ein schwarzes kleid knielang"
    assert words("It's a DOG!") == "it's a dog"


def test_scores_need_references() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        caption_scores(["a"], [[]])


def test_what_needs_java_says_why_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scores, skipped = with_java(["a dog"], [["a dog"]])
    assert scores == {}
    assert set(skipped) == {"meteor", "spice"}
    assert all(reason.startswith("Java is not installed") for reason in skipped.values())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    _, skipped = with_java(["a dog"], [["a dog"]], ("meteor",))
    assert skipped == {"meteor": "pycocoevalcap is not installed (pip install -e .[captions])"}


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_meteor_where_java_is() -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.spice import get_stanford_models

    scores, skipped = with_java(["a dog runs", "a red car"], [["a dog runs"], ["a red car"]])
    if not (Path(get_stanford_models.__file__).parent / "lib/stanford-corenlp-3.6.0-models.jar").is_file():
        assert skipped["spice"].startswith("its models are not installed")
    assert scores["meteor"] == pytest.approx(1.0)  # nothing could be nearer


TEXTS = [
    "A man's dog -- it isn't small -- runs (fast), doesn't it?",
    'Two kids, aged 3.5; the U.S. team\'s "best" player...',
    "",
    "a\u2028line separator and a\nnew line",
    "Über-cool café & co.: 50% off!",
]


@pytest.mark.skipif(not shutil.which("java"), reason="there is no Java")
def test_words_of_the_penn_treebank_are_those_of_pycocoevalcap() -> None:
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    plain = [" ".join(text.split()) for text in TEXTS]
    theirs = tokenizer.PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(plain)})
    assert ptb_words(TEXTS) == [theirs[n][0] for n in range(len(plain))]
    assert ptb_words(["A man's dog isn't small."]) == ["a man 's dog is n't small"] and ptb_words([]) == []


def test_without_java_the_treebank_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="tokenization=ptb: Java is not installed"):
        ptb_words(["a dog"])
