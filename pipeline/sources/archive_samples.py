"""Groups the members of an archive into samples: images, and files with the same stem."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import xxhash

from pipeline.config.schema import SourceConfig
from pipeline.samples import (
    Outcome,
    SampleError,
    caption_fields,
    content_hash,
    image_format,
    label_of,
    make_key,
    path_text,
    plain,
)
from pipeline.samples.captions import caption_columns, captions_of
from pipeline.sources.annotations import Annotations, Entry
from pipeline.sources.archives import check, members
from pipeline.sources.archives.member import Member
from pipeline.sources.clutter import TEXTS, in_clutter, is_unread
from pipeline.sources.text_files import small_text

_LONGEST_NAME = 4096  # maximum bytes of a member's name: the limit of a path on Linux
_SHOWN = 200  # characters that are stored of a longer name
_SIDECARS = {**dict.fromkeys(TEXTS, 1 << 16), "json": 8 << 20, "cls": 64}
"""Extensions of files that describe an image next to them, and how many bytes of such a file are read."""
_GROUP = 16  # maximum members of a group before its first ones are yielded


def outcomes(
    archive: str,
    file: IO[bytes],
    config: SourceConfig,
    annotations: Annotations,
    step: Callable[[], None],
    noted: Counter[str] | None = None,
) -> Iterator[Outcome]:
    """Yield the outcome of each image in the archive ``file``, after checking the whole archive.

    ``noted`` counts members that are not samples: images in unsupported formats (by extension), clutter, images that
    the metadata do not list, texts without an image, and other files.

    Raises:
        SampleError: ``file`` is not an archive, is incomplete or damaged, or is an archive bomb. Raised before the
        first outcome.
    """
    check(file, config.max_members, step)
    return _outcomes(file, _Reading(archive, config, annotations, Counter() if noted is None else noted))


@dataclass(frozen=True, slots=True)
class _Reading:
    """State of an archive that is being read; ``seen`` counts its keys, by hash."""

    archive: str
    config: SourceConfig
    annotations: Annotations
    noted: Counter[str]
    seen: Counter[int] = field(default_factory=Counter)


def _outcomes(file: IO[bytes], reading: _Reading) -> Iterator[Outcome]:
    noted, most = reading.noted, reading.config.max_member_bytes

    def wants(name: str, size: int) -> int | None:
        if in_clutter(name):
            noted["clutter"] += bool(image_format(name))
            return None
        noted["unread_image_format"] += is_unread(name)
        if sidecar := _SIDECARS.get(_extension(name)):
            return min(size, sidecar)
        noted["other_member"] += not image_format(name) and not is_unread(name)
        return (size if size <= most else 0) if image_format(name) else None

    for group in _groups(members(file, reading.config.max_members, wants), most):
        sidecars = [member for member in group if not image_format(member.name)]
        images = [member for member in group if image_format(member.name)]
        noted["text_without_image"] += 0 if images else sum(_extension(m.name) in TEXTS for m in sidecars)
        for member in images:
            entry = reading.annotations.of(member.name)
            if entry is None and reading.annotations.listed_only:
                noted["not_listed"] += 1
                continue
            if member.size > most and not member.error:
                member.error = SampleError("too_many_bytes", f"{member.size} bytes")
            yield _outcome(member, entry, _beside(member, sidecars), reading)


def _groups(found: Iterator[Member], most_bytes: int) -> Iterator[list[Member]]:
    """Group consecutive members with the same stem up to the first dot, as WebDataset does.

    A repeated name starts a new group. A long group is yielded in parts; members with the same stem up to the last dot
    stay together.
    """
    group: list[Member] = []
    for member in found:
        together = group and _stem(member.name) == _stem(group[0].name)
        if group and (not together or any(member.name == m.name for m in group)):
            yield group
            group = []
        elif len(group) >= _GROUP or sum(len(m.data) for m in group) + len(member.data) > most_bytes:
            last = len(group)
            while last and _whole_stem(group[last - 1].name) == _whole_stem(member.name):
                last -= 1
            if last:
                yield group[:last]
            group = group[last:]
            if len(group) >= _GROUP:
                yield group
                group = []
        group.append(member)
    if group:
        yield group


def _beside(image: Member, sidecars: list[Member]) -> dict[str, bytes]:
    """Return the data of an image's sidecars by extension; of several, the one with the longest common stem.

    ``v.1.jpg`` gets ``v.1.txt``, or otherwise ``v.txt`` or ``v.1.caption.txt``, but never ``v.2.txt``.
    """
    found: dict[str, tuple[int, bytes]] = {}
    stem = _whole_stem(image.name)
    for sidecar in sidecars:
        other, kind = _whole_stem(sidecar.name), _extension(sidecar.name)
        if sidecar.error or not (f"{stem}.".startswith(f"{other}.") or other.startswith(f"{stem}.")):
            continue
        rank = 2 * min(len(other), len(stem)) + (len(other) <= len(stem))
        if kind not in found or rank > found[kind][0]:
            found[kind] = rank, sidecar.data
    return {kind: data for kind, (_, data) in found.items()}


def _said(beside: dict[str, bytes], reading: _Reading) -> Entry:
    """The entry that an image's sidecars describe: the caption of a text file takes precedence over one in JSON.

    Of the JSON fields, those in ``columns=`` are kept (empty: all).

    Raises:
        SampleError: ``bad_label``.
    """
    meta = _object(beside["json"], reading.noted) if "json" in beside else {}
    caption = next(filter(None, (small_text(beside.get(kind, b"")) for kind in TEXTS)), "")
    captions = [caption] if caption else captions_of({name: meta[name] for name in caption_columns(meta)})
    label = label_of(beside.get("cls")) if "label" in reading.annotations.columns else None
    fields = reading.config.columns
    return Entry(captions, {name: value for name, value in meta.items() if not fields or name in fields}, label)


def _object(data: bytes, noted: Counter[str]) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    noted["unreadable_json"] += not isinstance(value, dict)
    return value if isinstance(value, dict) else {}


def _joined(entry: Entry | None, beside: Entry) -> Entry:
    """Merge two entries of an image: ``entry``, from the metadata, takes precedence over ``beside``."""
    if entry is None:
        return beside
    label = entry.label if entry.label is not None else beside.label
    return Entry(entry.captions or beside.captions, {**beside.meta, **entry.meta}, label, entry.dropped)


def _outcome(member: Member, entry: Entry | None, beside: dict[str, bytes], reading: _Reading) -> Outcome:
    """The outcome of an image with the metadata ``entry`` and the sidecars ``beside``."""
    key = make_key(f"{reading.archive}/{member.name}")
    short = xxhash.xxh3_64_intdigest(key)
    reading.seen[short] += 1
    if reading.seen[short] > 1:
        key = f"{key}=={reading.seen[short]}"  # a repeated name; no path results in such a key
    outcome = Outcome(key, "failed", source=reading.archive, member=_shown(member.name), offset=member.offset)
    outcome.source_bytes = member.size
    if len(member.name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
        outcome.reason, outcome.detail = "name_too_long", f"{len(member.name)} characters"
    elif member.error:
        outcome.reason, outcome.detail = member.error.reason, member.error.detail
    else:
        try:
            said = _joined(entry, _said(beside, reading))
            settle(outcome, member.data, image_format(member.name), said, reading.annotations.columns)
        except SampleError as error:
            outcome.reason, outcome.detail = error.reason, error.detail
    return outcome


def settle(outcome: Outcome, data: bytes, format: str, entry: Entry, columns: dict[str, str]) -> None:
    """Set ``outcome`` to kept, with a row that holds the image ``data``, or to dropped if ``entry`` says so.

    Raises:
        SampleError: ``no_label``, ``bad_label``, ``bad_field``.
    """
    outcome.source_hash = content_hash(data)
    if entry.dropped:
        outcome.status, outcome.reason = "dropped", entry.dropped
        return
    row = {"key": outcome.key, "jpg": data, "format": format, **caption_fields(entry.captions)}
    if "meta" in columns:
        row["meta"] = plain(entry.meta)
    if "label" in columns:
        row["label"] = label_of(entry.label)
        if row["label"] is None:
            raise SampleError("no_label")
    outcome.status, outcome.row = "kept", row


def _shown(name: str) -> str:
    """A member's name as valid UTF-8, shortened if it is too long."""
    return path_text(name if len(name) <= _LONGEST_NAME else name[:_SHOWN] + "...")


def _stem(name: str) -> str:
    """``name`` up to the first dot of its last component."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _whole_stem(name: str) -> str:
    """``name`` up to the last dot of its last component."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)


def _extension(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()
