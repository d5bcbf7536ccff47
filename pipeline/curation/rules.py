"""Rules that drop samples by their metadata: small checks that return a reason, or "" if the sample passes.

A check is a function of a caption, a key or a row; stages combine several of them. Checks do not depend on the
language.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from pipeline.config.schema import ConfigError
from pipeline.samples import Row

CaptionCheck = Callable[[str], str]
RowCheck = Callable[[Row], str]
KeyCheck = Callable[[str], str]

_URL = re.compile(r"\s*(https?://|www\.)\S+\s*", re.IGNORECASE)
_SCORE = re.compile(r"([^\W\d][\w.-]*)(<=|>=|<|>)(-?\d+(?:\.\d+)?(?:e-?\d+)?)")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_LOOKED_AT = 200  # characters that are checked; long texts are more repetitive


def empty(caption: str) -> str:
    """Reject captions without letters or digits of any script."""
    return "" if any(character.isalnum() for character in caption) else "caption_empty"


def url(caption: str) -> str:
    """Reject captions that consist of a URL."""
    return "caption_url" if _URL.fullmatch(caption) else ""


def repetitive(caption: str) -> str:
    """Reject captions of at least 40 characters in which less than a quarter of all character trigrams are distinct."""
    text = caption[:_LOOKED_AT].casefold()
    runs = [text[at : at + 3] for at in range(len(text) - 2)]
    return "caption_repetitive" if len(text) >= 40 and len(set(runs)) < len(runs) / 4 else ""


CAPTION_CHECKS: dict[str, CaptionCheck] = {"empty": empty, "url": url, "repetitive": repetitive}


def at_least(length: int) -> CaptionCheck:
    """Require at least ``length`` characters."""
    return lambda caption: "caption_short" if len(caption) < length else ""


def first_reason(caption: str, checks: Iterable[CaptionCheck]) -> str:
    return next(filter(None, (check(caption) for check in checks)), "")


def good_captions(captions: Sequence[str], checks: Sequence[CaptionCheck]) -> tuple[list[str], str]:
    """The captions that pass all checks, and, if none does, the reason of the first (no captions: `caption_empty`)."""
    reasons = [first_reason(caption, checks) for caption in captions]
    good = [caption for caption, reason in zip(captions, reasons, strict=True) if not reason]
    return good, "" if good or not checks else next(iter(reasons), "caption_empty")


def kept_by(keys: Container[str]) -> KeyCheck:
    """Keep only keys in the list."""
    return lambda key: "" if key in keys else "key_not_kept"


def denied_by(keys: Container[str]) -> KeyCheck:
    """Drop keys in the list."""
    return lambda key: "key_denied" if key in keys else ""


def column_value(row: Row, column: str) -> Any:
    """The value of a column of ``row`` or of a field in its ``meta``, ignoring case; None if there is none."""
    for place in (row, row.get("meta")):
        if isinstance(place, dict):
            if column in place:
                return place[column]
            found = next((name for name in place if name.lower() == column.lower()), None)
            if found is not None:
                return place[found]
    return None


def columns_in(rows: Iterable[Row]) -> list[str]:
    """Names of all columns and fields in ``rows``."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(name for name in row if name != "meta")
        names |= dict.fromkeys(row["meta"] if isinstance(row.get("meta"), dict) else ())
    return list(names)


def score_column(text: str) -> str:
    """The column in a condition. Raises ConfigError if the condition is invalid."""
    return _parsed(text)[0]


def score(text: str) -> RowCheck:
    """Create the check for a condition on a numeric column or field, such as `nsfw<0.5`.

    Rows that do not meet it, or have no number there, get the reason `score_<column>`. Numbers may be given as text.

    Raises:
        ConfigError: the condition is invalid.
    """
    column, compare, limit = _parsed(text)

    def check(row: Row) -> str:
        value = _number(column_value(row, column))
        return "" if value is not None and compare(value, limit) else f"score_{column.lower()}"

    return check


def _parsed(text: str) -> tuple[str, Callable[[float, float], bool], float]:
    match = _SCORE.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(f"scores={text}: write <column><limit>, as nsfw<0.5 or aesthetic>=5")
    return match[1], _COMPARE[match[2]], float(match[3])


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return value
