"""The fields of a row in a list of URLs: URL, captions, hash, split and others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from pipeline.config.schema import ConfigError, SourceConfig
from pipeline.samples import SampleError, plain
from pipeline.samples.captions import caption_columns, captions_of, shown_names
from pipeline.sources.lists import URL_COLUMNS, List, ListRow, Row, first_column

_LOOKED_AT = 1_000  # rows examined to find the column with URLs


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of an image in a list; ``error`` describes what is wrong with the row."""

    url: str
    captions: list[str] = field(default_factory=list)
    hash: str = ""
    meta: Row = field(default_factory=dict)
    split: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """Roles of the columns of a list."""

    url: str = ""
    captions: tuple[str, ...] = ()


def columns_of(rows: List, config: SourceConfig) -> Columns | None:
    """Find the columns of a list from the settings, or from its column names and first rows; None if it has no rows.

    Raises:
        ConfigError: a column that the settings name is missing, or none of the first 1,000 rows has a URL.
    """
    first = list(islice(rows.rows(), _LOOKED_AT))
    if not first:
        return None
    names = rows.columns or list(dict.fromkeys(name for row in first for name in row.values))
    place = rows.path.name
    if not names:
        raise ConfigError(f"{place}, line {first[0].line}: {first[0].error or 'no columns'}; nor are there better rows")
    named = ("url_column", "caption_column", "hash_column", "split_column")
    wanted = [(name, getattr(config, name)) for name in named] + [("columns", name) for name in config.columns]
    for setting, name in wanted:
        if name and name not in names:
            raise ConfigError(f"{setting}={name}: {place} has no such column; it has {shown_names(names)}")
    url = config.url_column or first_column(names, URL_COLUMNS) or _with_url(first)
    if not url:
        raise ConfigError(f"url_column: which column of {place} has the URLs? It has {shown_names(names)}")
    said = [str(row.values.get(url)) for row in first if not row.error]
    if said and not any("://" in text for text in said):
        raise ConfigError(f"url_column={url}: no row of {place} has a URL there, the first has {said[0][:200]!r}")
    captions = (config.caption_column,) if config.caption_column else tuple(caption_columns(names))
    if not captions:  # without a header: the first other column
        captions = tuple(name for name in names if name.isdigit() and name != url)[:1]
    return Columns(url, captions)


def _with_url(rows: Iterable[ListRow]) -> str:
    values = (item for row in rows for item in row.values.items())
    return next((name for name, value in values if isinstance(value, str) and "://" in value), "")


def record(row: ListRow, columns: Columns, config: SourceConfig) -> Record:
    """Extract the fields of ``row``."""
    values = row.values
    if row.error:
        return Record("", error=row.error)
    url = values.get(columns.url)
    split = values.get(config.split_column)
    digest = values.get(config.hash_column)
    try:
        meta = {name: plain(values.get(name)) for name in config.columns}
    except SampleError as error:
        return Record("", error=error.detail, split="" if split is None else str(split))
    return Record(
        url.strip() if isinstance(url, str) else "",
        next(filter(None, (captions_of(values.get(name)) for name in columns.captions)), []),
        digest.strip().lower() if isinstance(digest, str) else "",
        meta,
        "" if split is None else str(split).strip(),
    )
