"""Rows of CSV, TSV and their kin: the separator found, quotes understood where they are quotes, no row swallowed."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from pipeline.sources.text_files import LONGEST, Lines, decoded

csv.field_size_limit(1 << 30)

SEPARATORS = (",", "\t", ";", "|")
_LOOKED_AT = 20  # lines that tell the separator
_MOST_LINES = 1_000  # of one row
_OPEN = "unexpected end of data"
"""What csv says of a quotation mark that is not closed."""


def separator_of(lines: Sequence[str], usual: str, known: Collection[str]) -> str:
    """What separates the columns of a table that begins with ``lines``.

    ``known`` are names of columns, in lower case: a separator that gives some is the one. Else the ``usual`` one of the
    file's suffix if the first line has it, else the one that cuts all lines into equally many columns.
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
    """Some lines, to look at; they are put back."""
    taken: list[bytes] = []
    while len(taken) < _LOOKED_AT and (line := lines.take()):
        taken.append(line)
    lines.put_back(taken)
    return [text for text in map(decoded, taken) if text.strip()]


def separated(lines: Lines, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line of each row, and the row's fields.

    A field in quotation marks may hold separators and line breaks. A quotation mark that is never closed, or closed in
    the middle of a field, is one of the text: the row ends with its line then, and swallows none of the next. In
    tables with tabs all quotation marks are of the text, as captions begin with them and tabs need none.
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
    """The fields of a row with quotation marks, None if they make no sense; the lines that it took after the first."""
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
    """The fields of one line whose quotation marks are not those of CSV, as ``"a" b,c`` or ``a,"b``."""
    reader = csv.reader([text + "\n", "\n"], delimiter=separator)
    try:
        fields = next(reader)
    except csv.Error:  # a carriage return in the middle of a line
        return text.split(separator)
    return fields if reader.line_num == 1 else text.split(separator)
