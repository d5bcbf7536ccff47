"""A folder of images, nested as it likes: ``<class>/…/<name>.<ext>``, captions beside them or in one file.

Captions (``captions=``): ``txt`` is the first line of ``<name>.txt``; ``folder`` the name of the image's folder; a file
``captions.json``, ``.jsonl`` or ``.csv`` maps file names to one or several captions; ``auto`` takes the first of these
that is there for an image. Where all images lie in folders, the top folder is the class and gives the label.
"""

from __future__ import annotations

import csv
import json
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.partitions.plan import Input, Partition
from pipeline.samples import (
    FORMATS,
    IMAGE_COLUMNS,
    Outcome,
    Schema,
    caption_fields,
    content_hash,
    make_key,
    path_text,
    real_path,
)
from pipeline.sources.base import Source
from pipeline.storage import GONE

_AHEAD = 8
"""Files that are open before they are read."""
_NAME_COLUMNS = ("file_name", "filename", "image", "path", "file", "key")
_CAPTION_COLUMNS = ("captions", "caption", "text", "sentences")
_CAPTION_FILES = ("captions.json", "captions.jsonl", "captions.csv")


class ImageFolder(Source):
    """Every file below ``input`` whose extension says image; nothing is copied unless ``copy=true``."""

    rechecks = True

    @cached_property
    def root(self) -> Path:
        if not self.config.input:
            raise ConfigError("source=image_folder needs input=<folder with images>")
        root = Path(self.config.input).absolute()
        if not root.is_dir():
            raise ConfigError(f"input={self.config.input}: no such folder")
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
        """Names of the top folders in order, the label being the index; none if images lie outside of folders."""
        entries = sorted(os.scandir(self.root), key=lambda e: e.name)
        if any(e.is_file() and _format(e.name) for e in entries):
            return []
        return [path_text(e.name) for e in entries if e.is_dir()]

    def extra(self) -> dict[str, Any]:
        return {"classes": self.classes} if self.classes else {}

    # ---- planning

    def plan(self) -> Iterator[Partition]:
        if self.config.partition_size < 1:
            raise ConfigError(f"partition_size={self.config.partition_size}: must be at least 1")
        group: list[Input] = []
        for path, state in walk(self.root):
            group.append(Input(path_text(path), size=state.st_size, mtime_ns=state.st_mtime_ns))
            if len(group) == self.config.partition_size:
                yield Partition(tuple(group), len(group))
                group = []
        if group:
            yield Partition(tuple(group), len(group))

    # ---- bringing in

    def samples(self, partition: Partition) -> Iterator[Outcome]:
        only = partition.only
        wanted = (file for file in partition.inputs if only is None or partition.wants(make_key(file.path)))
        for file, opened in self._ahead(wanted):
            yield self._take(file, opened)

    def _ahead(self, files: Iterable[Input]) -> Iterator[tuple[Input, FileIO | OSError]]:
        """Each file, opened some files before it is read, so that the system can fetch its bytes meanwhile."""
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
        with suppress(OSError):  # of what is no file
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
            "format": _format(path),
            **caption_fields(self.captions_of(path)),
            "path": path,
            "hash": outcome.source_hash,
        }
        classes = self.planned.get("classes", [])
        if classes:
            row["label"] = classes.index(path.partition("/")[0])
        return row

    # ---- captions

    @cached_property
    def _caption_file(self) -> dict[str, list[str]]:
        """Captions by file name, from the file that the setting names or that lies in the folder."""
        setting = self.config.captions
        if setting in ("txt", "folder", "none"):
            return {}
        if setting != "auto":
            path = Path(setting)
            path = path if path.is_absolute() or path.is_file() else self.root / setting
            if not path.is_file():
                raise ConfigError(f"captions={setting}: expected auto, txt, folder, none or an existing file")
            return read_captions(path)
        found = [self.root / name for name in _CAPTION_FILES if (self.root / name).is_file()]
        return read_captions(found[0]) if found else {}

    def captions_of(self, path: str) -> list[str]:
        """The captions of the image at ``path``, by the setting ``captions``; empty if there are none."""
        setting = self.config.captions
        if setting in ("auto", "txt"):
            text = self.root / Path(real_path(path)).with_suffix(".txt")
            try:
                with open(text, "rb", opener=_open_at_once) as file:
                    lines = file.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
                if lines:
                    return [lines[0].strip()]
            except OSError:
                pass
        listed = self._caption_file.get(path) or self._caption_file.get(path.rpartition("/")[2])
        if listed:
            return listed
        folder = path.rpartition("/")[0].rpartition("/")[2]
        return [folder] if setting in ("auto", "folder") and folder else []


def _open_at_once(path: str, flags: int) -> int:
    """A pipe must not make us wait for somebody who writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Paths of the image files below ``root``, relative to it, in byte order folder by folder, with their state."""
    pending = [""]
    while pending:
        folder = pending.pop()
        below = []
        with os.scandir(root / folder) as entries:
            for entry in sorted(entries, key=lambda e: os.fsencode(e.name)):
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    below.append(path)
                elif _format(entry.name):
                    try:
                        yield path, entry.stat()
                    except OSError:  # a link to nowhere: planned as it is, and failed when it is read
                        yield path, entry.stat(follow_symlinks=False)
        pending += reversed(below)


def _format(name: str) -> str:
    """The image format that a file's extension promises; empty if none."""
    return FORMATS.get(name.rpartition(".")[2].lower(), "") if "." in name else ""


def read_captions(path: Path) -> dict[str, list[str]]:
    """File name → captions, from ``.json`` (a mapping, or a list of objects), ``.jsonl`` or ``.csv``.

    Raises:
        ConfigError: the file is none of these, or has no column for the name or the caption.
    """
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return _from_rows(path, csv.DictReader(file))
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                return _from_rows(path, (json.loads(line) for line in file if line.strip()))
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"captions={path}: cannot be read: {error}") from None
    if isinstance(value, dict):
        return {str(name): _texts(captions) for name, captions in value.items()}
    return _from_rows(path, value)


def _from_rows(path: Path, rows: Any) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for row in rows:
        name = next((row[c] for c in _NAME_COLUMNS if row.get(c)), None) if isinstance(row, dict) else None
        texts = next((row[c] for c in _CAPTION_COLUMNS if c in row), None) if name else None
        if name is None or texts is None:
            raise ConfigError(
                f"captions={path}: a row needs a name ({', '.join(_NAME_COLUMNS)}) "
                f"and a caption ({', '.join(_CAPTION_COLUMNS)})"
            )
        captions.setdefault(str(name), []).extend(_texts(texts))
    return captions


def _texts(value: Any) -> list[str]:
    return [str(text) for text in value] if isinstance(value, list) else [str(value)]


SOURCE = ImageFolder
