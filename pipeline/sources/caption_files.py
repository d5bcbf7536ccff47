"""Captions of many images in one file, matched to images by name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.schema import ConfigError, SourceConfig
from pipeline.samples import image_format
from pipeline.samples.captions import CAPTION_COLUMNS, caption_columns, captions_of, repaired, shown_names
from pipeline.sources.annotations import READERS, LeftOutRows, laid_out
from pipeline.sources.lists import NAME_COLUMNS, Row, open_list
from pipeline.sources.recognition import CAPTIONS, explained, kind_of


def normalised(name: str) -> str:
    """Normalize a file name for comparison: NFC, forward slashes, no drive and no leading ``./`` or ``/``.

    A suffix such as ``#0``, which numbers the captions of an image in Flickr8k and Flickr30k, is removed.
    """
    name = unicodedata.normalize("NFC", repaired(name)).replace("\\", "/")
    return re.sub(r"^([A-Za-z]:)?(\.?/)+|(?<=\w)#\d+$", "", name)


@dataclass(slots=True)
class Named:
    """The captions of an image, and the line where they were found."""

    name: str
    captions: list[str] = field(default_factory=list)
    line: int = 0


class CaptionFile:
    """The captions in a ``.json``, ``.jsonl``, ``.csv``, ``.tsv``, ``.txt`` or ``.parquet`` file, compressed or not.

    JSON is a mapping of names to captions, or a list of objects; each object or row has a name and a caption. The
    annotation files of COCO, TextCaps and Flickr30k are supported.

    Attributes:
        bad: descriptions of unusable rows, with their line numbers.
        reads: the formats that this class accepts, for :func:`~pipeline.sources.recognition.explained`.

    Raises:
        ConfigError: the format is not supported, there are no columns for name and caption, or most rows are unusable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad: list[str] = []
        self.rows: dict[str, Named] = {}
        self._ends: dict[str, str] = {}
        self._stems: dict[str, str] = {}
        kind = kind_of(path)
        layout = kind.annotations if kind else ""
        self.reads = (CAPTIONS, layout) if layout else (CAPTIONS,)
        with explained(path, reads=self.reads):
            self._read(layout)
        for name in self.rows:
            self._note(name)

    def _read(self, layout: str) -> None:
        for named in self._annotated(layout) if layout else self._named():
            known = self.rows.setdefault(normalised(named.name), named)
            if known is not named:
                known.captions += named.captions
        if len(self.bad) > len(self.rows):
            raise ConfigError(f"captions={self.path}: {len(self.bad)} rows cannot be used: {self.bad[0]}")
        if not self.rows:
            raise ConfigError(f"captions={self.path}: there is no row in it")
        if not any(row.captions for row in self.rows.values()):
            raise ConfigError(f"captions={self.path}: none of its {len(self.rows)} rows has a text as caption")

    def _note(self, name: str) -> None:
        """Index the ends of a row's name; an end that several rows share maps to an empty name."""
        parts = name.split("/")
        for count in range(1, min(len(parts), 3) + 1):
            end = "/".join(parts[-count:]).casefold()
            self._ends[end] = "" if end in self._ends else name
        if not image_format(name):
            for stem in {name.casefold(), parts[-1].casefold()}:
                self._stems[stem] = "" if stem in self._stems else name

    def _annotated(self, layout: str) -> Iterator[Named]:
        """The captions in an annotation file with a published layout."""
        left_out = _Unusable(self.bad)
        with laid_out(layout, f"captions={self.path}"), self.path.open("rb") as file:
            for name, entry in READERS[layout](file, SourceConfig(), left_out):
                yield Named(name, entry.captions)

    def _named(self) -> Iterator[Named]:
        listed = open_list(self.path, "a file of captions", table=True)
        columns = listed.columns
        for row in listed.rows():
            place = f"line {row.line}" if row.line else f"row {len(self.rows) + len(self.bad) + 1}"
            if row.error:
                self.bad.append(f"{place}: {row.error}")
                continue
            name = _name_in(row.values)
            texts = _texts_in(row.values, name)
            if texts is None:
                found = shown_names(columns or row.values)
                said = (
                    f"{place}: a row needs a name ({', '.join(NAME_COLUMNS)}) and a caption "
                    f"({', '.join(CAPTION_COLUMNS)}), but has {found}"
                )
                if columns and not self._could(columns):
                    raise ConfigError(f"captions={self.path}: {said}")
                self.bad.append(said)
                continue
            yield Named(str(row.values[name]), texts, row.line)

    @staticmethod
    def _could(columns: list[str]) -> bool:
        """Whether ``columns`` contain both a name and a caption."""
        values = dict.fromkeys(columns, "x.jpg")
        name = _name_in(values)
        return _texts_in(values, name) is not None

    def find(self, path: str) -> str:
        """Return the name of the row for the image at ``path``; empty if there is none or more than one candidate.

        Tried in this order: the same path; an end of the path (``b.jpg`` matches any ``a/b.jpg``); the only row whose
        last one to three components match, ignoring case; the only row whose name equals this one without its
        extension.
        """
        wanted = normalised(path)
        parts = wanted.split("/")
        for first in range(len(parts)):
            if (end := "/".join(parts[first:])) in self.rows:
                return end
        for count in range(min(len(parts), 3), 0, -1):
            if end := self._ends.get("/".join(parts[-count:]).casefold(), ""):
                return end
        stem = wanted.rpartition(".")[0].casefold()
        return self._stems.get(stem, "") or self._stems.get(stem.rpartition("/")[2], "")

    def of(self, path: str) -> list[str] | None:
        """The captions of the image at ``path``; None if there is no row for it."""
        name = self.find(path)
        return self.rows[name].captions if name else None


class _Unusable(LeftOutRows):
    """Appends unusable entries to ``bad``, except missing captions, which are allowed."""

    def __init__(self, bad: list[str]) -> None:
        super().__init__()
        self._bad = bad

    def note(self, reason: str, example: str) -> None:
        if reason != "no_caption":
            self._bad.append(f"{example}: {reason}")


def has_captions(path: Path) -> bool:
    """Whether the first row of the file contains a name and a caption."""
    try:
        row = next(open_list(path, "a file of captions").rows(), None)
    except ConfigError:
        return False
    return row is not None and _texts_in(row.values, _name_in(row.values)) is not None


def _name_in(values: Row) -> str:
    """The column with the image's name; empty if there is none."""
    lower = {column.lower(): column for column in values if isinstance(column, str)}
    named = (lower[name] for name in NAME_COLUMNS if name in lower)
    numbered = (column for column in values if isinstance(column, str) and column.isdigit())
    return next((column for column in (*named, *numbered) if isinstance(values[column], str) and values[column]), "")


def _texts_in(values: Row, name: str) -> list[str] | None:
    """The captions in a row, empty if they are null; None if the row has no caption column or no name."""
    if not name:
        return None
    columns = [column for column in caption_columns(values) if column != name]
    if not columns and name.isdigit():  # without a header: the column after the name
        columns = [column for column in values if column.isdigit() and int(column) > int(name)][:1]
    if not columns:
        return None
    return next(filter(None, (captions_of(values[column]) for column in columns)), [])
