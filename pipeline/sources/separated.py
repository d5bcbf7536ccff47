"""Parses CSV, TSV and similar formats: detects the separator, and keeps all rows despite stray quotation marks."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from pipeline.sources.text_files import LONGEST, Lines, decoded

csv.field_size_limit(1 << 30)

SEPARATORS = (",", "\t", ";", "|")
_LOOKED_AT = 20  # lines examined to find the separator
_MOST_LINES = 1_000  # maximum lines of a row
_OPEN = "unexpected end of data"
"""Part of csv's message about an unclosed quotation mark."""


def separator_of(lines: Sequence[str], usual: str, known: Collection[str]) -> str:
    """Detect the column separator of a table that begins with ``lines``.

    A separator that splits the first line into ``known`` column names (lower case) is preferred; then the ``usual`` one
    of the file's suffix, if the first line contains it; then one that splits all lines into the same number of columns.
    """
    if not lines:
        return usual
    order = sorted(SEPARATORS, key=lambda separator: separator != usual)

    def names(separator: str) -> int:
        return sum(name.strip(" \"'").lower() in known for name in lines[0].split(separator))

    best = max(order, key=names)
    if names(best) > names(usual) or (names(best) and usual not in lines[0] and best in lines[0]):
        return best
    if usual in lines[0]:
        return usual
    counts = {separator: Counter(line.count(separator) for line in lines[:_LOOKED_AT]) for separator in order}
    even = [separator for separator in order if len(counts[separator]) == 1 and 0 not in counts[separator]]
    return next(iter(even), usual)


def first_lines(lines: Lines) -> list[str]:
    """The first non-blank lines, without consuming them."""
    taken: list[bytes] = []
    while len(taken) < _LOOKED_AT and (line := lines.take()):
        taken.append(line)
    lines.put_back(taken)
    return [text for text in map(decoded, taken) if text.strip()]


def separated(lines: Lines, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's first line number and fields.

    A quoted field may contain separators and line breaks. A quotation mark that is never closed, or closed in the
    middle of a field, is literal: the row then ends with its line, so that no other rows are lost. In tab-separated
    tables, all quotation marks are literal, because captions may begin with them and tabs need no quoting.
    """
    while line := lines.take():
        first = lines.number
        text = decoded(line)
        if not text.strip():
            continue
        if separator == "\t" or '"' not in text:
            yield first, text.split(separator)
            continue
        fields, more = _quoted(text, separator, lines)
        if fields is None:
            lines.put_back(more)
            fields = _literal(text, separator)
        yield first, fields


def _quoted(text: str, separator: str, lines: Lines) -> tuple[list[str] | None, list[bytes]]:
    """The fields of a row with quotation marks (None if they are invalid), and the further lines that were read."""
    more: list[bytes] = []
    size = len(text)
    while True:
        try:
            return next(csv.reader([text], delimiter=separator, strict=True)), more
        except csv.Error as error:
            if _OPEN not in str(error):
                return None, more
        while True:
            line = lines.take() if len(more) < _MOST_LINES and size < LONGEST else b""
            if not line:
                return None, more
            more.append(line)
            size += len(line)
            text += "\n" + decoded(line)
            if b'"' in line:
                break


def _literal(text: str, separator: str) -> list[str]:
    """The fields of a line whose quotation marks are not valid CSV, such as ``"a" b,c`` or ``a,"b``."""
    reader = csv.reader([text + "\n", "\n"], delimiter=separator)
    try:
        fields = next(reader)
    except csv.Error:  # a carriage return in the middle of a line
        return text.split(separator)
    return fields if reader.line_num == 1 else text.split(separator)
