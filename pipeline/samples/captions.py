"""Captions as clean text: valid UTF-8 in NFC, on one line, without invisible characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CAPTION_COLUMNS = ("captions", "caption", "text", "descriptions", "sentences", "prompt", "txt")
"""Column names of one or more captions, in order of precedence."""
TITLE_COLUMNS = ("title", "alt")
"""Columns that are used as captions if there is none of :data:`CAPTION_COLUMNS`."""
SOURCES = "caption_sources"
"""Column with the origin of each of a sample's ``captions``: :data:`ORIGINAL`, or a name given by stage=recaption."""
ORIGINAL = "original"
_DEEPEST = 8

_JOINERS = "\u200c\u200d"
"""Zero-width non-joiner and joiner; kept because Persian and Indic words and composed emoji need them."""
_VISIBLE_FORMATS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Visible characters of category Cf: number and verse signs (Unicode's Prepended_Concatenation_Mark)."""
_MAX_MARKS = 30
"""Maximum consecutive combining marks, as in Unicode's stream-safe text format (UAX 15, section 13): normalization
takes quadratic time in their number, which a hostile caption could exploit."""


def clean_caption(text: str | bytes, max_length: int = 8192) -> str:
    """Clean `text`: NFC, at most `max_length` code points, possibly empty. Never raises; idempotent.

    - Invalid UTF-8 and lone surrogates become U+FFFD, so the caption is kept and the damage stays visible.
    - Runs of white space, including line breaks, become one space; white space at both ends is removed.
    - Other control characters (Cc) and invisible format characters (Cf) are removed: bidi overrides and isolates,
      zero-width spaces, byte order marks, soft hyphens, tags. Single zero-width joiners between two characters are
      kept.
    - At most 30 consecutive combining marks are kept.
    - Longer text is truncated.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not text.isascii():
        # Surrogate pairs, as in JSON escapes, become the character that they encode; lone surrogates become U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = unicodedata.normalize("NFC", _few_marks(_visible(text), 4 * _MAX_MARKS))
        text = _few_marks(text, _MAX_MARKS)  # again: NFC decomposes some characters
    elif not text.isprintable():
        text = "".join(_visible(text))
    return " ".join(text.split())[:max_length].strip(" " + _JOINERS)


def _visible(text: str) -> Iterator[str]:
    """Yield the characters of `text` that are kept, with white space replaced by spaces."""
    last = " "
    for char in text:
        if char.isspace():
            char = " "
        elif char in _JOINERS:
            if last == " " or last in _JOINERS:
                continue
        elif unicodedata.category(char) in ("Cc", "Cf") and char not in _VISIBLE_FORMATS:
            continue
        last = char
        yield char


def _few_marks(text: Iterable[str], most: int) -> str:
    """Remove combining marks from `text` beyond `most` consecutive ones."""
    kept, marks = [], 0
    for char in text:
        marks = marks + 1 if char >= "\u0300" and unicodedata.category(char)[0] == "M" else 0
        if marks <= most:
            kept.append(char)
    return "".join(kept)


def repaired(text: str | bytes | bytearray) -> str:
    """Make `text` encodable as UTF-8: invalid bytes and lone surrogates become U+FFFD."""
    if not isinstance(text, str):
        return bytes(text).decode("utf-8", "replace")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return str(text)


def captions_of(value: Any, depth: int = 0) -> list[str]:
    """Extract the captions from a value: text, bytes, a list of them, or a mapping with a text (``{"caption": …}``).

    Blank texts and values that are not text (null, NaN, numbers) are ignored.
    """
    if isinstance(value, str | bytes | bytearray):
        text = repaired(value)
        return [text] if text.strip() else []
    if depth == _DEEPEST:
        return []
    if isinstance(value, Mapping):
        names = caption_columns(value) or [name for name in ("raw",) if name in value]
        return next(filter(None, (captions_of(value[name], depth + 1) for name in names)), [])
    if hasattr(value, "tolist"):  # an array, or one of its scalars
        return captions_of(value.tolist(), depth + 1)
    if isinstance(value, list | tuple):
        return [text for item in value for text in captions_of(item, depth + 1)]
    return []


def shown_names(names: Iterable[Any]) -> str:
    """Format column names for a message: the first 20, shortened, on one line."""
    listed = list(names)
    short = [" ".join(clean_caption(str(name)[:60], 40).split()) or "''" for name in listed[:20]]
    return ", ".join(short) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "") if listed else "none"


def shown_counts(counts: Mapping[Any, int]) -> str:
    """Values for a message, the commonest first, each with how often it is there: ``train (900), test (80)``."""
    commonest = sorted(counts.items(), key=lambda item: -item[1])
    listed = [f"{shown_names([value])} ({count:,})" for value, count in commonest[:10]]
    return ", ".join(listed) + (f" and {len(counts) - 10} more" if len(counts) > 10 else "") or "none"


def caption_columns(names: Iterable[Any]) -> list[str]:
    """Caption columns in `names`, ignoring case, in order of precedence; titles only if there are no others."""
    lower = {name.lower(): name for name in names if isinstance(name, str)}
    found = [lower[name] for name in CAPTION_COLUMNS if name in lower]
    return found or [lower[name] for name in TITLE_COLUMNS if name in lower]


def sources_of(row: Mapping[str, Any]) -> list[str]:
    """The origin of each caption of a sample."""
    given = row.get(SOURCES)
    return list(given) if given is not None else [ORIGINAL] * len(row.get("captions") or ())
