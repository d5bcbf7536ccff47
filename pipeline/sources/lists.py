"""Lists of URLs with captions (txt, csv, tsv, json, jsonl, parquet), read in ranges of rows without holding them."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ConfigError, SourceConfig

URL_COLUMNS = ("url", "image_url", "img_url", "link")
CAPTION_COLUMNS = ("captions", "caption", "text", "descriptions", "title", "alt")
_LARGEST_JSON = 2 << 30
_BATCH = 8192

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Rows ``start:stop`` of a list, beginning at byte ``offset`` where it is a text."""

    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What a list says of an image."""

    url: str
    captions: list[str] = field(default_factory=list)
    hash: str = ""
    meta: Row = field(default_factory=dict)
    split: str = ""


class List(ABC):
    """One file with rows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def spans(self, size: int) -> Iterator[Span]:
        """All rows, ``size`` at a time."""

    @abstractmethod
    def rows(self, span: Span) -> Iterator[Row]:
        """The rows of a span."""


class _Lines(List):
    """A text file with a row a line."""

    def spans(self, size: int) -> Iterator[Span]:
        start = number = offset = 0
        begin = self._begin
        offset = begin
        with self.path.open("rb") as file:
            file.seek(begin)
            for end in self._ends(file, begin):
                number += 1
                if number - start == size:
                    yield Span(start, number, offset)
                    start, offset = number, end
        if number > start:
            yield Span(start, number, offset)

    def rows(self, span: Span) -> Iterator[Row]:
        with self.path.open("rb") as file:
            file.seek(span.offset)
            yield from islice(self._parsed(file), span.stop - span.start)

    @property
    def _begin(self) -> int:
        """Where the first row begins."""
        with self.path.open("rb") as file:
            return 3 if file.read(3) == b"\xef\xbb\xbf" else 0

    def _ends(self, file: IO[bytes], at: int) -> Iterator[int]:
        """The offset behind each row."""
        for line in file:
            at += len(line)
            if line.strip():
                yield at

    def _parsed(self, file: IO[bytes]) -> Iterator[Row]:
        for line in file:
            if line.strip():
                yield {"url": line.decode("utf-8", "replace").strip()}


class _JsonLines(_Lines):
    def _parsed(self, file: IO[bytes]) -> Iterator[Row]:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                yield row if isinstance(row, dict) else {}


class _Counting:
    """Lines of a file as text, and how many bytes of them were taken."""

    def __init__(self, file: IO[bytes], at: int) -> None:
        self._file = file
        self.at = at

    def __iter__(self) -> _Counting:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.at += len(line)
        return line.decode("utf-8", "replace").replace("\0", "")


class _Table(_Lines):
    """CSV or TSV; a first row without any URL in it is the heading, else columns have numbers."""

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        csv.field_size_limit(1 << 30)
        self._delimiter = delimiter

    def _reader(self, lines: Iterator[str]) -> Any:
        # tabs are hardly ever quoted, and captions begin with quotation marks
        if self._delimiter == "\t":
            return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return csv.reader(lines, delimiter=self._delimiter)

    @cached_property
    def _head(self) -> tuple[list[str], int]:
        """The names of the columns, and where the rows begin."""
        begin = super()._begin
        with self.path.open("rb") as file:
            file.seek(begin)
            lines = _Counting(file, begin)
            first: list[str] = next(self._reader(lines), [])
            if any("://" in value for value in first):
                return [str(number) for number in range(len(first))], begin
            return [name.strip() for name in first], lines.at

    @property
    def _begin(self) -> int:
        return self._head[1]

    def _ends(self, file: IO[bytes], at: int) -> Iterator[int]:
        lines = _Counting(file, at)
        for row in self._reader(lines):
            if row:
                yield lines.at

    def _parsed(self, file: IO[bytes]) -> Iterator[Row]:
        names = self._head[0]
        for row in self._reader(_Counting(file, 0)):
            if row:
                yield dict(zip(names, row, strict=False))


class _Json(List):
    """A JSON list of objects; it is held in memory as a whole."""

    @cached_property
    def _all(self) -> list[Any]:
        if self.path.stat().st_size > _LARGEST_JSON:
            raise ConfigError(f"{self.path}: too large for a .json list: make it .jsonl or .parquet")
        try:
            value = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise ConfigError(f"{self.path}: no JSON: {error}") from None
        if not isinstance(value, list):
            raise ConfigError(f"{self.path}: expected a list of objects")
        return value

    def spans(self, size: int) -> Iterator[Span]:
        yield from _even(len(self._all), size)

    def rows(self, span: Span) -> Iterator[Row]:
        for row in self._all[span.start : span.stop]:
            yield row if isinstance(row, dict) else {"url": row} if isinstance(row, str) else {}


class _Parquet(List):
    def spans(self, size: int) -> Iterator[Span]:
        with _parquet(self.path) as file:
            yield from _even(file.metadata.num_rows, size)

    def rows(self, span: Span) -> Iterator[Row]:
        with _parquet(self.path) as file:
            at = 0
            groups: list[int] = []
            first = 0
            for group in range(file.num_row_groups):
                stop = at + file.metadata.row_group(group).num_rows
                if stop > span.start and at < span.stop:
                    first = first if groups else at
                    groups.append(group)
                at = stop
            for batch in file.iter_batches(_BATCH, row_groups=groups):
                begin, end = max(span.start - first, 0), min(span.stop - first, len(batch))
                if begin < end:
                    yield from batch.slice(begin, end - begin).to_pylist()
                first += len(batch)
                if first >= span.stop:
                    return


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: no parquet file: {error}") from None


def _even(count: int, size: int) -> Iterator[Span]:
    for start in range(0, count, size):
        yield Span(start, min(start + size, count))


SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


def open_list(path: Path) -> List:
    """The list at ``path``, by its suffix.

    Raises:
        ConfigError: it has another one.
    """
    match path.suffix.lower():
        case ".txt":
            return _Lines(path)
        case ".csv":
            return _Table(path, ",")
        case ".tsv":
            return _Table(path, "\t")
        case ".json":
            return _Json(path)
        case ".jsonl":
            return _JsonLines(path)
        case ".parquet":
            return _Parquet(path)
    raise ConfigError(f"{path}: a list of URLs is one of {', '.join(SUFFIXES)}")


def record(row: Row, config: SourceConfig) -> Record:
    """What ``row`` says, by the columns that the settings name or that names suggest."""
    lower = {name.lower(): name for name in row}
    url_column = config.url_column or _first(lower, URL_COLUMNS) or _with_url(row)
    url = row.get(url_column)
    caption_column = config.caption_column or _first(lower, CAPTION_COLUMNS)
    if not caption_column:  # without a heading: whatever is beside the URL
        caption_column = next((name for name in row if name.isdigit() and name != url_column), "")
    split = row.get(config.split_column)
    return Record(
        url.strip() if isinstance(url, str) else "",
        texts(row.get(caption_column)),
        str(row.get(config.hash_column) or "").lower(),
        {name: plain(row.get(name)) for name in config.columns},
        "" if split is None else str(split),
    )


def check_columns(row: Row, config: SourceConfig, place: str) -> None:
    """Raises ConfigError if the first row of a list lacks a column that the settings name, or has no URL."""
    named = ("url_column", "caption_column", "hash_column", "split_column")
    wanted = [(name, getattr(config, name)) for name in named] + [("columns", name) for name in config.columns]
    for setting, name in wanted:
        if name and name not in row:
            raise ConfigError(f"{setting}={name}: {place} has no such column; it has {', '.join(row)}")
    if not record(row, config).url:
        raise ConfigError(f"url_column: which column of {place} has the URLs? It has {', '.join(row)}")


def _first(lower: Row, names: tuple[str, ...]) -> str:
    return next((lower[name] for name in names if name in lower), "")


def _with_url(row: Row) -> str:
    return next((name for name, value in row.items() if isinstance(value, str) and "://" in value), "")


def texts(value: Any) -> list[str]:
    """One or several captions; none for what is empty."""
    values = value if isinstance(value, list) else [value]
    return [str(text) for text in values if text not in (None, "")]


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
