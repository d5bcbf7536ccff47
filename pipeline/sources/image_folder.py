"""A folder of images, nested to any depth: ``<class>/…/<name>.<ext>``, with captions next to them or in one file.

Captions (``captions=``): ``txt`` is the first line of ``<name>.txt`` (or ``.caption``, ``.text``); ``folder`` is the
name of the image's folder; a file (``captions.json``, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet``, or
``metadata.csv`` and similar names as in the Hugging Face library) maps file names to one or more captions, as do, if
the setting names them, a ``.txt`` with two columns and annotation files of COCO, TextCaps or Flickr30k; ``auto`` uses
the first of these that exists for an image. An empty ``<name>.txt`` or a null in a file means no caption.
If all images are in folders, the top-level folder is the class and determines the label.

Links to folders are followed. Hidden and system files are left out. Other files that are not used (unsupported image
formats, texts and rows without an image, and so on) are counted in the plan.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline import stores
from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input, LeftOut, Partition, file_state, stamp
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import (
    IMAGE_COLUMNS,
    Outcome,
    Schema,
    caption_fields,
    content_hash,
    image_format,
    make_key,
    path_text,
    real_path,
)
from pipeline.sources.base import Source
from pipeline.sources.caption_files import CaptionFile, has_captions, normalised
from pipeline.sources.clutter import TEXTS, is_clutter, is_unread
from pipeline.sources.recognition import explained
from pipeline.sources.text_files import small_text, suffix_of
from pipeline.storage import GONE

_AHEAD = 8
"""Files that are opened ahead of reading."""
_CAPTION_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".ndjson", ".parquet")
_CAPTION_NAMES = ("captions", "metadata")
"""Suffixes and names of a caption file in the folder, in order of precedence; the Hugging Face library uses
``metadata``."""
_TEXT = 1 << 16
"""Bytes that are read of a text next to an image."""
_FEW = 0.5
"""Fraction of rows or images without a counterpart above which a warning is due."""


@sources.register("image_folder")
class ImageFolder(Source):
    """All files below ``input`` with an image extension; they are copied only with ``copy=true``."""

    rechecks = True

    @cached_property
    def root(self) -> Path:
        if not self.config.input:
            raise ConfigError("source=image_folder needs input=<folder with images>")
        root = Path(self.config.input).absolute()
        if stores.is_url(self.config.input):
            raise ConfigError(
                f"input={self.config.input}: source=image_folder reads folders of this machine; in a store, read "
                "archives (source=webdataset), or a list of the images' addresses (source=url_list)"
            )
        if not root.is_dir():
            if not root.is_file():
                raise ConfigError(f"input={self.config.input}: no such folder")
            with explained(root, "it"):
                raise ConfigError(f"input={self.config.input}: a file, but source=image_folder reads a folder")
        return root

    @cached_property
    def _prefix(self) -> str:
        return str(self.root)

    @property
    def format(self) -> str:  # type: ignore[override]
        return "tar" if self.config.copy else "reference"

    def origin(self) -> str:
        return "" if self.config.copy else str(self.root)

    def schema(self) -> Schema:
        return {**IMAGE_COLUMNS, "label": "int"} if self.classes else dict(IMAGE_COLUMNS)

    @cached_property
    def classes(self) -> list[str]:
        """Sorted names of the top-level folders, indexed by label; empty if there are images outside folders."""
        home = _identity(os.stat(self.root))
        entries = sorted((e for e in os.scandir(self.root) if not is_clutter(e.name)), key=lambda e: e.name)
        if any(image_format(e.name) and not _is_folder(e) for e in entries):
            return []
        return [path_text(e.name) for e in entries if _is_folder(e) and _identity(e.stat()) != home]

    def extra(self) -> dict[str, Any]:
        return {"classes": self.classes} if self.classes else {}

    def watched(self) -> dict[str, str]:
        return {self._caption_path.name: file_state(self._caption_path)} if self._caption_path else {}

    # ---- planning

    def plan(self) -> Iterator[Partition]:
        self.left_out.clear()
        group: list[Input] = []
        matches = _Matches(self._caption_file)
        known = {name for name in self._caption_names if self.root / name == self._caption_path}
        for found in walk(self.root, self.left_out, texts=self.config.captions in ("auto", "txt"), known=known):
            group.append(Input(path_text(found.path), size=found.size, mtime_ns=found.mtime_ns, etag=found.text))
            matches.add(found.path, self._row_of(found.path))
            if len(group) == self.config.partition_size:
                yield Partition(tuple(group), len(group))
                group = []
        if group:
            yield Partition(tuple(group), len(group))
        matches.judge(self.left_out)

    def changed(self, file: Input) -> bool:
        try:
            state = os.stat(os.path.join(self._prefix, real_path(file.path)))
        except OSError:
            return True
        return (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns)

    # ---- reading samples

    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        only = partition.only
        wanted = (file for file in partition.inputs if only is None or partition.wants(make_key(file.path)))
        labels = {name: number for number, name in enumerate(context.extra.get("classes", []))}
        for file, opened in self._ahead(wanted):
            outcome = self._take(file, opened)
            if labels and outcome.row is not None:
                outcome.row["label"] = labels[file.path.partition("/")[0]]
            yield outcome

    def _ahead(self, files: Iterable[Input]) -> Iterator[tuple[Input, FileIO | OSError]]:
        """Yield each file, opened in advance so that the system can read ahead."""
        waiting: deque[tuple[Input, FileIO | OSError]] = deque()
        try:
            for file in files:
                waiting.append((file, self._opened(file)))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, opened in waiting:
                if isinstance(opened, FileIO):
                    opened.close()

    def _opened(self, file: Input) -> FileIO | OSError:
        try:
            opened = FileIO(os.path.join(self._prefix, real_path(file.path)), opener=_open_at_once)
        except OSError as error:
            return error
        with suppress(OSError):  # for what is not a file
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return opened

    def _take(self, file: Input, opened: FileIO | OSError) -> Outcome:
        outcome = Outcome(make_key(file.path), "failed", source=file.path, source_bytes=file.size)
        try:
            if isinstance(opened, OSError):
                raise opened
            with opened:
                state = os.fstat(opened.fileno())
                if not stat.S_ISREG(state.st_mode):
                    outcome.reason = "not_regular"
                    return outcome
                if file.size > self.config.max_member_bytes:
                    outcome.reason, outcome.detail = "too_many_bytes", f"{file.size} bytes"
                    return outcome
                data = opened.read()
        except OSError as error:
            outcome.reason = "missing" if error.errno in GONE else "unreadable"
            outcome.detail, outcome.retryable = error.strerror or "", True
            return outcome
        if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns) or len(data) != file.size:
            outcome.reason, outcome.detail = "changed_since_plan", "size or time of change differ from the plan"
            return outcome
        outcome.status = "kept"
        outcome.source_hash = content_hash(data)
        outcome.row = self._row(file.path, data, outcome)
        return outcome

    def _row(self, path: str, data: bytes, outcome: Outcome) -> dict[str, Any]:
        row: dict[str, Any] = {
            "key": outcome.key,
            "jpg": data if self.config.copy else b"",
            "format": image_format(path),
            **caption_fields(self.captions_of(path)),
            "path": path,
            "hash": outcome.source_hash,
        }
        return row

    # ---- captions

    @cached_property
    def _caption_path(self) -> Path | None:
        """The caption file that the setting names, or the one in the folder; None if there is none."""
        setting = self.config.captions
        if setting in ("txt", "folder", "none"):
            return None
        if setting != "auto":
            path = Path(setting)
            path = path if path.is_absolute() or path.is_file() else self.root / setting
            if not path.is_file():
                raise ConfigError(f"captions={setting}: expected auto, txt, folder, none or an existing file")
            return path
        return self.root / self._caption_names[0] if self._caption_names else None

    @cached_property
    def _caption_names(self) -> list[str]:
        """Files in the folder that may hold captions, in order of precedence."""
        names = sorted(os.listdir(self.root))
        return [
            name
            for kind in _CAPTION_NAMES
            for suffix in _CAPTION_SUFFIXES
            for name in names
            if name.lower().startswith(f"{kind}{suffix}") and suffix_of(name) == suffix
            if kind == "captions" or (suffix != ".json" and has_captions(self.root / name))
        ]

    @cached_property
    def _caption_file(self) -> CaptionFile | None:
        return CaptionFile(self._caption_path) if self._caption_path else None

    @cached_property
    def _owned(self) -> dict[str, bool]:
        """Whether the image that a row names exists, by the row's name."""
        return {}

    def _row_of(self, path: str) -> str:
        """The row for the image at ``path``; empty if there is none or it names another existing image."""
        if not self._caption_file:
            return ""
        name = self._caption_file.find(path)
        if not name or name == normalised(path):
            return name
        if name not in self._owned:
            written = self._caption_file.rows[name].name
            self._owned[name] = any((self.root / text).is_file() for text in {name, written} if "\0" not in text)
        return "" if self._owned[name] else name

    def captions_of(self, path: str) -> list[str]:
        """The captions of the image at ``path``, according to ``captions=``; empty if there are none."""
        setting = self.config.captions
        if setting in ("auto", "txt"):
            text = self._beside(path)
            if text is not None:
                return [text]
        if self._caption_file and (name := self._row_of(real_path(path))):
            return self._caption_file.rows[name].captions
        folder = path.rpartition("/")[0].rpartition("/")[2]
        return [folder] if setting in ("auto", "folder") and folder else []

    def _beside(self, path: str) -> str | None:
        """The first line of the text next to the image at ``path``; None if there is no such file."""
        for suffix in (f".{text}" for kind in TEXTS for text in (kind, kind.upper())):
            with (
                suppress(OSError),
                open((self.root / real_path(path)).with_suffix(suffix), "rb", opener=_open_at_once) as file,
            ):
                return _first_line(file.read(_TEXT))
        return None


def _first_line(data: bytes) -> str:
    """The first line of a text, ignoring leading blank lines."""
    lines = small_text(data).splitlines()
    return lines[0].strip() if lines else ""


class _Matches:
    """Records which rows of a caption file match an image."""

    def __init__(self, file: CaptionFile | None) -> None:
        self._file = file
        self._images: dict[str, str] = {}
        self._without = 0
        self._first = ""
        self._shared: dict[str, str] = {}

    def add(self, path: str, row: str) -> None:
        """Record the row of the image at ``path``; empty if it has none."""
        self._first = self._first or path
        if not row:
            self._without += 1
        elif row in self._images:
            self._shared.setdefault(row, f"{row} for {self._images[row]} and {path}")
        else:
            self._images[row] = path

    def judge(self, left_out: LeftOut) -> None:
        """Count rows without an image and other problems in ``left_out``.

        Raises:
            ConfigError: no row matches an image.
        """
        file = self._file
        if file is None:
            return
        left_out.add("bad_caption_row", *file.bad)
        broken = (row for row in file.rows.values() if any("\ufffd" in caption for caption in row.captions))
        left_out.add("caption_not_in_utf8", *(f"line {row.line}: {row.captions[0][:80]}" for row in broken))
        others = [row for name, row in file.rows.items() if name not in self._images]
        if self._first and not self._images:
            row = others[0]
            place = f"line {row.line}" if row.line else "the first"
            with explained(file.path, reads=file.reads):
                raise ConfigError(
                    f"captions={file.path}: none of its {len(file.rows)} rows names an image in this folder: "
                    f"{place} names {row.name[:200]!r}, an image is {self._first[:200]!r}"
                )
        left_out.add("caption_row_without_image", *(f"line {r.line}: {r.name}" if r.line else r.name for r in others))
        left_out.add("caption_row_of_several_images", *self._shared.values())


def _open_at_once(path: str, flags: int) -> int:
    """Open without blocking, so that a named pipe without a writer does not hang the process."""
    return os.open(path, flags | os.O_NONBLOCK)


@dataclass(frozen=True, slots=True)
class Found:
    """An image file below a folder; ``text`` is the state of the text next to it, empty if there is none."""

    path: str
    size: int
    mtime_ns: int
    text: str = ""


@dataclass(slots=True)
class _Folder:
    """A folder to be listed, and the folders above it, to detect cyclic links."""

    path: str
    above: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def walk(
    root: Path, left_out: LeftOut | None = None, *, texts: bool = False, known: Collection[str] = ()
) -> Iterator[Found]:
    """Yield the image files below ``root``, with relative paths, in byte order folder by folder.

    Args:
        left_out: counts files that look like data but are not used.
        texts: look for a text next to each image.
        known: further files in ``root`` that are used.
    """
    left_out = LeftOut() if left_out is None else left_out
    pending = [_Folder("")]
    while pending:
        folder = pending.pop()
        try:
            here = _identity(os.stat(root / folder.path))
            entries = sorted(os.scandir(root / folder.path), key=lambda e: os.fsencode(e.name))
        except OSError as error:
            if not folder.path:
                raise
            left_out.add("unreadable_folder", f"{path_text(folder.path)}: {error.strerror}")
            continue
        if here in folder.above:
            left_out.add("link_in_a_circle", path_text(folder.path))
            continue
        below = []
        beside = _texts(entries) if texts else {}
        for entry in entries:
            path = f"{folder.path}/{entry.name}" if folder.path else entry.name
            if is_clutter(entry.name):
                left_out.add("clutter", *([path_text(path)] if image_format(entry.name) or _is_folder(entry) else ()))
            elif _is_folder(entry):
                below.append(_Folder(path, folder.above | {here}))
            elif image_format(entry.name):
                yield _found(path, entry, beside.pop(_stem(entry.name), None))
            elif is_unread(entry.name):
                left_out.add("unread_image_format", path_text(path))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                left_out.add("link_to_nowhere", path_text(path))
            elif path not in known and not _is_text(entry):
                left_out.add("other_file", path_text(path))
        left_out.add("text_without_image", *(path_text(f"{folder.path}/{e.name}".lstrip("/")) for e in beside.values()))
        pending += reversed(below)


def _is_text(entry: os.DirEntry[str]) -> bool:
    return entry.name.rpartition(".")[2].lower() in TEXTS


def _texts(entries: list[os.DirEntry[str]]) -> dict[str, os.DirEntry[str]]:
    """The texts in a folder, by stem."""
    best = sorted(filter(_is_text, entries), key=lambda e: -TEXTS.index(e.name.rpartition(".")[2].lower()))
    return {_stem(entry.name): entry for entry in best}


def _found(path: str, entry: os.DirEntry[str], text: os.DirEntry[str] | None) -> Found:
    try:
        state = entry.stat()
    except OSError:  # a broken link: it is planned, and fails when it is read
        state = entry.stat(follow_symlinks=False)
    return Found(path, state.st_size, state.st_mtime_ns, f"txt {stamp(text.path)}" if text else "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino
