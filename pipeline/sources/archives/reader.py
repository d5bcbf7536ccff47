"""From the members of an archive to samples: images, and what lies beside them under the same stem."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any

import xxhash

from pipeline.config import SourceConfig
from pipeline.samples import FORMATS, Outcome, SampleError, caption_fields, content_hash, make_key, path_text
from pipeline.sources.annotations import Annotations, Entry
from pipeline.sources.archives import check, members
from pipeline.sources.archives.member import Member

_LONGEST_NAME = 4096  # bytes of a member's name; what a path may have on Linux
_SHOWN = 200  # characters of a longer one
_SIDECARS = {"txt": 1 << 16, "json": 8 << 20, "cls": 64}
"""Files beside an image that say something of it, and how many bytes of each are read."""
_GROUP = 16  # most members that belong together
_CAPTION_FIELDS = ("caption", "captions", "text")


def outcomes(
    archive: str, file: IO[bytes], config: SourceConfig, annotations: Annotations, step: Callable[[], None]
) -> Iterator[Outcome]:
    """What becomes of the image members of ``file``, an archive that is looked through as a whole first.

    Raises:
        SampleError: it is no archive, not whole, damaged or a bomb; before anything is yielded.
    """
    check(file, config.max_members, step)
    return _outcomes(archive, file, config, annotations)


def _outcomes(archive: str, file: IO[bytes], config: SourceConfig, annotations: Annotations) -> Iterator[Outcome]:
    most = config.max_member_bytes
    seen: Counter[int] = Counter()

    def wants(name: str, size: int) -> int | None:
        if sidecar := _SIDECARS.get(_extension(name)):
            return min(size, sidecar)
        return (size if size <= most else 0) if _format(name) else None

    for group in _groups(members(file, config.max_members, wants), most):
        beside = _beside(group, config.columns)
        for member in group:
            if not _format(member.name):
                continue
            entry = annotations.of(member.name)
            if entry is None and annotations.listed_only:
                continue
            if member.size > most and not member.error:
                member.error = SampleError("too_many_bytes", f"{member.size} bytes")
            yield _outcome(archive, member, _joined(entry, beside), annotations, seen)


def _groups(found: Iterator[Member], most_bytes: int) -> Iterator[list[Member]]:
    """Neighbours of the same stem, as WebDataset has them; a name that comes again begins another group."""
    group: list[Member] = []
    for member in found:
        together = group and _stem(member.name) == _stem(group[0].name)
        full = len(group) == _GROUP or sum(len(m.data) for m in group) + len(member.data) > most_bytes
        if group and (not together or full or any(member.name == m.name for m in group)):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _beside(group: list[Member], fields: tuple[str, ...]) -> Entry:
    """What the sidecars of a group say, of JSON these fields (none given: all); the text's caption goes first."""
    texts = {_extension(member.name): member.data for member in reversed(group) if not member.error}
    meta = _object(texts.get("json", b""))
    caption = texts.get("txt", b"").decode("utf-8", "replace").strip()
    said: Any = next((meta[name] for name in _CAPTION_FIELDS if meta.get(name)), [])
    captions = [caption] if caption else [str(text) for text in (said if isinstance(said, list) else [said])]
    label = texts.get("cls", b"").strip()
    meta = {name: value for name, value in meta.items() if not fields or name in fields}
    return Entry(captions, meta, int(label) if label.isdigit() else None)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _joined(entry: Entry | None, beside: Entry) -> Entry:
    """What a list says of an image, then what lies beside it."""
    if entry is None:
        return beside
    label = entry.label if entry.label is not None else beside.label
    return Entry(entry.captions or beside.captions, {**beside.meta, **entry.meta}, label, entry.dropped)


def _outcome(archive: str, member: Member, entry: Entry, annotations: Annotations, seen: Counter[int]) -> Outcome:
    """What becomes of an image; ``seen`` counts the keys of the archive by a hash of each."""
    key = make_key(f"{archive}/{member.name}")
    short = xxhash.xxh3_64_intdigest(key)
    seen[short] += 1
    if seen[short] > 1:
        key = f"{key}=={seen[short]}"  # a name that comes again in the archive; no path gives a key like this
    outcome = Outcome(key, "failed", source=archive, member=_shown(member.name), offset=member.offset)
    outcome.source_bytes = member.size
    if len(member.name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
        outcome.reason, outcome.detail = "name_too_long", f"{len(member.name)} characters"
    elif member.error:
        outcome.reason, outcome.detail = member.error.reason, member.error.detail
    else:
        settle(outcome, member.data, _format(member.name), entry, annotations.columns)
    return outcome


def settle(outcome: Outcome, data: bytes, format: str, entry: Entry, columns: dict[str, str]) -> None:
    """Keep the image ``data``, unless what is known of it speaks against that."""
    outcome.source_hash = content_hash(data)
    if entry.dropped:
        outcome.status, outcome.reason = "dropped", entry.dropped
        return
    row = {"key": outcome.key, "jpg": data, "format": format, **caption_fields(entry.captions)}
    if "meta" in columns:
        row["meta"] = entry.meta
    if "label" in columns:
        if entry.label is None:
            outcome.reason = "no_label"
            return
        row["label"] = entry.label
    outcome.status, outcome.row = "kept", row


def _shown(name: str) -> str:
    """A member's name as text that any file can hold."""
    return path_text(name if len(name) <= _LONGEST_NAME else name[:_SHOWN] + "...")


def _base(name: str) -> str:
    """The last part of a name; none of the files that macOS adds to archives beside the real ones."""
    base = name.rpartition("/")[2]
    return "" if base.startswith("._") else base


def _stem(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _extension(name: str) -> str:
    return _base(name).rpartition(".")[2].lower()


def _format(name: str) -> str:
    """The image format that a member's extension promises; empty if none."""
    _, dot, extension = _base(name).rpartition(".")
    return FORMATS.get(extension.lower(), "") if dot else ""
