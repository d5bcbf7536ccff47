"""Reads lists from files (txt, csv, tsv, json, jsonl, Parquet, compressed or not) in ranges of rows.

All lists are read here: URLs, captions, keys, labels, splits. An invalid row is yielded with its line and the reason;
an invalid file raises a ConfigError that names it.
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
"""Names of columns that identify the image of a row."""
KNOWN_COLUMNS = frozenset((*URL_COLUMNS, *CAPTION_COLUMNS, *TITLE_COLUMNS, *NAME_COLUMNS, "uid", "split", "label"))
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_LARGEST_JSON = 2 << 30
_BATCH = 8192
_LOOKED_AT = 20  # rows that determine the number of columns if there is no header

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of a list; in a text file, they begin at byte ``offset``."""

    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class ListRow:
    """A row as a mapping of column names to values; ``error`` describes what is wrong with an invalid one.

    ``line`` is its first line number in a text that was read from its beginning, otherwise 0.
    """

    values: Row = field(default_factory=dict)
    line: int = 0
    error: str = ""


class List(ABC):
    """A file with rows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def columns(self) -> list[str]:
        """Names of the columns; empty if the file has none."""
        return []

    @abstractmethod
    def spans(self, size: int) -> Iterator[Span]:
        """Yield all rows as spans of ``size`` rows.

        Raises:
            ConfigError: the file cannot be read.
        """

    @abstractmethod
    def rows(self, span: Span | None = None) -> Iterator[ListRow]:
        """Yield the rows of a span, or all rows.

        Raises:
            ConfigError: the file cannot be read.
        """


class _Text(List):
    """A text file with one row per line, apart from quoted line breaks."""

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
        """The lines from the row at byte ``offset``; 0: from the first row."""
        with list_errors(self.path), self.path.open("rb") as file:
            stream, mark = open_text(file)
            skip(stream, max(offset, mark))
            lines = Lines(stream, max(offset, mark), -1_000_000_000 if offset > mark else 0)
            if offset <= mark:
                self._pass_heading(lines)
            yield lines

    def _pass_heading(self, lines: Lines) -> None:
        """Skip the header, if there is one."""

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
    """CSV, TSV and similar formats; a first row that contains a URL or an image name is not a header."""

    def __init__(self, path: Path, usual: str, heading: bool | None) -> None:
        super().__init__(path)
        self._usual = usual
        self._heading = heading

    @property
    def columns(self) -> list[str]:
        return self._head[0]

    @cached_property
    def _head(self) -> tuple[list[str], str, bool]:
        """The column names, the separator, and whether there is a header."""
        with list_errors(self.path), self.path.open("rb") as file:
            stream, mark = open_text(file)
            skip(stream, mark)
            lines = Lines(stream)
            separator = separator_of(first_lines(lines), self._usual, KNOWN_COLUMNS)
            rows = [fields for _, fields in islice(separated(lines, separator), _LOOKED_AT)]
        names = [name.strip() for name in rows[0]] if rows else []
        if not (_is_heading(names) if self._heading is None else self._heading):
            # the minimum over the rows: unquoted separators in texts add columns
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
                if texts:  # an unquoted text that contains separators
                    fields = [*fields[: len(names) - 1], separator.join(fields[len(names) - 1 :])]
                else:
                    error = f"{len(fields)} fields in place of {len(names)}"
            yield ListRow(dict(zip(names, fields, strict=False)), max(number, 0), error)


def _is_heading(names: list[str]) -> bool:
    """Whether the first row is a header."""
    if any("://" in name or image_format(name.partition("#")[0]) for name in names):
        return False
    return any(name.lower() in KNOWN_COLUMNS for name in names) or all(names)


class _Json(List):
    """A JSON list of objects, or a mapping of names to values; it is loaded into memory."""

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
                return lines  # JSON lines with the wrong suffix
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
"""A JSON object with fewer keys, one of which holds a list of objects, only wraps that list."""


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
    """Open ``file`` as Parquet.

    Raises:
        SampleError: it is not a Parquet file, or it is a Git LFS pointer.
        pyarrow.ArrowException: it is damaged.
    """
    start = file.read(64)
    file.seek(0)
    if start and not start.startswith(b"PAR1"):
        open_text(file)
        raise SampleError("damaged_parquet", f"no parquet file, it begins with {start[:4]!r}", retryable=True)
    return pq.ParquetFile(file)


def batch_rows(batch: pa.RecordBatch) -> Iterator[ListRow]:
    """Yield the rows of a batch; invalid UTF-8 is repaired.

    A row with another value that Python cannot represent, such as a time in the year 20,000, is yielded with an error.
    """
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
    """Return the list at ``path``, in the format of its suffix, which ``.gz``, ``.bz2`` or ``.xz`` may follow.

    Args:
        what: description of the list, for error messages.
        heading: whether a table begins with a header; None: detect it. Without one, column names are numbers.
        table: whether a ``.txt`` is a table too, not a list with one value per line.

    Raises:
        ConfigError: the suffix is not supported.
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
    """Whether a file has the suffix of a list."""
    return suffix_of(name) in SUFFIXES and not (suffix_of(name) == ".parquet" and not name.lower().endswith(".parquet"))


def first_column(names: list[str], usual: tuple[str, ...]) -> str:
    """The column in ``names`` that matches the first of the ``usual`` names, ignoring case; empty if none does."""
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in usual if name in lower), "")
