"""Reports which rank hung in which collective, from recordings of torch's flight recorder written by ranks that ended.

A recording is a pickle of lists, dicts, strings and numbers. It is read without support for classes and functions, so
that a file written by somebody else cannot run code here.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLIGHT = "flight-"
"""Prefix of the files' names, followed by the rank."""
_NAME = re.compile(rf"{FLIGHT}(?:gloo-)?(\d+)")
_MOST_BYTES = 2**28
_NAMED = 16  # maximum number of ranks, or ranges of ranks, in a sentence
_LIBRARY = re.compile(r"/(site|dist)-packages/|/lib/python3")


class Unreadable(ValueError):
    """A file is not a recording."""


@dataclass(frozen=True)
class Call:
    """One collective of one rank."""

    sequence: int
    """Number among the collectives of its group, from 1."""
    what: str
    """Description: ``all_reduce of [1024, 64] Float``."""
    place: str
    """Innermost caller outside libraries: ``train.py:120 (step)``; empty if unknown."""
    done: bool


@dataclass(frozen=True)
class Recording:
    """The collectives of one rank in one process group, oldest first."""

    rank: int
    group: str
    members: tuple[int, ...]
    """Ranks of the group; empty if the recording does not say."""
    calls: tuple[Call, ...]

    @property
    def waiting(self) -> Call | None:
        """The collective in which the rank waited; None if all are completed."""
        return next((call for call in self.calls if not call.done), None)

    @property
    def last(self) -> Call | None:
        return self.calls[-1] if self.calls else None


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise Unreadable(f"it names {module}.{name}, which no recording refers to")


def read(path: Path) -> list[Recording]:
    """The recordings in a file, one for each process group.

    Raises:
        Unreadable: it is not a recording of torch.
        OSError: it cannot be read.
    """
    match = _NAME.fullmatch(path.name)
    if match is None or path.stat().st_size > _MOST_BYTES:
        raise Unreadable("its name or its size is not that of a recording")
    try:
        with path.open("rb") as file:
            dump = _Plain(file).load()
        groups: dict[str, list[dict[str, Any]]] = {}
        for entry in dump["entries"]:
            if not entry["is_p2p"]:
                groups.setdefault(str(entry["process_group"][0]), []).append(entry)
        return [_recording(int(match[1]), entries, dump) for entries in groups.values()]
    except Unreadable:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def _recording(rank: int, entries: list[dict[str, Any]], dump: dict[str, Any]) -> Recording:
    name, description = (str(part) for part in entries[-1]["process_group"])
    members = tuple(int(n) for n in re.findall(r"\d+", str((dump["pg_config"].get(name) or {}).get("ranks", ""))))
    status = dump.get("pg_status", {})
    status = status.get(entries[-1]["pg_id"]) or status.get(str(entries[-1]["pg_id"])) or {}
    completed = int(status.get("last_completed_collective", -1))
    calls = {int(entry["collective_seq_id"]): _call(entry, completed) for entry in entries}  # keeps the last part
    ordered = tuple(calls[sequence] for sequence in sorted(calls))
    return Recording(rank, "default" if description == "default_pg" else description or name, members, ordered)


def _call(entry: dict[str, Any], completed: int) -> Call:
    name = str(entry["profiling_name"]).partition(":")[2] or str(entry["profiling_name"])
    sizes = ", ".join(str(list(size)) for size in entry["input_sizes"][:2])
    kinds = ", ".join(dict.fromkeys(str(kind) for kind in entry["input_dtypes"]))
    what = f"{name} of {sizes} {kinds}" if sizes else name
    sequence = int(entry["collective_seq_id"])
    return Call(
        sequence, what, _place(entry.get("frames") or ()), entry["state"] == "completed" or sequence <= completed
    )


def _place(frames: Iterable[dict[str, Any]]) -> str:
    """The innermost frame outside libraries."""
    for frame in frames:
        path = str(frame["filename"])
        if path.endswith(".py") and not _LIBRARY.search(path):
            return f"{path}:{frame['line']} ({frame['name']})"
    return ""


# ---- comparison of ranks


def explain(files: Iterable[Path]) -> list[str]:
    """Sentences that say which ranks waited in which collective, and which were missing; empty if none waited."""
    lines: list[str] = []
    groups: dict[str, list[Recording]] = {}
    ranks: set[int] = set()
    for path in sorted(files):
        try:
            found = read(path)
        except (Unreadable, OSError) as error:
            lines.append(f"{path}: no recording of torch's flight recorder ({error})")
            continue
        ranks.add(int(_NAME.fullmatch(path.name)[1]))  # type: ignore[index]
        for recording in found:
            groups.setdefault(recording.group, []).append(recording)
    for group, recordings in groups.items():
        lines += _explain_group(group, recordings, ranks)
    return lines


def _explain_group(group: str, recordings: list[Recording], ranks: set[int]) -> list[str]:
    waiting = {recording.rank: call for recording in recordings if (call := recording.waiting)}
    if not waiting:  # gloo marks failed collectives as completed: the ranks that got furthest were waiting
        lasts = {recording.rank: recording.last for recording in recordings if recording.last}
        furthest = max((call.sequence for call in lasts.values()), default=0)
        if all(call.sequence == furthest for call in lasts.values()):
            return []
        waiting = {rank: call for rank, call in lasts.items() if call.sequence == furthest}
    first = min(call.sequence for call in waiting.values())
    here = {rank: call for rank, call in waiting.items() if call.sequence == first}
    members = set().union(*(recording.members for recording in recordings)) or ranks
    lines = [f"collective {first} of group {group} ({_named(sorted(members))}):"]
    for what, place in dict.fromkeys((call.what, call.place) for call in here.values()):
        those = [rank for rank, call in sorted(here.items()) if (call.what, call.place) == (what, place)]
        lines.append(f"  {_named(those)} waited in {what}{f' at {place}' if place else ''}")
    if len({call.what for call in here.values()}) > 1:
        lines.append("  they do not match: each rank must call the same collective, with the same shape and dtype")
    for recording in sorted(recordings, key=lambda recording: recording.rank):
        last = recording.last
        if recording.rank in here or last is None:
            continue
        where = f"{last.sequence}, {last.what}{f' at {last.place}' if last.place else ''}"
        if last.sequence < first:
            lines.append(f"  rank {recording.rank} never entered it: its last collective was {where}")
        else:
            lines.append(f"  rank {recording.rank} had completed it: its last collective was {where}")
    known = {recording.rank for recording in recordings}
    if lost := sorted(members & ranks - known):
        lines.append(f"  {_named(lost)} never called a collective of this group")
    if lost := sorted(members - ranks):
        lines.append(f"  {_named(lost)} left no recording: killed, or stuck elsewhere (see its log and its node)")
    return lines


def _named(ranks: Sequence[int]) -> str:
    """Ranks as text: ``rank 3``, ``ranks 0-5, 7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    more = f", … ({len(ranks)} in all)" if len(words) > _NAMED else ""
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(words[:_NAMED])}{more}"
