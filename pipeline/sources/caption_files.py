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
    """A file's name as it is compared: NFC, with slashes, without a drive or anything that means "here".

    Flickr8k and Flickr30k have ``a.jpg#0``, ``a.jpg#1``, ...: the captions of one image.
    """
    name = unicodedata.normalize("NFC", repaired(name)).replace("\\", "/")
    return re.sub(r"^([A-Za-z]:)?(\.?/)+|(?<=\w)#\d+$", "", name)


@dataclass(slots=True)
class Named:
    """What a file says of one image; ``line`` is where."""

    name: str
    captions: list[str] = field(default_factory=list)
    line: int = 0


class CaptionFile:
    """The captions in a ``.json``, ``.jsonl``, ``.csv``, ``.tsv``, ``.txt`` or ``.parquet`` file, packed or not.

    JSON is a mapping of names to captions, or a list of objects; an object or a row has a name and a caption. The
    annotation files of COCO, TextCaps and Flickr30k are read as they are.

    Attributes:
        bad: what is wrong with rows that could not be used, with their lines.
        reads: what the file is understood as, for :func:`~pipeline.sources.recognition.explained`.

    Raises:
        ConfigError: it is none of these, there are no columns for name and caption, or most rows cannot be used.
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
        """Ends of a row's name under which an image may be found; an empty name where several rows have one end."""
        parts = name.split("/")
        for count in range(1, min(len(parts), 3) + 1):
            end = "/".join(parts[-count:]).casefold()
            self._ends[end] = "" if end in self._ends else name
        if not image_format(name):
            for stem in {name.casefold(), parts[-1].casefold()}:
                self._stems[stem] = "" if stem in self._stems else name

    def _annotated(self, layout: str) -> Iterator[Named]:
        """What a published file of annotations says."""
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
        """Whether rows with these columns can have both."""
        values = dict.fromkeys(columns, "x.jpg")
        name = _name_in(values)
        return _texts_in(values, name) is not None

    def find(self, path: str) -> str:
        """The name of the row about the image at ``path``; empty if there is none, or it is not clear which.

        In this order: the same path; its end (``b.jpg`` is about any ``a/b.jpg``); the only row with the same end, of
        up to three parts, whatever the folder before it and whatever the case; the only one with this name without an
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
        """The captions of the image at ``path``; None if no row is about it."""
        name = self.find(path)
        return self.rows[name].captions if name else None


class _Unusable(LeftOutRows):
    """Notes entries that could not be used in ``bad``; a null caption only says that there is none."""

    def __init__(self, bad: list[str]) -> None:
        super().__init__()
        self._bad = bad

    def note(self, reason: str, example: str) -> None:
        if reason != "no_caption":
            self._bad.append(f"{example}: {reason}")


def has_captions(path: Path) -> bool:
    """Whether the first row of a file has a name and a caption."""
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
    """The captions in a row, empty where they are null; None where it has no column for them, or no name."""
    if not name:
        return None
    columns = [column for column in caption_columns(values) if column != name]
    if not columns and name.isdigit():  # without a heading: whatever comes after the name
        columns = [column for column in values if column.isdigit() and int(column) > int(name)][:1]
    if not columns:
        return None
    return next(filter(None, (captions_of(values[column]) for column in columns)), [])
