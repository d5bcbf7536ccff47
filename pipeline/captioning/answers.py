"""Decides whether an answer is a caption, and not a refusal, an endless repetition, empty, or cut off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.curation.scorers.caption_scores import caption_repetition
from pipeline.samples.captions import clean_caption

REASONS = ("refusal", "loop", "empty", "cut_off")
"""Why an answer is no caption."""
_REFUSAL = re.compile(
    r"(?:(?:i\s*['’]?\s*a?m|we\s*['’]?\s*a?re)\s+(?:very\s+|really\s+)?sorry\b"
    r"|sorry,?\s+(?:but\b|i\b|as\b)"
    r"|(?:i\s+)?apologi[sz]e\b"
    r"|unfortunately,?\s+(?:i|we)\b"
    r"|as\s+an?\s+(?:ai|artificial|large\s+language|language\s+model|assistant)\b"
    r"|(?:i|we)\s*(?:['’]m|\s+am|\s+are)?\s*(?:can\s*not|cannot|can['’]?t|could\s+not|couldn['’]t|won['’]t|will\s+not"
    r"|do\s+not|don['’]t|not|unable\s+to)\s*(?:be\s+)?(?:able\s+to\s+)?"
    r"(?:assist|help|describe|identify|see|view|provide|comply|fulfil|fulfill|process|generate|answer|have\s+access"
    r"|comfortable|allowed|discuss|create|access|analy[sz]e)"
    r"|(?:no|there\s+is\s+no)\s+image\s+(?:was|is|has\s+been)?\s*(?:provided|attached|visible|uploaded))",
    re.IGNORECASE,
)
"""How models begin an answer that they refuse."""
_SENTENCE = re.compile(r".*(?:[.!?…](?=[\s\"'”’)]|$)|[。！？])[\"'”’)]*", re.DOTALL)
_LONG_WORD = 40  # characters on average, from which on a text counts as written without spaces
_COVERED = 8  # words that a repeated phrase at the end covers, at least
_TIMES = 4  # that it is repeated
_MUCH = 0.5  # share of phrases that came before, of a text of at least _MANY words
_MANY = 24


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as received.

    Attributes:
        cut: it ends because it may not be longer.
        refused: the model's own mark of a refusal.
    """

    text: str
    cut: bool = False
    refused: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


def judge(said: Said, refusals: Sequence[str] = ()) -> tuple[str, str]:
    """The caption in an answer, or the reason why it is none: ``refusal``, ``loop``, ``empty`` or ``cut_off``.

    An answer that was cut keeps its whole sentences.

    Args:
        refusals: further beginnings of answers that are refusals; upper and lower case are the same.
    """
    text = clean_caption(said.text)
    if said.refused or is_refusal(text, refusals):
        return "", "refusal"
    if is_loop(text):
        return "", "loop"
    if said.cut and text:
        whole = _SENTENCE.match(text)
        if whole is None:
            return "", "cut_off"
        text = whole[0]
    return (text, "") if any(map(str.isalnum, text)) else ("", "empty")


def is_refusal(text: str, refusals: Sequence[str] = ()) -> bool:
    """Whether a text begins as refusals do."""
    start = text.lstrip(" \"'“‘*_").casefold()
    return _REFUSAL.match(start) is not None or any(start.startswith(other.casefold()) for other in refusals if other)


def is_loop(text: str) -> bool:
    """Whether a text repeats itself: the same phrase again and again at its end, or most phrases more than once."""
    words = text.casefold().split()
    if words and len(text) > _LONG_WORD * len(words):
        words = list(text)
    for period in range(1, len(words) // _TIMES + 1):
        covered = max(_TIMES * period, _COVERED)
        tail = words[-covered:]
        if len(tail) == covered and tail[period:] == tail[:-period]:
            return True
    return len(words) >= _MANY and caption_repetition(" ".join(words)) > _MUCH
