"""Rows of samples, and the outcome of each input of a stage."""

from __future__ import annotations

import datetime
import decimal
import math
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote_from_bytes, unquote_to_bytes

import xxhash

from pipeline.samples.captions import captions_of, repaired

Row = dict[str, Any]
"""A sample as a storage format holds it: maps column names to values."""

Schema = dict[str, str]
"""Maps column names to types: str, int, bytes, json, or jpeg (MDS's name for image bytes of any format)."""

Status = Literal["kept", "dropped", "failed"]

IMAGE_COLUMNS: Schema = {"key": "str", "jpg": "jpeg", "format": "str", "caption": "str", "captions": "json"}
"""Columns of every sample that has an image; filter adds ``width``, ``height`` and ``min_side``."""

EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "gif": "gif",
    "bmp": "bmp",
    "tiff": "tif",
    "avif": "avif",
    "jpeg2000": "jp2",
}
"""File extension of each supported image format."""

FORMATS = {extension: name for name, extension in EXTENSIONS.items()} | {
    "jpeg": "jpeg",
    "jpe": "jpeg",
    "jfif": "jpeg",
    "pjpeg": "jpeg",
    "pjp": "jpeg",
    "apng": "png",
    "dib": "bmp",
    "tiff": "tiff",
    "j2k": "jpeg2000",
    "j2c": "jpeg2000",
    "jpc": "jpeg2000",
    "jpf": "jpeg2000",
    "jpx": "jpeg2000",
    "svg": "svg",
}
"""Image format of each file extension."""

_SAFE = re.compile(r"[^A-Za-z0-9_,@+/-]")
_MAX_KEY = 200
_QUOTED = "%:"
_DEEPEST = 32


TAKEN = "takedown"
"""Reason of samples that were kept and later removed permanently (stage=takedown). They retain their positions among
the kept samples, so that positions in plans stay valid."""

TAKEN_UNKEPT = "takedown_unkept"
"""Reason of permanently removed samples that had not been kept."""


class SampleError(Exception):
    """A sample cannot be used. It becomes a ledger row; other samples are not affected.

    Args:
        reason: A snake_case identifier by which rows are counted.
        detail: Details, which must be the same in every run (no memory address, time or absolute path).
        retryable: Whether a retry may succeed.
    """

    def __init__(self, reason: str, detail: str = "", *, retryable: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.retryable = retryable


def in_words(error: BaseException) -> str:
    """Format an exception as a detail: its type and the first line of its message, without memory addresses, which
    differ between runs."""
    first = repaired(re.sub(r" at 0x[0-9a-f]+", "", str(error).partition("\n")[0])[:200])
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@dataclass(slots=True)
class Outcome:
    """The outcome of one input sample, or (``container``) of one archive that holds samples.

    ``source``, ``member`` and ``offset`` give the position of the input, relative to the stage's input; ``source_hash``
    is the XXH3-128 of its bytes, ``source_pixels`` its number of pixels, and ``phash`` its perceptual hash. Only
    containers use ``count``, the number of samples found, and ``complete``, whether the end marker was read.
    """

    key: str
    status: Status
    reason: str = ""
    detail: str = ""
    retryable: bool = False
    source: str = ""
    member: str = ""
    offset: int = -1
    source_bytes: int = 0
    source_hash: str = ""
    width: int = 0
    height: int = 0
    row: Row | None = field(default=None, repr=False)
    container: bool = False
    count: int = 0
    complete: bool = True
    source_pixels: int = 0
    phash: str = ""


def image_format(name: str) -> str:
    """The image format of a file name's extension; empty if it is not an image extension."""
    return FORMATS.get(name.rpartition(".")[2].lower(), "") if "." in name else ""


def content_hash(data: bytes) -> str:
    """XXH3-128 of ``data``, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def path_text(path: str) -> str:
    """Encode a path as text that every file format can store; if it is not UTF-8, it is percent-quoted after ``%:``."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return _QUOTED + quote_from_bytes(os.fsencode(path))
    return _QUOTED + quote_from_bytes(path.encode()) if path.startswith(_QUOTED) else path


def real_path(text: str) -> str:
    """Decode the result of :func:`path_text` to the original path."""
    return os.fsdecode(unquote_to_bytes(text[len(_QUOTED) :])) if text.startswith(_QUOTED) else text


def make_key(path: str) -> str:
    """The key of the sample at ``path`` (``<archive>/<member>`` or a relative file path): stable, unique and safe.

    ``a dir/b.c.jpg`` → ``a=20dir/b=2Ec-jpg``: characters outside ``[A-Za-z0-9_,@+/-]`` become ``=`` and two hexadecimal
    digits per UTF-8 byte, the last dot a ``-``. Different paths have different keys. Keys contain no dot, as WebDataset
    requires; very long ones end in a hash.
    """
    stem, dot, extension = path.rpartition(".")
    if not dot or "/" in extension or not extension.isalnum() or not extension.isascii():
        stem, extension = path, ""
    key = _escape(stem) + "-" + extension
    if len(key) > _MAX_KEY:
        key = f"{key[: _MAX_KEY - 33]}={content_hash(path.encode('utf-8', 'surrogateescape'))}"
    return key


def _escape(text: str) -> str:
    return _SAFE.sub(lambda m: "".join(f"={b:02X}" for b in m[0].encode("utf-8", "surrogateescape")), text)


def caption_fields(captions: Any) -> Row:
    """The caption columns ``caption`` (the first) and ``captions`` (all), as valid UTF-8.

    All sources use this function. ``captions`` is any value that :func:`~pipeline.samples.captions.captions_of`
    accepts.
    """
    texts = captions_of(captions)
    return {"caption": texts[0] if texts else "", "captions": texts}


def plain(value: Any, depth: int = 0) -> Any:
    """Convert ``value`` to a form that can be stored as JSON: NaN becomes null, times become ISO 8601, decimals and
    infinities become text.

    Raises:
        SampleError: ``bad_field`` for values without such a form, such as bytes that are not text.
    """
    if isinstance(value, str):
        return repaired(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else float(value) if math.isfinite(value) else str(value)
    if depth > _DEEPEST:
        raise SampleError("bad_field", f"nested more than {_DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return {repaired(str(name)): plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes | bytearray):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise SampleError("bad_field", "bytes that are not UTF-8 text") from None
    if hasattr(value, "tolist"):  # an array, a tensor, or one of their scalars
        return plain(value.tolist(), depth + 1)
    raise SampleError("bad_field", f"a value of type {type(value).__name__}")


def label_of(value: Any) -> int | None:
    """Convert ``value`` to a class number; None if there is no label (null, NaN, empty text).

    Raises:
        SampleError: ``bad_label`` for a value that is not an integer of at least 0.
    """
    if hasattr(value, "item") and not isinstance(value, str):
        try:
            value = value.item()
        except (ValueError, RuntimeError):  # an array with several values
            raise SampleError("bad_label", f"{type(value).__name__} of several values") from None
    if isinstance(value, str | bytes):
        text = repaired(value).strip()
        if not text:
            return None
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise SampleError("bad_label", f"{text[:80]!r} is not a class index")
        return int(text)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float) or not 0 <= value < 2**63 or value != int(value):
        shown = str(value)[:80] if isinstance(value, int | float) else type(value).__name__
        raise SampleError("bad_label", f"{shown} is not a class index")
    return int(value)
