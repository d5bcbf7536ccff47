"""Lists of samples to remove: which samples each line names, and what became of them.

A line is a sample's key, the XXH3-128 hash of its source file, the URL that it was downloaded from, or a file name:
the image's path below the folder that was read (or its end, if that is unique), or ``<archive>/<member>``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.schema import ConfigError, public
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.samples import content_hash, make_key

_HASH = re.compile(r"[0-9a-fA-F]{32}")
_OTHER_HASH = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
REQUESTS = "requests"
"""Field of a takedown's plan: hash of a line → keys that it named. Ledgers keep only the key of a removed sample."""


@dataclass
class Wanted:
    """A line of the list."""

    number: int
    """Line number, from 1."""
    text: str
    keys: set[str] = field(default_factory=set)
    """Keys of the samples that it names."""
    likely: dict[str, str] = field(default_factory=dict)
    """Keys of samples whose file name ends in the line → that name."""
    fate: str = "not found"

    @property
    def digest(self) -> str:
        """Hash of the line, which is kept after its sample was removed."""
        return content_hash(self.text.encode("utf-8", "surrogateescape"))

    def describe(self) -> str:
        """The line's fate, its text, and the keys that it named unless it is itself the key."""
        keys = sorted(self.keys - {self.text})
        named = f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""
        return f"{self.fate}: line {self.number}: {self.text}{named}{self._hint()}"

    def _hint(self) -> str:
        if self.fate == "ambiguous":
            names = sorted(self.likely.values())
            return f" is the end of {len(names)} file names, such as {' and '.join(names[:2])}: give one in full"
        if self.fate == "not found" and _OTHER_HASH.fullmatch(self.text):
            return " looks like a SHA-1 or SHA-256; ledgers hold the XXH3-128 of source files (column source_hash)"
        return ""


def read_list(path: Path) -> list[Wanted]:
    """The non-empty lines of a UTF-8 text file; repeated lines count once.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    found: dict[str, Wanted] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if text := line.strip():
                    found.setdefault(text, Wanted(number, text))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"takedown={path}: cannot be read: {error}") from None
    if not found:
        raise ConfigError(f"takedown={path}: the file is empty")
    return list(found.values())


def resolve(wanted: Iterable[Wanted], datasets: Iterable[Dataset]) -> None:
    """Find out which samples of ``datasets`` the lines name; fills :attr:`Wanted.keys` and :attr:`Wanted.likely`.

    Raises:
        StorageError: a ledger is damaged.
    """
    lines = _Lines(wanted)
    for dataset in datasets:
        lines.remember(dataset)
        top = not dataset.header.get("upstream")
        columns = ["key", "container", "source_hash", *(["source", "member"] if top else [])]
        folders = _folders_of(dataset) if top else ()
        for index in range(dataset.partitions):
            table = SlotReader(dataset, index).ledger(columns).to_pydict()
            for key, container, *row in zip(*(table[name] for name in columns), strict=True):
                if not container:
                    lines.match(key, *row, folders=folders)
    lines.settle()


def _folders_of(dataset: Dataset) -> tuple[str, ...]:
    """The folder to which the file names in the ledger are relative; empty if it is not known."""
    place = str(dataset.header["config"].get("input") or "")
    return (f"{Path(place).absolute()}/",) if place else ()


class _Lines:
    """The lines of a list, indexed by what they may name: a key, a hash, a URL or a file."""

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self._all = list(wanted)
        self._by_text = {line.text: line for line in self._all}
        self._by_hash = {line.text.lower(): line for line in self._all if _HASH.fullmatch(line.text)}
        self._by_url = defaultdict(list)
        self._by_name = defaultdict(list)
        for line in self._all:
            if "://" in line.text:
                self._by_url[str(public(line.text))].append(line)
            else:
                self._by_name[line.text.rpartition("/")[2]].append(line)

    def remember(self, dataset: Dataset) -> None:
        """Add the keys that these lines named in earlier takedowns of ``dataset``."""
        known: dict[str, list[str]] = {}
        for plan in dataset.plans:
            known |= plan.header.get(REQUESTS) or {}
        if not dataset.taken:
            return
        for line in self._all:
            line.keys |= set(known.get(line.digest, ()))
            line.keys |= {key for key in (line.text, make_key(line.text)) if key in dataset.taken}

    def match(self, key: str, source_hash: str, source: str = "", member: str = "", *, folders: Iterable[str]) -> None:
        """Add a sample's key to each line that names it."""
        for line in (self._by_text.get(key), self._by_hash.get(source_hash) if source_hash else None):
            if line:
                line.keys.add(key)
        if not source:
            return
        for line in self._by_url.get(member, ()) if "://" in member else ():
            line.keys.add(key)
        full = f"{source}/{member}" if member else source
        for line in self._by_name.get(full.rpartition("/")[2], ()):
            if line.text in (full, member) or any(line.text == folder + full for folder in folders):
                line.keys.add(key)
            elif full.endswith("/" + line.text):
                line.likely[key] = full

    def settle(self) -> None:
        """Let a line without an exact match name the only file whose name ends in it; several make it ambiguous."""
        for line in self._all:
            if not line.keys and len(line.likely) == 1:
                line.keys = set(line.likely)
            elif not line.keys and line.likely:
                line.fate = "ambiguous"


def requests(wanted: Iterable[Wanted], taken: Mapping[str, Any]) -> dict[str, list[str]]:
    """Field :data:`REQUESTS` of the plan that removes the samples ``taken``, without lines that are keys."""
    found = {line.digest: sorted(line.keys & taken.keys()) for line in wanted if line.keys != {line.text}}
    return {digest: keys for digest, keys in found.items() if keys}


def account(wanted: Iterable[Wanted], removed: Iterable[str], datasets: Iterable[Dataset], verb: str) -> None:
    """Set :attr:`Wanted.fate` to ``verb`` ("removed") or "removed before"; other lines keep theirs."""
    now = set(removed)
    before = {key for dataset in datasets for key in dataset.taken}
    for line in wanted:
        if line.keys & now:
            line.fate = verb
        elif line.keys & before:
            line.fate = "removed before"


def report(wanted: list[Wanted]) -> Iterator[str]:
    """All lines with their fates, those that named nothing last, then the number of lines by fate."""
    fates = defaultdict(list)
    for line in wanted:
        fates[line.fate].append(line)
    last = ("ambiguous", "not found")
    for fate in (*(fate for fate in fates if fate not in last), *last):
        yield from (line.describe() for line in fates.get(fate, ()))
    counts = ", ".join(f"{len(lines)} {fate}" for fate, lines in fates.items())
    yield f"{len(wanted)} line{'s' * (len(wanted) != 1)}: {counts}"
