"""Captions and fields in separate files, read once into a table on disk and looked up by image name.

A reader turns one published layout into pairs ``(image name, Entry)``; the keys of :data:`READERS` are the values of
``annotations=``. The table is an SQLite file in ``<output>/tables``, so memory use does not depend on its size.
"""

from __future__ import annotations

import io
import json
import re
import sqlite3
import tarfile
import uuid
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import xxhash

from pipeline.config.schema import ConfigError, SourceConfig, public
from pipeline.samples import SampleError, Schema, content_hash, in_words, plain
from pipeline.samples.captions import captions_of, shown_counts, shown_names
from pipeline.sources.archives import members
from pipeline.sources.archives.compression import unpacked
from pipeline.sources.clutter import in_clutter
from pipeline.sources.lists import batch_rows, parquet_file
from pipeline.sources.recognition import explained, kind_of
from pipeline.sources.separated import separated
from pipeline.sources.text_files import Lines, open_text, skip, small_text

_MOST = 1 << 40  # maximum bytes of a file with annotations, unpacked
_LARGEST = 4 << 30  # maximum bytes of a JSON document
_SMALL = 1 << 16  # bytes read of a file that holds one caption
_BATCH = 10_000
_VALUES = 1000  # of a column of splits that are counted


@dataclass(frozen=True, slots=True)
class Entry:
    """Captions and fields of an image; ``dropped`` is the reason why it is dropped, empty if it is not."""

    captions: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    label: int | None = None
    dropped: str = ""


Found = Iterator[tuple[str, Entry]]


class LeftOutRows(Counter[str]):
    """Number of unusable entries of a file by reason, and a description of the first one."""

    first: str = ""

    def note(self, reason: str, example: str) -> None:
        self[reason] += 1
        self.first = self.first or f"{reason}: {example}"


Reader = Callable[[IO[bytes], SourceConfig, LeftOutRows], Found]


# ---- one reader for each published layout


def _jdb(file: IO[bytes], config: SourceConfig, left_out: LeftOutRows) -> Found:
    """JourneyDB: JSON lines in a tgz, ``img_path`` and ``prompt``."""
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, prompt = row["img_path"], row.get("prompt")
            task = row.get("Task2")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            left_out.note("bad_row", f"line {number}")
            continue
        if name := _name(name, f"line {number}", left_out):
            more = captions_of(task.get("Caption")) if isinstance(task, dict) else []
            if captions := _noted(prompt, f"line {number}", left_out):
                yield name, Entry(captions, {"caption_gpt": more[0]} if more else {})


def _diffusiondb(file: IO[bytes], config: SourceConfig, left_out: LeftOutRows) -> Found:
    """DiffusionDB: one Parquet file with prompts, settings and two NSFW scores in 0..1 (2: the image is blurred)."""
    fields = ("image_name", "prompt", "image_nsfw", "prompt_nsfw", "seed", "step", "cfg", "sampler", "part_id")
    parquet = parquet_file(file)
    columns = [name for name in fields if name in parquet.schema_arrow.names]
    if "image_name" not in columns:
        raise ConfigError(f"no column image_name; there are {shown_names(parquet.schema_arrow.names)}")
    number = 0
    for batch in parquet.iter_batches(_BATCH, columns=columns):
        for listed in batch_rows(batch):
            number += 1
            row, place = listed.values, f"row {number}"
            if listed.error:
                left_out.note("bad_row", f"{place}: {listed.error}")
                continue
            name, prompt = row.pop("image_name"), row.pop("prompt", None)
            scores = [row.get("image_nsfw"), row.get("prompt_nsfw")]
            unsafe = any(isinstance(score, int | float) and score > config.max_nsfw for score in scores)
            if name := _name(name, place, left_out):
                captions = _noted(prompt, place, left_out)
                yield name, Entry(captions, plain(row), dropped="nsfw" if unsafe else "")


def _coco(file: IO[bytes], config: SourceConfig, left_out: LeftOutRows) -> Found:
    """COCO: a JSON document with ``images`` and ``annotations``, as a file or as ``metadata_member`` of a zip."""
    document = _object(file, config, "images", "annotations")
    captions: dict[Any, list[str]] = defaultdict(list)
    for number, note in enumerate(document["annotations"]):
        place = f"annotations[{number}]"
        if not isinstance(note, dict) or not isinstance(note.get("image_id"), int | str):
            left_out.note("bad_row", place)
            continue
        captions[note["image_id"]] += [text.strip() for text in _noted(note.get("caption"), place, left_out)]
    if captions and not any(captions.values()):
        first = next(note for note in document["annotations"] if isinstance(note, dict))
        raise ConfigError(
            f"none of its {len(document['annotations'])} annotations has a caption; they have {shown_names(first)}"
        )
    for number, image in enumerate(document["images"]):
        place = f"images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
            left_out.note("bad_row", place)
        elif name := _name(image.get("file_name"), place, left_out):
            yield name, Entry(captions[image["id"]], {"image_id": image["id"]})


def _textcaps(file: IO[bytes], config: SourceConfig, left_out: LeftOutRows) -> Found:
    """TextCaps: a JSON document whose ``data`` is a list with ``image_id`` and ``reference_strs``, one row per caption
    or per image."""
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(_object(file, config, "data")["data"]):
        place = f"data[{number}]"
        if not isinstance(row, dict):
            left_out.note("bad_row", place)
        elif name := _name(row.get("image_id"), place, left_out):
            texts = _noted(row.get("reference_strs") or row.get("caption_str"), place, left_out)
            known = captions.setdefault(name, [])
            known += [text for text in texts if text not in known]
    for name, texts in captions.items():
        if texts:
            yield name, Entry(texts, {"image_id": name})


def _flickr30k(file: IO[bytes], config: SourceConfig, left_out: LeftOutRows) -> Found:
    """Flickr30k: CSV with ``raw`` (a JSON list of captions), ``filename`` and Karpathy's ``split``; without
    ``metadata_split=``, all splits are read."""
    stream, mark = open_text(file)
    skip(stream, mark)
    lines = Lines(stream)
    rows = separated(lines, ",")
    _, names = next(rows, (0, list[str]()))
    if missing := [name for name in ("raw", "filename", "split") if name not in names]:
        raise ConfigError(f"no column {', '.join(missing)}; there are {shown_names(names)}")
    others: Counter[str] = Counter()
    matched = False
    for number, fields in rows:
        row, place = dict(zip(names, fields, strict=False)), f"line {number}"
        if len(fields) != len(names):
            left_out.note("bad_row", f"{place}: {len(fields)} fields instead of {len(names)}")
            continue
        if config.metadata_split not in ("", row["split"]):
            others[row["split"] if row["split"] in others or len(others) < _VALUES else "..."] += 1
            continue
        matched = True
        try:
            raw = json.loads(row["raw"])
        except (ValueError, RecursionError):
            left_out.note("bad_row", f"{place}: raw is not JSON")
            continue
        name = _name(row["filename"], place, left_out)
        captions = [text.strip() for text in _noted(raw, place, left_out)] if name else []
        if captions:
            yield name, Entry(captions, {"image_id": row.get("img_id", "")})
    if others and not matched:
        raise ConfigError(f"metadata_split={config.metadata_split}: no row has this split; {shown_counts(others)}")


def _name(value: Any, place: str, left_out: LeftOutRows) -> str:
    """``value`` if it is a name; otherwise, count it as ``no_image_name`` and return an empty string."""
    if not isinstance(value, str) or not value.strip():
        left_out.note("no_image_name", place)
        return ""
    return value


def _noted(value: Any, place: str, left_out: LeftOutRows) -> list[str]:
    """The captions in ``value``; count it as ``no_caption`` if an item of ``value`` is not a caption."""
    captions = captions_of(value)
    if len(captions) < (len(value) if isinstance(value, list) else 1):
        left_out.note("no_caption", place)
    return captions


def _texts(file: IO[bytes], config: SourceConfig, left_out: LeftOutRows) -> Found:
    """An archive of ``<image name>.txt`` files, the layout of SAM-LLaVA's captions."""

    def wants(name: str, size: int) -> int | None:
        return min(size, _SMALL) if name.endswith(".txt") and not in_clutter(name) else None

    for member in members(file, 2**62, wants):
        if member.error:
            left_out.note(member.error.reason, member.name)
            continue
        stem = member.name.rpartition("/")[2].removesuffix(".txt")
        yield stem, Entry(_noted(small_text(member.data), member.name, left_out))


def _imagenet(file: IO[bytes], config: SourceConfig, left_out: LeftOutRows) -> Found:
    """ImageNet's devkit, for the validation images: their class numbers and the WordNet ids of the classes.

    The label is the position of the WordNet id in the sorted list of all ids, as in the training set.
    """
    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")

    def wants(name: str, size: int) -> int | None:
        return min(size, _LARGEST) if name.rpartition("/")[2] in wanted else None

    found = {member.name.rpartition("/")[2]: member.data for member in members(file, 1_000_000, wants)}
    if missing := [name for name in wanted if name not in found]:
        raise ConfigError(f"no {' and no '.join(missing)} in it, as ImageNet's devkit has")
    names = synset_names(io.BytesIO(found["meta.mat"]))
    numbers = [int(number) for number in found["ILSVRC2012_validation_ground_truth.txt"].split()]
    places = {name: place for place, name in enumerate(sorted(names[number] for number in set(numbers)))}
    for image, number in enumerate(numbers, 1):
        yield f"ILSVRC2012_val_{image:08d}.JPEG", Entry([names[number]], label=places[names[number]])


def synset_names(meta: IO[bytes] | Path) -> dict[int, str]:
    """Return the WordNet id of each class number, from ``meta.mat`` of ImageNet's devkit."""
    from scipy.io import loadmat

    synsets = loadmat(meta, squeeze_me=True)["synsets"]
    return {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}


READERS: dict[str, Reader] = {
    "imagenet": _imagenet,
    "jdb": _jdb,
    "diffusiondb": _diffusiondb,
    "coco": _coco,
    "textcaps": _textcaps,
    "flickr30k": _flickr30k,
    "texts": _texts,
}


def _caltech256(name: str) -> Entry | None:
    """``…/012.binoculars/012_0001.jpg``: the folder is the class, and its number minus 1 the label.

    Class 257 is Caltech's "clutter".
    """
    found = re.search(r"(?:^|/)(\d{3})\.([^/]+)/[^/]+$", name)
    if not found:
        return None
    return Entry([re.sub(r"-101$", "", found[2]).replace("-", " ")], label=int(found[1]) - 1)


def _folders(name: str) -> Entry | None:
    """The name of the image's folder is the caption."""
    folder = name.rpartition("/")[0].rpartition("/")[2]
    return Entry([folder]) if folder else None


def _archives(name: str) -> Entry | None:
    """Always None: :meth:`Annotations.enter` sets the entry that all images of an archive share."""
    return None


LAYOUTS: dict[str, tuple[Callable[[str], Entry | None], Schema]] = {
    "caltech256": (_caltech256, {"label": "int"}),
    "folders": (_folders, {}),
    "archives": (_archives, {"label": "int"}),
}
"""Layouts in which the image's name determines its entry, and the columns that they add."""


# ---- helpers that read files


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of ``file``, or of its first member if it is a tar; compression is removed."""
    stream = unpacked(file, _MOST)
    start = stream.peek(512)[:512] if hasattr(stream, "peek") else file.read(512)
    if stream is file:
        file.seek(0)
    if start[257:262] != b"ustar":
        yield from stream
        return
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            inside = archive.extractfile(member) if member.isreg() else None
            if inside:
                yield from inside
                return


def _object(file: IO[bytes], config: SourceConfig, *lists: str) -> dict[str, Any]:
    """The JSON object in a file or in a member of an archive; it must contain ``lists``.

    Raises:
        ConfigError: it is not an object, or one of ``lists`` is missing.
    """
    try:
        document = json.loads(_document(file, config.metadata_member))
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    if not isinstance(document, dict):
        raise ConfigError(f"expected an object with {' and '.join(lists)}, but it is a {type(document).__name__}")
    for name in lists:
        if not isinstance(document.get(name), list):
            raise ConfigError(f"no list {name!r} in it; it has {shown_names(document)}")
    return document


def _document(file: IO[bytes], member: str) -> bytes:
    """The content of a JSON file, or of ``member`` of an archive (empty: of its first ``.json`` file).

    Raises:
        ConfigError: there is no such member.
    """
    stream, mark = open_text(file)
    skip(stream, mark)
    start = stream.peek(1)[:64].lstrip() if hasattr(stream, "peek") else stream.read(64).lstrip()
    if start[:1] in (b"{", b"["):
        if not hasattr(stream, "peek"):
            stream.seek(mark)
        return stream.read(_LARGEST)
    wanted = member or ".json"
    for found in members(file, 1_000_000, lambda name, size: min(size, _LARGEST) if name.endswith(wanted) else None):
        if not found.error:
            return found.data
    raise ConfigError(f"metadata: no member {member or '*.json'} in it")


# ---- the table


class Annotations:
    """Looks up the captions and fields of a dataset's images by image name."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._read = READERS.get(config.annotations)
        layout = LAYOUTS.get(config.annotations)
        self._layout = layout[0] if layout else None
        own = layout[1] if layout else {}
        self.columns: Schema = {"meta": "json", **own, **({"label": "int"} if config.labels else {})}
        self.listed_only = config.listed_only
        self.extra: dict[str, Any] = {}
        self._table: sqlite3.Connection | None = None
        self._shared: Entry | None = None

    def enter(self, archive: str, classes: list[str]) -> None:
        """Start reading ``archive``: with ``annotations=archives``, its index in ``classes`` is the label."""
        if self._config.annotations == "archives":
            name = archive_class(archive)
            self._shared = Entry([name], label=classes.index(name))

    def _place(self, home: Path) -> Path:
        config = self._config
        said = [config.annotations, public(config.metadata), config.metadata_member, config.metadata_split]
        said += [config.max_nsfw, config.repo, config.revision]
        return home / "tables" / f"{content_hash(json.dumps(said).encode())}.sqlite"

    def prepare(self, home: Path, files: Iterable[tuple[str, IO[bytes]]]) -> None:
        """Read the files into the table unless it exists."""
        if not self._read:
            return
        place = self._place(home)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            attempt = place.with_suffix(f".{uuid.uuid4().hex}.tmp")
            try:
                self._write(attempt, files)
                attempt.replace(place)
            finally:
                attempt.unlink(missing_ok=True)
        with closing(_opened(place)) as table:
            self.extra = json.loads(table.execute("select value from about").fetchone()[0])

    def _write(self, place: Path, files: Iterable[tuple[str, IO[bytes]]]) -> None:
        assert self._read is not None
        layout = self._config.annotations
        digests = {}
        left_out = LeftOutRows()
        classes: dict[int, str] = {}
        strange = ""
        with closing(sqlite3.connect(place)) as table:
            table.execute("pragma journal_mode=off")
            table.execute("pragma synchronous=off")
            table.execute("create table images (name text primary key, value text) without rowid")
            table.execute("create table about (value text)")
            for name, file in files:
                with explained(file, "it", (layout,)), laid_out(layout, f"metadata: {public(name)}"):
                    content = xxhash.xxh3_128()
                    while block := file.read(1 << 20):
                        content.update(block)
                    digests[name] = content.hexdigest()
                    file.seek(0)
                    entries = _with_classes(self._read(file, self._config, left_out), classes)
                    rows = ((_plain(image), _packed(entry)) for image, entry in entries)
                    before = table.total_changes
                    table.executemany("insert or ignore into images values (?, ?)", rows)
                if table.total_changes == before and not strange:
                    kind = kind_of(file)
                    strange = f"; {public(name)} is {kind}" if kind and kind.annotations != layout else ""
            self._judge(table, left_out, strange)
            about: dict[str, Any] = {"metadata": digests}
            if left_out:
                about["metadata_left_out"] = dict(sorted(left_out.items()))
            if classes:
                about["classes"] = [classes[label] for label in sorted(classes)]
            table.execute("insert into about values (?)", (json.dumps(about, sort_keys=True),))
            table.commit()

    def _judge(self, table: sqlite3.Connection, left_out: LeftOutRows, strange: str) -> None:
        """Raise ConfigError if fewer than half of the entries are usable; ``strange`` explains an unsuitable file."""
        listed = table.execute("select count(*) from images").fetchone()[0]
        if left_out["bad_row"] + left_out["no_image_name"] > listed or not listed:
            raise ConfigError(
                f"metadata: {', '.join(map(public, self._config.metadata))}: {listed} entries can be used as "
                f"annotations={self._config.annotations}, {left_out.total()} cannot: "
                f"{left_out.first or 'nothing is in it'}{strange}"
            )

    def open(
        self, home: Path, files: Callable[[], Iterable[tuple[str, IO[bytes]]]], planned: Mapping[str, Any]
    ) -> None:
        """Open the table for :meth:`of`; rebuild it if it has been deleted since the plan was made.

        Raises:
            ConfigError: the files that it was built from have changed.
        """
        if not self._read or self._table:
            return
        self.prepare(home, files() if not self._place(home).exists() else ())
        if planned.get("metadata") != self.extra.get("metadata"):
            raise ConfigError(
                "metadata: the files have changed since the plan: choose another output=, or overwrite=true"
            )
        self._table = _opened(self._place(home))

    def of(self, name: str) -> Entry | None:
        """The entry of the image ``name``; None if it is not listed."""
        if self._shared:
            return self._shared
        if self._layout:
            return self._layout(name)
        if not self._table:
            return None
        for candidate in _candidates(name):
            with suppress(UnicodeEncodeError):
                found = self._table.execute("select value from images where name = ?", (candidate,)).fetchone()
                if found:
                    return Entry(**json.loads(found[0]))
        return None


def _opened(place: Path) -> sqlite3.Connection:
    """Open the table read-only and without locks, which network file systems may not support."""
    return sqlite3.connect(f"{place.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


_UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    OSError,
    tarfile.TarError,
    zlib.error,
    sqlite3.Error,
    pa.ArrowException,
)
"""Exceptions that libraries raise for damaged files."""


@contextmanager
def laid_out(layout: str, said: str) -> Iterator[None]:
    """Convert every exception of a layout's reader into a ConfigError about the file that ``said`` describes."""
    try:
        yield
    except (SampleError, ConfigError, *_UNREADABLE) as error:
        why = str(error) if isinstance(error, SampleError | ConfigError) else in_words(error)
        raise ConfigError(f"{said} is not laid out as annotations={layout} expects: {why}") from None


def _with_classes(found: Found, classes: dict[int, str]) -> Found:
    """Yield ``found``, and store the class names that it contains in ``classes``."""
    for name, entry in found:
        if entry.label is not None and entry.captions:
            classes[entry.label] = entry.captions[0]
        yield name, entry


def _packed(entry: Entry) -> str:
    entry = replace(entry, captions=captions_of(entry.captions), meta=plain(entry.meta))
    return json.dumps({name: value for name, value in asdict(entry).items() if value not in ([], {}, None, "")})


def _plain(name: str) -> str:
    return re.sub(r"^(\.?/)+", "", name).encode("utf-8", "replace").decode()


def _candidates(name: str) -> Iterator[str]:
    """Names under which the image may be listed: path, end of the path, file name with and without extension."""
    path = re.sub(r"^(\.?/)+", "", name)
    parts = path.split("/")
    yield path
    if len(parts) > 2:
        yield "/".join(parts[-2:])
    if len(parts) > 1:
        yield parts[-1]
    yield parts[-1].rpartition(".")[0]


def archive_class(archive: str) -> str:
    """The class name of an archive: ``n01440764`` for ``sub/n01440764.tar``."""
    return archive.rpartition("/")[2].partition(".")[0]


def get_annotations(config: SourceConfig) -> Annotations:
    """Return the annotations that ``annotations=`` selects.

    Raises:
        ConfigError: the name is unknown, or ``metadata=`` and ``annotations=`` do not fit together.
    """
    from pipeline.config.cli import nearest

    name = config.annotations
    if name and name not in READERS and name not in LAYOUTS:
        raise ConfigError(f"annotations={name}: {nearest(name, {*READERS, *LAYOUTS})}")
    if name in READERS and not config.metadata:
        raise ConfigError(f"annotations={name} needs metadata=[...]: the files that hold them")
    if config.metadata and name not in READERS:
        raise ConfigError(f"metadata= needs annotations=: {', '.join(READERS)}")
    return Annotations(config)
