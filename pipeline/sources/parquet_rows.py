"""Rows of a parquet file with images in it, as the Hugging Face Hub's data sets have them, as samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SourceConfig
from pipeline.headers import ImageError, sniff
from pipeline.samples import Outcome, SampleError, Schema, make_key
from pipeline.sources.annotations import Entry
from pipeline.sources.archives.reader import settle
from pipeline.sources.lists import CAPTION_COLUMNS, plain, texts

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes")
_LABEL_COLUMNS = ("label", "cls", "fine_label", "class")
_BATCH = 64  # rows with images in memory at a time


def outcomes(name: str, file: IO[bytes], config: SourceConfig, columns: Schema) -> Iterator[Outcome]:
    """What becomes of each row; the image is bytes, or ``{bytes, path}``.

    Raises:
        SampleError: ``damaged_parquet``, ``no_column``; before anything is yielded.
    """
    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        image = _column(config.image_column, _IMAGE_COLUMNS, names, "image_column")
        caption = _column(config.caption_column, CAPTION_COLUMNS, names, "caption_column", needed=False)
        label = _column("", _LABEL_COLUMNS, names, "labels", needed=config.labels) if config.labels else ""
        for column in config.columns:
            _column(column, (), names, "columns")
        wanted = [column for column in (image, caption, label, *config.columns) if column]
        for group in range(parquet.num_row_groups):  # all of it can be read, before any of it counts
            for _ in parquet.iter_batches(_BATCH, row_groups=[group], columns=wanted):
                pass
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SampleError("damaged_parquet", type(error).__name__, retryable=True) from None
    return _rows(name, parquet, wanted, (image, caption, label), config, columns)


def _rows(
    name: str,
    parquet: pq.ParquetFile,
    wanted: list[str],
    roles: tuple[str, str, str],
    config: SourceConfig,
    columns: Schema,
) -> Iterator[Outcome]:
    image, caption, label = roles
    number = 0
    for batch in parquet.iter_batches(_BATCH, columns=list(dict.fromkeys(wanted))):
        for row in batch.to_pylist():
            data, path = _image(row[image])
            outcome = Outcome(make_key(f"{name}/{number:09d}"), "failed", source=name, member=path, offset=number)
            number += 1
            outcome.source_bytes = len(data)
            if len(data) > config.max_member_bytes:
                outcome.reason, outcome.detail = "too_many_bytes", f"{len(data)} bytes"
                yield outcome
                continue
            try:
                format = sniff(data) if data else "no_image"
            except ImageError as error:
                outcome.reason, outcome.detail = error.reason, error.detail
            else:
                entry = Entry(
                    texts(row[caption]) if caption else [],
                    {column: plain(row[column]) for column in config.columns},
                    int(row[label]) if label and row[label] is not None else None,
                )
                if data:
                    settle(outcome, data, format, entry, columns)
                else:
                    outcome.reason = format
            yield outcome


def _column(setting: str, usual: tuple[str, ...], names: list[str], option: str, *, needed: bool = True) -> str:
    """The column that a setting names, else the first of the usual ones; empty if none is there and none needed."""
    lower = {name.lower(): name for name in names}
    found = setting if setting in names else "" if setting else next((lower[n] for n in usual if n in lower), "")
    if not found and (setting or needed):
        raise SampleError("no_column", f"{option}={setting}: it has {', '.join(names)}", retryable=True)
    return found


def _image(value: Any) -> tuple[bytes, str]:
    """The bytes of an image, and the name it had."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        return data if isinstance(data, bytes) else b"", PurePosixPath(str(path)).name if path else ""
    return value if isinstance(value, bytes) else b"", ""
