"""Recognizes files that were given in the wrong place, so that error messages can name the setting that takes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import ConfigError
from pipeline.samples import SampleError, image_format
from pipeline.samples.captions import caption_columns
from pipeline.sources.archives import members
from pipeline.sources.archives.compression import unpacked
from pipeline.sources.lists import KNOWN_COLUMNS, NAME_COLUMNS, URL_COLUMNS, first_column
from pipeline.sources.separated import separator_of
from pipeline.sources.text_files import MOST, is_pointer, small_text

_HEAD = 1 << 16
_FARTHEST = 1 << 30  # bytes of a JSON document that are searched for a key
_FEW = 20  # lines or members that are examined


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file.

    Attributes:
        name: description, with an article.
        advice: what to do with it.
        source: the source that reads it; :data:`CAPTIONS` for tables of captions.
        annotations: its layout of captions, as a value of ``annotations=``.
        text: whether it is text.
    """

    name: str
    advice: str = ""
    source: str = ""
    annotations: str = ""
    text: bool = False

    def __str__(self) -> str:
        advice = self.advice
        if self.annotations:
            advice = (
                "captions= takes it where source=image_folder reads the images, metadata= with "
                f"annotations={self.annotations} where they are in archives"
            )
        elif self.source:
            advice = advice or f"source={self.source} reads it"
        return f"{self.name}: {advice}" if advice else self.name


CAPTIONS = "captions"
"""Stands for a source in :class:`Kind`: a file for ``captions=``."""
_UNPACK = "unpack it, or pack the images as tar or zip"
_BEGINNINGS: tuple[tuple[bytes, Kind], ...] = (
    (b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file", source="hdf5")),
    (b"\x93NUMPY", Kind("a NumPy array", source="npy")),
    (b"ARROW1", Kind("an Arrow file", source="ipc")),
    (b"\xff\xff\xff\xff", Kind("an Arrow stream", source="ipc")),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Kind("a RAR archive", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Kind("a file packed by zstd", "unpack it")),
    (b"SQLite format 3\0", Kind("an SQLite database", "export a table as CSV or Parquet")),
    (b"%PDF-", Kind("a PDF document")),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_SAFETENSORS = re.compile(rb'.{6}\0\0\{\s*"', re.DOTALL)
_WEB_PAGE = re.compile(r"\s*<(!doctype html|html|head|body)\b", re.IGNORECASE)
_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0\0\0\0|II\*\0|MM\0\*|.{4}ftyp(avif|heic|mif1)", re.DOTALL
)
_SAID = ("lfs_pointer", "empty")
"""Reasons that already describe the file."""
_PICKLED = Kind("a Python pickle", "pickles are never read, as they can run code")
_URLS = Kind("a list of URLs", source="url_list", text=True)


def kind_of(file: IO[bytes] | Path) -> Kind | None:
    """Recognize a file by its content; None if its kind is unknown or it cannot be read."""
    with suppress(OSError, SampleError, ValueError, LookupError, pa.ArrowException):
        if isinstance(file, Path):
            with file.open("rb") as opened:
                return _kind(opened)
        return _kind(file)
    return None


@contextmanager
def explained(file: IO[bytes] | Path, name: str = "", reads: Collection[str] = ()) -> Iterator[None]:
    """Context manager that adds a description of the file to errors.

    Args:
        name: how the message refers to the file; empty: by its name.
        reads: accepted sources and annotation layouts; files of these kinds are not described.
    """
    try:
        yield
    except (ConfigError, SampleError) as error:
        kind = kind_of(file)
        known = isinstance(error, SampleError) and error.reason in _SAID
        if kind is None or known or {kind.source, kind.annotations} & set(reads):
            raise
        if isinstance(error, SampleError):
            detail = "; ".join(filter(None, (error.detail, f"it is {kind}")))
            raise SampleError(error.reason, detail, retryable=error.retryable) from None
        raise ConfigError(f"{error}; {name or Path(file.name).name} is {kind}") from None


def _kind(file: IO[bytes]) -> Kind | None:
    stream = unpacked(file, MOST)
    start = stream.read(_HEAD)
    if not start:
        return Kind("an empty file", text=True)
    if is_pointer(start):
        return Kind("a pointer of Git LFS", "fetch the file itself with `git lfs pull`")
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind
    if start[257:262] == b"ustar" or start.startswith((b"PK\3\4", b"PK\5\6")):
        return _archive(file)
    if start.startswith(b"PAR1"):
        return _parquet(file)
    if _PICKLE.match(start):
        return _PICKLED
    if _SAFETENSORS.match(start):
        return Kind("a file of weights (safetensors)")
    if _IMAGE.match(start):
        return Kind("an image", "input= of source=image_folder takes the folder that it is in")
    return _text(start, stream)


def _archive(file: IO[bytes]) -> Kind:
    names: list[str] = []
    for member in members(file, 1 << 40, lambda name, size: 0):
        names.append(member.name)
        if len(names) == _FEW:
            break
    if any(name.startswith(("xl/", "word/", "ppt/")) for name in names):
        return Kind("an office document", "save its table as CSV")
    if any(name.endswith("/data.pkl") for name in names):
        return Kind("a file of torch.save")
    if names and all(name.endswith(".npy") for name in names):
        return Kind("an archive of NumPy arrays", source="npy")
    return Kind("an archive", source="webdataset")


def _parquet(file: IO[bytes]) -> Kind:
    file.seek(0)
    columns = list(map(str, pq.ParquetFile(file).schema_arrow.names))
    if first_column(columns, URL_COLUMNS):
        return Kind("a Parquet table of URLs", source="url_list")
    return Kind("a Parquet table", "source=parquet reads tables of images", source="parquet")


def _text(start: bytes, rest: IO[bytes]) -> Kind | None:
    text = small_text(start)
    if "\0" in text:
        return None
    if _WEB_PAGE.match(text):
        return Kind("a web page", "what a server shows instead of a file; log in, or fetch the file again", text=True)
    if text.startswith("<"):
        return Kind("an XML document", "annotations in XML are not read", text=True)
    if text.startswith(("{", "[")):
        return _json(text, rest)
    if re.search(r"^source:\s*\w+\s*$", text, re.MULTILINE):
        return Kind("the YAML file of a dataset", "dataset= takes it", text=True)
    lines = [line for line in text.splitlines()[:_FEW] if line.strip()]
    if sum("://" in line for line in lines) * 2 > len(lines) - 1:
        return _URLS
    return _table(lines)


def _json(text: str, rest: IO[bytes]) -> Kind | None:
    keys = set(re.findall(r'"(\w+)"\s*:', text))
    if keys >= {"shards", "version"}:
        return Kind("the index of MDS shards", "source=mds reads the folder that it is in", "mds", text=True)
    if keys >= {"successes", "failed_to_download"}:
        return Kind(
            "the statistics of a shard of img2dataset", "source=webdataset reads the tars next to it", text=True
        )
    if keys >= {"conversations", "from"}:
        return Kind("a list of conversations", "it has no captions", text=True)
    if keys >= {"features", "splits"} or keys >= {"_data_files", "_fingerprint"}:
        advice = "the data are in files next to it: source=ipc or source=parquet reads their folder"
        return Kind("what the Hugging Face library notes of a dataset", advice, text=True)
    if keys >= {"data", "image_id"} and keys & {"caption_str", "reference_strs"}:
        return Kind("an annotation file of TextCaps", annotations="textcaps", text=True)
    pictured = keys >= {"images", "file_name"} and not keys & {"sentences"}
    if pictured and not keys & {"info", "licenses", "categories", "annotations"}:
        pictured = "caption" not in keys and _mentions(rest, b'"annotations"')
    if text.startswith("{") and (pictured or keys >= {"annotations", "image_id"}):
        return Kind("an annotation file of COCO", annotations="coco", text=True)
    if keys & set(URL_COLUMNS):
        return _URLS
    return None


def _mentions(stream: IO[bytes], word: bytes) -> bool:
    """Whether the rest of a stream contains ``word``."""
    before = b""
    for _ in range(_FARTHEST // (1 << 20)):
        data = stream.read(1 << 20)
        if not data:
            break
        if word in before + data:
            return True
        before = data[-len(word) :]
    return False


def _table(lines: list[str]) -> Kind | None:
    separator = separator_of(lines, ",", KNOWN_COLUMNS)
    names = [name.strip(" \"'") for name in lines[0].split(separator)] if lines else []
    if {"raw", "filename", "split"} <= set(names):
        return Kind("an annotation file of Flickr30k", annotations="flickr30k", text=True)
    if len(names) > 1 and first_column(names, NAME_COLUMNS) and caption_columns(names):
        return Kind("a table of captions", "captions= of source=image_folder takes it", CAPTIONS, text=True)
    if lines and all(image_format(line.strip(" \"',;")) for line in lines[len(lines) > 1 :]):
        return Kind("a list of images", "it has no captions, nor URLs", text=True)
    return None
