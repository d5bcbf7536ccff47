"""What flows through a stage: rows of samples, and the outcome that each input comes to."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote_from_bytes, unquote_to_bytes

import xxhash

Row = dict[str, Any]
"""One sample as a storage format holds it: column name → value."""

Schema = dict[str, str]
"""Column name → type: str, int, bytes, json, or jpeg (image bytes of any format, as MDS calls it)."""

Status = Literal["kept", "dropped", "failed"]

IMAGE_COLUMNS: Schema = {"key": "str", "jpg": "jpeg", "format": "str", "caption": "str", "captions": "json"}
"""Columns of every sample that has an image; filter adds ``width``, ``height`` and ``min_side``."""

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tif", "avif": "avif"}
"""File extension of each image format that we take."""

FORMATS = (
    {"jpg": "jpeg", "jpeg": "jpeg", "jpe": "jpeg", "tif": "tiff", "svg": "svg"}
    | {e: f for f, e in EXTENSIONS.items() if f not in ("jpeg", "tiff")}
    | {"tiff": "tiff"}
)
"""Image format that a file extension promises."""

_SAFE = re.compile(r"[^A-Za-z0-9_,@+/-]")
_MAX_KEY = 200
_QUOTED = "%:"


TAKEN = "takedown"
"""Reason of samples that were kept and then removed for good (stage=takedown). Each still has its place among those
that were kept, so that positions in plans go on meaning the same samples."""

TAKEN_UNKEPT = "takedown_unkept"
"""Reason of samples removed for good that had not been kept anyway."""


class SampleError(Exception):
    """One sample cannot be used; it becomes a ledger row and nothing else suffers.

    Args:
        reason: one snake_case word that rows are counted by.
        detail: what exactly, the same in every run (no address, time or absolute path).
        retryable: trying again later may help.
    """

    def __init__(self, reason: str, detail: str = "", *, retryable: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.retryable = retryable


@dataclass(slots=True)
class Outcome:
    """What became of one input sample, or (``container``) of one archive that holds samples.

    ``source``, ``member`` and ``offset`` say where the input lay, relative to the stage's input; ``source_hash`` is
    the XXH3-128 of its bytes, ``source_pixels`` how many pixels it had, ``phash`` how it looks. ``count`` and
    ``complete`` are a container's: samples found in it, end marker seen.
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


def content_hash(data: bytes) -> str:
    """XXH3-128 of ``data``, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def path_text(path: str) -> str:
    """A path as text that every file format can hold; one that is not UTF-8 is percent-quoted after ``%:``."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return _QUOTED + quote_from_bytes(os.fsencode(path))
    return _QUOTED + quote_from_bytes(path.encode()) if path.startswith(_QUOTED) else path


def real_path(text: str) -> str:
    """The path that :func:`path_text` was given."""
    return os.fsdecode(unquote_to_bytes(text[len(_QUOTED) :])) if text.startswith(_QUOTED) else text


def make_key(path: str) -> str:
    """The key of the sample at ``path`` (``<archive>/<member>`` or a relative file path): stable, unique and safe.

    ``a dir/b.c.jpg`` → ``a=20dir/b=2Ec-jpg``: characters outside ``[A-Za-z0-9_,@+/-]`` become ``=`` and two hexadecimal
    digits per UTF-8 byte, the last dot a ``-``. Different paths have different keys, and no key has a dot, as
    WebDataset's naming asks. Very long ones end in a hash.
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


def caption_fields(captions: list[str]) -> Row:
    """The caption columns: the first caption by itself, and all of them."""
    return {"caption": captions[0] if captions else "", "captions": captions}
