"""Captions as clean text: valid UTF-8 in NFC, on one line, without invisible characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CAPTION_COLUMNS = ("captions", "caption", "text", "descriptions", "sentences", "prompt", "txt")
"""Names under which datasets keep one or several captions."""
TITLE_COLUMNS = ("title", "alt")
"""Names whose texts serve as captions where none of :data:`CAPTION_COLUMNS` is there."""
SOURCES = "caption_sources"
"""Column that tells where each of a sample's ``captions`` is from: :data:`ORIGINAL`, or a name given by
stage=recaption."""
ORIGINAL = "original"
_DEEPEST = 8

_JOINERS = "\u200c\u200d"
"""Zero-width non-joiner and joiner: Persian and Indic words and composed emoji are written with them, so they stay."""
_VISIBLE_FORMATS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Category Cf, but drawn: number and verse signs (Unicode's Prepended_Concatenation_Mark)."""
_MAX_MARKS = 30
"""Combining marks in a row, as in Unicode's stream-safe text format (UAX 15, section 13): normalising longer runs takes
time quadratic in their length, which a hostile caption could use."""


def clean_caption(text: str | bytes, max_length: int = 8192) -> str:
    """`text` in NFC, at most `max_length` code points, possibly empty. Never raises; idempotent.

    - Bytes that are not UTF-8, and lone surrogates, become U+FFFD: the caption stays, and the damage stays visible.
    - White space of any kind, line breaks included, becomes one space; none at either end.
    - Other control characters (Cc) and invisible format characters (Cf) go: bidi overrides and isolates, zero-width
      spaces, byte order marks, soft hyphens, tags. Zero-width joiners stay between two characters, one at a time.
    - At most 30 combining marks in a row stay.
    - Longer text is cut, not refused.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not text.isascii():
        # Pairs of surrogates, as JSON escapes write them, become the character they stand for; lone ones U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = unicodedata.normalize("NFC", _few_marks(_visible(text), 4 * _MAX_MARKS))
        text = _few_marks(text, _MAX_MARKS)  # again: some characters come apart in NFC
    elif not text.isprintable():
        text = "".join(_visible(text))
    return " ".join(text.split())[:max_length].strip(" " + _JOINERS)


def _visible(text: str) -> Iterator[str]:
    """The characters of `text` that stay, with a space for each white space."""
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
    """`text` with at most `most` combining marks in a row."""
    kept, marks = [], 0
    for char in text:
        marks = marks + 1 if char >= "\u0300" and unicodedata.category(char)[0] == "M" else 0
        if marks <= most:
            kept.append(char)
    return "".join(kept)


def repaired(text: str | bytes | bytearray) -> str:
    """`text` as UTF-8 can hold it: bytes that are not UTF-8, and lone surrogates, become U+FFFD."""
    if not isinstance(text, str):
        return bytes(text).decode("utf-8", "replace")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return str(text)


def captions_of(value: Any, depth: int = 0) -> list[str]:
    """The captions in a value as files and datasets have it: a text, bytes, a list of them, or a mapping that names
    its text (``{"caption": …}``). Blank texts and whatever is no text (null, NaN, numbers) are no captions.
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
    """Names of columns for a message: the first twenty, each cut to a readable length, on one line."""
    listed = list(names)
    short = [" ".join(clean_caption(str(name)[:60], 40).split()) or "''" for name in listed[:20]]
    return ", ".join(short) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "") if listed else "none"


def caption_columns(names: Iterable[Any]) -> list[str]:
    """Those of `names` that hold captions, whatever their case, the best first; titles only where nothing else is."""
    lower = {name.lower(): name for name in names if isinstance(name, str)}
    found = [lower[name] for name in CAPTION_COLUMNS if name in lower]
    return found or [lower[name] for name in TITLE_COLUMNS if name in lower]


def sources_of(row: Mapping[str, Any]) -> list[str]:
    """Where each caption of a sample is from."""
    given = row.get(SOURCES)
    return list(given) if given is not None else [ORIGINAL] * len(row.get("captions") or ())
