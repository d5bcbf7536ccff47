"""Decides whether an answer is a caption or a refusal, an endless repetition, empty or truncated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.curation.scorers.caption_scores import caption_repetition
from pipeline.samples.captions import clean_caption

REASONS = ("refusal", "loop", "empty", "cut_off")
"""Why an answer is not a caption."""
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
"""Typical beginnings of refusals."""
_SENTENCE = re.compile(r".*(?:[.!?…](?=[\s\"'”’)]|$)|[。！？])[\"'”’)]*", re.DOTALL)
_LONG_WORD = 40  # mean word length above which a text is treated as written without spaces
_COVERED = 8  # minimum words covered by repetitions of a phrase at the end
_TIMES = 4  # minimum number of repetitions
_MUCH = 0.5  # maximum share of repeated phrases in a text of at least _MANY words
_MANY = 24


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as received.

    Attributes:
        cut: whether it was truncated at the maximum length.
        refused: whether the model marked it as a refusal.
    """

    text: str
    cut: bool = False
    refused: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


def judge(said: Said, refusals: Sequence[str] = ()) -> tuple[str, str]:
    """Return the caption in an answer and, if there is none, the reason, one of :data:`REASONS`.

    A truncated answer is reduced to its complete sentences.

    Args:
        refusals: additional beginnings of refusals; case is ignored.
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
    """Whether a text begins like a refusal."""
    start = text.lstrip(" \"'“‘*_").casefold()
    return _REFUSAL.match(start) is not None or any(start.startswith(other.casefold()) for other in refusals if other)


def is_loop(text: str) -> bool:
    """Whether a text repeats the same phrase at its end, or consists mostly of repeated phrases."""
    words = text.casefold().split()
    if words and len(text) > _LONG_WORD * len(words):
        words = list(text)
    for period in range(1, len(words) // _TIMES + 1):
        covered = max(_TIMES * period, _COVERED)
        tail = words[-covered:]
        if len(tail) == covered and tail[period:] == tail[:-period]:
            return True
    return len(words) >= _MANY and caption_repetition(" ".join(words)) > _MUCH
