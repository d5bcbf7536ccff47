"""Permanent removal of samples: finds the partitions that hold them, and rewrites these without them.

A generation of kind ``takedown`` has its partitions written again from what they held, not from the stage's input,
which may be gone. A removed sample's row stays in the ledger with its key and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from io import BytesIO
from typing import Any

from pipeline.partitions.dataset import Dataset, SlotReader, before_redone
from pipeline.partitions.ledger import Ledger
from pipeline.partitions.plan import TAKEDOWN
from pipeline.samples import TAKEN, TAKEN_UNKEPT, Outcome, Row

_BACK, _TEXT = "caption_back", "caption_latents"

Taken = dict[str, tuple[int, str]]
"""Key → the partition that its newest row is in, and the reason that this row will have."""


def find(dataset: Dataset, keys: Set[str]) -> Taken:
    """Look for samples with these keys in all ledgers of ``dataset``.

    Those that were taken down before are not looked for.

    Raises:
        StorageError: a ledger is damaged.
    """
    found: Taken = {}
    for index in range(dataset.partitions):
        table = SlotReader(dataset, index).ledger(["key", "container", "outcome"]).to_pydict()
        for key, container, outcome in zip(table["key"], table["container"], table["outcome"], strict=True):
            if not container and key in keys and key not in dataset.taken:
                found[key] = (index, TAKEN if outcome == "kept" else TAKEN_UNKEPT)
    return found


def without_taken(dataset: Dataset, index: int, outcome: Outcome) -> Outcome:
    """``outcome`` in partition ``index``, or what stands in its place if its sample was taken down, here or upstream.

    The older rows of a sample that failed at first and was tried again hold nothing and stay as they are.
    """
    if outcome.container:
        return outcome
    newest, reason = dataset.taken.get(outcome.key, (-1, ""))
    if newest == index:
        return Outcome(outcome.key, "dropped", reason)
    if outcome.reason == TAKEN or (reason and outcome.status == "kept"):
        return Outcome(outcome.key, "dropped", TAKEN_UNKEPT)
    return outcome


def rewritten(dataset: Dataset, index: int) -> Iterator[Outcome]:
    """The outcomes of partition ``index`` as they were before it was to be written again, without what is taken down.

    Raises:
        StorageError: what it held is damaged.
    """
    shared = SharedText() if _BACK in dataset.schema else None
    before = SlotReader(before_redone(dataset, index), index)
    kept = iter(before.stored() if index not in dataset.released else ())
    for row in before.ledger().to_pylist():
        stored = next(kept, None) if row["outcome"] == "kept" and not row["container"] else None
        outcome = without_taken(
            dataset,
            index,
            Outcome(
                row["key"],
                row["outcome"],
                row["reason"],
                row["detail"],
                row["retryable"],
                row["source"],
                row["member"],
                row["source_offset"],
                row["source_bytes"],
                row["source_hash"],
                row["width"],
                row["height"],
                container=row["container"],
                count=row["count"],
                complete=row["complete"],
                source_pixels=row.get("source_pixels", 0),  # which not every ledger has
                phash=row.get("phash", ""),
            ),
        )
        if stored is not None and (outcome.status == "kept" or shared):
            stays = outcome.status == "kept"
            copied = shared.moved(stored.copied(), stays) if shared else stored.copied()
            outcome.row = copied if stays else None
        yield outcome


def released_ledger(dataset: Dataset, index: int) -> tuple[bytes, dict[str, Any]]:
    """The ledger of partition ``index``, of whose data nothing is to stay, and what the record is to say otherwise.

    Raises:
        StorageError: it is damaged.
    """
    before = SlotReader(before_redone(dataset, index), index)
    if dataset.counts_by(index).header["kind"] != TAKEDOWN:
        return before.ledger_bytes(), {}
    ledger = Ledger(index, -1, with_rows=False)
    locations = []
    places = zip(*before.ledger(["file", "offset", "length"]).to_pydict().values(), strict=True)
    for outcome, place in zip(rewritten(dataset, index), places, strict=True):
        ledger.add(outcome)
        if outcome.status == "kept" and not outcome.container:
            locations.append(place)
    file = BytesIO()
    ledger.write(file, locations)
    return file.getvalue(), {"counts": dict(ledger.counts), "reasons": dict(ledger.reasons)}


class SharedText:
    """Text states that several rows share go to the first of them that stays.

    A row with ``caption_back`` has none of its own, but those of the row so many rows before.
    """

    def __init__(self) -> None:
        self._old = self._new = -1
        self._homes: dict[int, int] = {}
        self._removed: dict[int, Row] = {}

    def moved(self, row: Row, stays: bool) -> Row:
        """The next row of a partition as it is to be written, if it ``stays``."""
        self._old += 1
        home = self._old - row[_BACK]
        if not stays:
            if home == self._old:
                self._removed[home] = {name: row[name] for name in row if name.startswith(_TEXT)}
            return row
        self._new += 1
        first = self._homes.setdefault(home, self._new)
        own = self._removed.get(home, {}) if first == self._new else {}
        return {**row, **own, _BACK: self._new - first}


def is_takedown(dataset: Dataset) -> bool:
    """Whether the newest generation is a takedown, which a dataset that is not finished may have been left with."""
    return bool(dataset.plans[-1].header["kind"] == TAKEDOWN)
