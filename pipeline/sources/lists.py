"""Lists in files (txt, csv, tsv, json, jsonl, parquet; packed or not), read in ranges of rows without holding them.

Everything that is given as a list goes through here: URLs, captions, keys, labels, splits. A row that makes no sense
comes with its line and the reason, a file that makes none is a ConfigError that names it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import ConfigError
from pipeline.samples import SampleError, image_format
from pipeline.samples.captions import CAPTION_COLUMNS, TITLE_COLUMNS, caption_columns, repaired
from pipeline.sources.separated import first_lines, separated, separator_of
from pipeline.sources.text_files import Lines, decoded, list_errors, open_text, skip, suffix_of

URL_COLUMNS = ("url", "image_url", "img_url", "link")
NAME_COLUMNS = ("file_name", "filename", "image", "img_path", "image_path", "image_name", "path", "file", "key", "name")
"""Names of columns that say which image a row is about."""
KNOWN_COLUMNS = frozenset((*URL_COLUMNS, *CAPTION_COLUMNS, *TITLE_COLUMNS, *NAME_COLUMNS, "uid", "split", "label"))
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_LARGEST_JSON = 2 << 30
_BATCH = 8192
_LOOKED_AT = 20  # rows that say how many columns there are without a heading

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Rows ``start:stop`` of a list, beginning at byte ``offset`` where it is a text."""

    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class ListRow:
    """A row by the names of its columns; ``error`` says what is wrong with one that makes no sense.

    ``line`` is where it begins in a text that was read from its beginning, else 0.
    """

    values: Row = field(default_factory=dict)
    line: int = 0
    error: str = ""


class List(ABC):
    """One file with rows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def columns(self) -> list[str]:
        """Names of the columns, as far as the file has a heading."""
        return []

    @abstractmethod
    def spans(self, size: int) -> Iterator[Span]:
        """All rows, ``size`` at a time.

        Raises:
            ConfigError: the file cannot be read.
        """

    @abstractmethod
    def rows(self, span: Span | None = None) -> Iterator[ListRow]:
        """The rows of a span, or all.

        Raises:
            ConfigError: the file cannot be read.
        """


class _Text(List):
    """A text file with a row a line, or nearly so."""

    def spans(self, size: int) -> Iterator[Span]:
        start = number = 0
        with self._lines() as lines:
            offset = lines.at
            for _ in self._parsed(lines):
                number += 1
                if number - start == size:
                    yield Span(start, number, offset)
                    start, offset = number, lines.at
        if number > start:
            yield Span(start, number, offset)

    def rows(self, span: Span | None = None) -> Iterator[ListRow]:
        with self._lines(span.offset if span else 0) as lines:
            yield from islice(self._parsed(lines), span.stop - span.start if span else None)

    @contextmanager
    def _lines(self, offset: int = 0) -> Iterator[Lines]:
        """The lines from the row at ``offset`` on; 0: from the first row on."""
        with list_errors(self.path), self.path.open("rb") as file:
            stream, mark = open_text(file)
            skip(stream, max(offset, mark))
            lines = Lines(stream, max(offset, mark), -1_000_000_000 if offset > mark else 0)
            if offset <= mark:
                self._pass_heading(lines)
            yield lines

    def _pass_heading(self, lines: Lines) -> None:
        """Take what comes before the first row."""

    def _parsed(self, lines: Lines) -> Iterator[ListRow]:
        while line := lines.take():
            if line.strip():
                yield self._row(line, max(lines.number, 0))

    def _row(self, line: bytes, number: int) -> ListRow:
        return ListRow({"url": decoded(line).strip()}, number)


class _JsonLines(_Text):
    def _row(self, line: bytes, number: int) -> ListRow:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return ListRow({}, number, "no JSON")
        return _row_of(value, number)


def _row_of(value: Any, number: int) -> ListRow:
    if isinstance(value, str):
        return ListRow({"url": value}, number)
    return ListRow(value, number) if isinstance(value, dict) else ListRow({}, number, "no JSON object")


class _Table(_Text):
    """CSV, TSV and the like; a first row with a URL or the name of an image in it is no heading."""

    def __init__(self, path: Path, usual: str, heading: bool | None) -> None:
        super().__init__(path)
        self._usual = usual
        self._heading = heading

    @property
    def columns(self) -> list[str]:
        return self._head[0]

    @cached_property
    def _head(self) -> tuple[list[str], str, bool]:
        """The names of the columns, what separates them, and whether there is a heading."""
        with list_errors(self.path), self.path.open("rb") as file:
            stream, mark = open_text(file)
            skip(stream, mark)
            lines = Lines(stream)
            separator = separator_of(first_lines(lines), self._usual, KNOWN_COLUMNS)
            rows = [fields for _, fields in islice(separated(lines, separator), _LOOKED_AT)]
        names = [name.strip() for name in rows[0]] if rows else []
        if not (_is_heading(names) if self._heading is None else self._heading):
            # the least that rows have: a text with separators in it makes more of one
            width = max(min(map(len, rows), default=0), min(len(names), 2))
            return [str(number) for number in range(width)], separator, False
        seen: dict[str, int] = {}
        for place, name in enumerate(names):
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                names[place] = f"{name}.{seen[name]}"
        return names, separator, True

    def _pass_heading(self, lines: Lines) -> None:
        if self._head[2]:
            next(separated(lines, self._head[1]), None)

    def _parsed(self, lines: Lines) -> Iterator[ListRow]:
        names, separator, _ = self._head
        texts = (len(names) > 1 and not self._head[2]) or bool(names and caption_columns([names[-1]]))
        for number, fields in separated(lines, separator):
            error = ""
            if len(fields) > len(names) and names:
                if texts:  # a text with separators in it, that nobody has put into quotation marks
                    fields = [*fields[: len(names) - 1], separator.join(fields[len(names) - 1 :])]
                else:
                    error = f"{len(fields)} fields in place of {len(names)}"
            yield ListRow(dict(zip(names, fields, strict=False)), max(number, 0), error)


def _is_heading(names: list[str]) -> bool:
    """Whether a first row names columns."""
    if any("://" in name or image_format(name.partition("#")[0]) for name in names):
        return False
    return any(name.lower() in KNOWN_COLUMNS for name in names) or all(names)


class _Json(List):
    """A JSON list of objects, or a mapping of names to values; it is held in memory as a whole."""

    @cached_property
    def _all(self) -> list[ListRow]:
        with list_errors(self.path), self.path.open("rb") as file:
            stream, mark = open_text(file)
            skip(stream, mark)
            data = stream.read(_LARGEST_JSON + 1)
        if len(data) > _LARGEST_JSON:
            raise ConfigError(f"{self.path}: too large for a .json list: make it .jsonl or .parquet")
        return self._rows_of(data)

    def _rows_of(self, data: bytes) -> list[ListRow]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            lines = list(_JsonLines(self.path).rows()) if b"\n" in data.strip() else []
            if lines and not lines[0].error and sum(bool(row.error) for row in lines) * 2 < len(lines):
                return lines  # JSON lines under another name
            said = str(error) if isinstance(error, ValueError) else "nested too deeply"
            raise ConfigError(f"{self.path}: no JSON: {said}") from None
        if isinstance(value, dict):
            lists = [v for v in value.values() if isinstance(v, list) and any(isinstance(item, dict) for item in v)]
            frame = len(lists) == 1 and len(value) < _FEW and not any(map(image_format, value))
            value = lists[0] if frame else [{"0": name, "1": item} for name, item in value.items()]
        if not isinstance(value, list):
            raise ConfigError(f"{self.path}: expected a list of objects, or a mapping")
        return [_row_of(item, 0) for item in value]

    def spans(self, size: int) -> Iterator[Span]:
        yield from _even(len(self._all), size)

    def rows(self, span: Span | None = None) -> Iterator[ListRow]:
        yield from self._all[span.start : span.stop] if span else self._all


_FEW = 8
"""A JSON object of fewer keys, one of which has a list of objects, is a frame around that list."""


class _Parquet(List):
    @property
    def columns(self) -> list[str]:
        with self._file() as file:
            return list(map(str, file.schema_arrow.names))

    @contextmanager
    def _file(self) -> Iterator[pq.ParquetFile]:
        with list_errors(self.path), self.path.open("rb") as opened:
            yield parquet_file(opened)

    def spans(self, size: int) -> Iterator[Span]:
        with self._file() as file:
            yield from _even(file.metadata.num_rows, size)

    def rows(self, span: Span | None = None) -> Iterator[ListRow]:
        with self._file() as file:
            span = span or Span(0, file.metadata.num_rows)
            at = 0
            groups: list[int] = []
            first = 0
            for group in range(file.num_row_groups):
                stop = at + file.metadata.row_group(group).num_rows
                if stop > span.start and at < span.stop:
                    first = first if groups else at
                    groups.append(group)
                at = stop
            for batch in file.iter_batches(_BATCH, row_groups=groups, use_threads=False):
                begin, end = max(span.start - first, 0), min(span.stop - first, len(batch))
                if begin < end:
                    yield from batch_rows(batch.slice(begin, end - begin))
                first += len(batch)
                if first >= span.stop:
                    return


def parquet_file(file: IO[bytes]) -> pq.ParquetFile:
    """``file`` as parquet. Raises pyarrow's exceptions, and SampleError for a pointer of Git LFS."""
    start = file.read(64)
    file.seek(0)
    if start and not start.startswith(b"PAR1"):
        open_text(file)
        raise SampleError("damaged_parquet", f"no parquet file, it begins with {start[:4]!r}", retryable=True)
    return pq.ParquetFile(file)


def batch_rows(batch: pa.RecordBatch) -> Iterator[ListRow]:
    """The rows of a batch. Where one has what Python cannot hold, texts that are not UTF-8 are repaired, and a row with
    anything else of the kind (a time in the year 20,000) comes with an error."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        rows = None
    if rows is not None:
        yield from map(ListRow, rows)
        return
    for number in range(len(batch)):
        values, error = {}, ""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                values[name] = column[number].as_py()
            except UnicodeDecodeError:
                text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
                values[name] = repaired(column[number].as_buffer().to_pybytes()) if text else None
                error = error if text else f"column {name}: not UTF-8"
            except (ValueError, OverflowError, pa.ArrowException) as problem:
                error = f"column {name}: {type(problem).__name__}"
        yield ListRow(values, error=error)


def _even(count: int, size: int) -> Iterator[Span]:
    for start in range(0, count, size):
        yield Span(start, min(start + size, count))


def open_list(path: Path, what: str = "a list", heading: bool | None = None, table: bool = False) -> List:
    """The list at ``path``, by its suffix, which ``.gz``, ``.bz2`` or ``.xz`` may follow.

    Args:
        what: the list in words, for the error.
        heading: whether a table begins with the names of its columns; None: as its first row suggests. Without names
            columns have numbers.
        table: a ``.txt`` is a table as well, not a list with a value on each line.

    Raises:
        ConfigError: it has another one.
    """
    match suffix_of(path):
        case ".txt" if not table:
            return _Text(path)
        case ".txt":
            return _Table(path, "\t", heading)
        case ".csv":
            return _Table(path, ",", heading)
        case ".tsv":
            return _Table(path, "\t", heading)
        case ".json":
            return _Json(path)
        case ".jsonl" | ".ndjson":
            return _JsonLines(path)
        case ".parquet":
            return _Parquet(path)
    raise ConfigError(f"{path}: {what} is one of {', '.join(SUFFIXES)}, the texts also as .gz, .bz2 or .xz")


def is_list(name: str) -> bool:
    """Whether a file's name is that of a list."""
    return suffix_of(name) in SUFFIXES and not (suffix_of(name) == ".parquet" and not name.lower().endswith(".parquet"))


def first_column(names: list[str], usual: tuple[str, ...]) -> str:
    """The first of the ``usual`` names, in lower case, that is among ``names``; empty if none is."""
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in usual if name in lower), "")
