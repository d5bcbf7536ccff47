"""Scores that are computed from a sample's caption; most do not depend on the language."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache, lru_cache
from typing import Any

from pipeline.curation.scorers.base import scorer

_WORD = re.compile(r"\S+")
_PLAIN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_PUNCTUATION = ".,;:!?\"'()[]{}«»“”‘’…"
_RUN = 3  # words of a phrase
_REPEATS = re.compile(r"(\w)\1{3}")  # no real word repeats a letter four times in a row


@scorer("caption", "int")
def caption_length(text: str) -> int:
    """Number of characters."""
    return len(text)


@scorer("caption", "int")
def caption_words(text: str) -> int:
    """Number of words: runs of characters between spaces."""
    return len(_WORD.findall(text))


@scorer("caption")
def caption_repetition(text: str) -> float:
    """Share of three-word phrases that occur earlier in the caption, in 0..1 (Rae et al., arXiv:2112.11446)."""
    words = text.casefold().split()
    phrases = Counter(zip(*(words[start:] for start in range(_RUN)), strict=False))
    total = sum(phrases.values())
    return 1 - len(phrases) / total if total else 0.0


@scorer("caption")
def caption_nonwords(text: str) -> float:
    """Share of words that do not consist of letters, such as ``DSC_0042.JPG`` or ``#tbt``, or look like ``aaaaa``, in
    0..1. Numbers count as words."""
    words = [word.strip(_PUNCTUATION) for word in text.split()]
    words = [word for word in words if word]
    return sum(not _is_word(word) for word in words) / len(words) if words else 1.0


def _is_word(word: str) -> bool:
    if re.fullmatch(r"\d+(?:[.,:/-]\d+)*%?", word):
        return True
    return _PLAIN.fullmatch(word) is not None and not _REPEATS.search(word)


@scorer("caption", "str", revision=2, package="py3langid")
def language(text: str) -> str:
    """ISO 639-1 code of the most probable language; empty for a text without letters.

    Uses py3langid, a naive Bayes classifier for 97 languages whose model is part of the package.
    """
    return _classified(text)[0]


@scorer("caption", package="py3langid")
def language_probability(text: str) -> float:
    """Probability of that language, in 0..1: low for captions of a few words, 0 for those without letters."""
    return _classified(text)[1]


@lru_cache(1)
def _classified(text: str) -> tuple[str, float]:
    if not any(map(str.isalpha, text)):
        return "", 0.0
    code, probability = _identifier().classify(text)
    return str(code), round(float(probability), 4)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
