"""Converts table rows that contain images into samples, as in Parquet datasets on the Hugging Face Hub."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from pipeline.config.schema import SourceConfig
from pipeline.imaging.headers import ImageError, sniff
from pipeline.samples import Outcome, SampleError, Schema, label_of, make_key, path_text
from pipeline.samples.captions import caption_columns, captions_of, shown_names
from pipeline.sources.annotations import Entry
from pipeline.sources.archive_samples import settle
from pipeline.sources.lists import ListRow, batch_rows, parquet_file

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "images")
LABEL_COLUMNS = ("label", "cls", "fine_label", "class")
_BATCH = 64  # rows in memory at a time


@dataclass(frozen=True, slots=True)
class Roles:
    """Roles of columns; a row's captions come from the first caption column with a text."""

    image: str
    captions: tuple[str, ...]
    label: str
    fields: tuple[str, ...]

    @property
    def wanted(self) -> list[str]:
        columns = (self.image, *self.captions, self.label, *self.fields)
        return list(dict.fromkeys(column for column in columns if column))


def outcomes(name: str, file: IO[bytes], config: SourceConfig, columns: Schema) -> Iterator[Outcome]:
    """Yield the outcome of each row; an image is bytes, or ``{bytes, path}``.

    Raises:
        SampleError: ``damaged_parquet``, ``no_column``; before the first outcome.
    """
    try:
        parquet = parquet_file(file)
        roles = roles_of(config, parquet.schema_arrow.names)
        for group in range(parquet.num_row_groups):  # read the whole file before yielding anything
            for _ in parquet.iter_batches(_BATCH, row_groups=[group], columns=roles.wanted):
                pass
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise SampleError("damaged_parquet", type(error).__name__, retryable=True) from None
    rows = (row for batch in parquet.iter_batches(_BATCH, columns=roles.wanted) for row in batch_rows(batch))
    return row_outcomes(name, rows, roles, config, columns)


def roles_of(config: SourceConfig, names: list[str], image: str = "", labels: tuple[str, ...] = LABEL_COLUMNS) -> Roles:
    """Assign roles to the columns ``names``.

    Args:
        image: the column with images; empty: find it.
        labels: possible names of the label column.

    Raises:
        SampleError: ``no_column``.
    """
    for column in config.columns:
        _column(column, (), names, "columns")
    captions = [config.caption_column] if config.caption_column else caption_columns(names)
    for column in captions:
        _column(column, (), names, "caption_column")
    return Roles(
        image or _column(config.image_column, IMAGE_COLUMNS, names, "image_column"),
        tuple(captions),
        _column("", labels, names, "labels") if config.labels else "",
        config.columns,
    )


def row_outcomes(
    name: str, rows: Iterable[ListRow], roles: Roles, config: SourceConfig, columns: Schema
) -> Iterator[Outcome]:
    """Yield the outcome of each row of the file ``name``, read from the columns in ``roles``."""
    for number, row in enumerate(rows):
        outcome = Outcome(make_key(f"{name}/{number:09d}"), "failed", source=name, offset=number)
        try:
            _settle(outcome, row, roles, config, columns)
        except (SampleError, ImageError) as error:
            outcome.reason, outcome.detail = error.reason, error.detail
        yield outcome


def _settle(outcome: Outcome, row: ListRow, roles: Roles, config: SourceConfig, columns: Schema) -> None:
    """Set the outcome of a row. Raises SampleError or ImageError if the row cannot be used."""
    if row.error:
        raise SampleError("bad_row", row.error)
    values = row.values
    data, outcome.member = _image(values[roles.image])
    outcome.source_bytes = len(data)
    if len(data) > config.max_member_bytes:
        raise SampleError("too_many_bytes", f"{len(data)} bytes")
    if not data:
        raise SampleError("no_image", f"column {roles.image}: {_kind(values[roles.image])}")
    entry = Entry(
        next(filter(None, (captions_of(values[column]) for column in roles.captions)), []),
        {column: values[column] for column in roles.fields},
        label_of(values[roles.label]) if roles.label else None,
    )
    settle(outcome, data, sniff(data), entry, columns)


def _column(setting: str, usual: tuple[str, ...], names: list[str], option: str) -> str:
    """The column that a setting names, or otherwise the first of the usual ones.

    Raises:
        SampleError: ``no_column``.
    """
    lower = {name.lower(): name for name in names}
    found = setting if setting in names else "" if setting else next((lower[n] for n in usual if n in lower), "")
    if not found:
        raise SampleError("no_column", f"{option}={setting}: it has {shown_names(names)}", retryable=True)
    return found


def _image(value: Any) -> tuple[bytes, str]:
    """The bytes and the original name of an image. Raises SampleError for several images."""
    if isinstance(value, list) and len(value) > 1:
        raise SampleError("several_images", f"{len(value)} images in a row; a sample has one")
    if isinstance(value, list) and value:
        return _image(value[0])
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        name = path_text(PurePosixPath(path).name) if isinstance(path, str) else ""
        return data if isinstance(data, bytes) else b"", name
    return value if isinstance(value, bytes) else _from_base64(value), ""


def _from_base64(value: Any) -> bytes:
    """Decode a base64 image, with or without the prefix ``data:image/…;base64,``; empty if ``value`` is not one."""
    if not isinstance(value, str):
        return b""
    try:
        data = base64.b64decode("".join(value.rpartition(",")[2].split()), validate=True)
        sniff(data)
    except (ValueError, ImageError):
        return b""
    return data


def _kind(value: Any) -> str:
    """Describe a value that is not an image."""
    if isinstance(value, dict):
        return "a path without bytes" if value.get("path") else "neither bytes nor path"
    if isinstance(value, str):
        return "a text that is not an image in base64; for paths use source=image_folder, for URLs source=url_list"
    return "null" if value is None else "no bytes" if value == b"" else type(value).__name__
