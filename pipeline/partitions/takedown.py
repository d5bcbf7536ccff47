"""Permanent removal of samples: finds the partitions that contain them, and rewrites these without them.

The partitions of a ``takedown`` generation are rewritten from their own data, not from the stage's input, which may be
gone. The row of a removed sample stays in the ledger, with only its key and the reason.
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
"""Key → the partition with its newest row, and the reason that this row will have."""


def find(dataset: Dataset, keys: Set[str]) -> Taken:
    """Find the samples with these keys in all ledgers of ``dataset``.

    Samples that were taken down before are skipped.

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
    """``outcome`` in partition ``index``, or its replacement if the sample was taken down, here or upstream.

    The older rows of a sample that failed and was tried again contain no data and stay as they are.
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
    """The outcomes of partition ``index`` before the generation that rewrites it, without samples taken down.

    Raises:
        StorageError: the old data of the partition are damaged.
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
                source_pixels=row.get("source_pixels", 0),  # not in every ledger
                phash=row.get("phash", ""),
            ),
        )
        if stored is not None and (outcome.status == "kept" or shared):
            stays = outcome.status == "kept"
            copied = shared.moved(stored.copied(), stays) if shared else stored.copied()
            outcome.row = copied if stays else None
        yield outcome


def released_ledger(dataset: Dataset, index: int) -> tuple[bytes, dict[str, Any]]:
    """The ledger for partition ``index``, whose data are released, and the fields of its record that change.

    Raises:
        StorageError: the ledger is damaged.
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
    """Moves text states that several rows share to the first of these rows that is kept.

    ``caption_back`` is the distance in rows to the row that contains the text states; 0 if they are in the row itself.
    """

    def __init__(self) -> None:
        self._old = self._new = -1
        self._homes: dict[int, int] = {}
        self._removed: dict[int, Row] = {}

    def moved(self, row: Row, stays: bool) -> Row:
        """Convert the next row of a partition; the result is written only if the row ``stays``."""
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
    """Whether the newest generation is a takedown, which may be unfinished."""
    return bool(dataset.plans[-1].header["kind"] == TAKEDOWN)
