"""The ledger of a partition balances, or the partition is not committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.partitions.ledger import SCHEMA, Ledger, LedgerError, read_ledger
from pipeline.samples import Outcome
from pipeline.storage import Folder


def kept(key: str) -> Outcome:
    return Outcome(key, "kept", row={"key": key}, source="s", offset=3, source_hash="ab", width=4, height=5)


def archive(status: str = "kept", count: int = 0, **more: object) -> Outcome:
    return Outcome("archive", status, container=True, count=count, **more)  # type: ignore[arg-type]


def checked(expected: int, outcomes: list[Outcome], written: int | None = None) -> Ledger:
    ledger = Ledger(0, expected)
    for outcome in outcomes:
        ledger.add(outcome)
    ledger.check(ledger.counts["kept"] if written is None else written)
    return ledger


def test_what_was_planned_is_accounted_for() -> None:
    outcomes = [kept("a"), Outcome("b", "dropped", "small"), Outcome("c", "failed", "busy", retryable=True), kept("d")]
    ledger = checked(4, outcomes)
    assert ledger.counts == {"in": 4, "kept": 2, "dropped": 1, "failed": 1, "retryable": 1}
    assert ledger.reasons == {"dropped:small": 1, "failed:busy": 1}


def test_what_an_archive_held_is_accounted_for() -> None:
    ledger = checked(-1, [kept("a"), Outcome("b", "failed", "broken"), archive(count=2)])
    assert ledger.counts == {"in": 2, "kept": 1, "failed": 1, "containers": 1, "containers_kept": 1}


@pytest.mark.parametrize(
    ("expected", "outcomes", "written", "message"),
    [
        (2, [kept("a")], None, "1 outcomes for 2 inputs"),
        (1, [kept("a"), kept("b")], None, "2 outcomes for 1 inputs"),
        (0, [kept("a")], None, "1 outcomes for 0 inputs"),
        (2, [kept("a"), kept("a")], None, "'a' comes twice"),
        (2, [kept("a"), kept("b")], 1, "1 samples written, 2 kept"),
        (1, [Outcome("a", "kept")], None, "'a' is kept and has no row"),
        (1, [Outcome("a", "failed", "broken", row={"key": "a"})], None, "'a' is failed and has a row"),
        (1, [Outcome("a", "kept", row={"key": "b"})], None, "'a' has the row of 'b'"),
        (-1, [kept("a"), archive(count=2)], None, "1 outcomes for 2 samples in its containers"),
        (-1, [kept("a")], None, "1 outcomes for 0 samples in its containers"),
        (-1, [archive(complete=False)], None, "its end was not seen"),
        (-1, [kept("a"), archive("failed", 1, retryable=True)], None, "is to be tried again, but gave samples"),
    ],
)
def test_what_does_not_add_up_is_refused(
    expected: int, outcomes: list[Outcome], written: int | None, message: str
) -> None:
    with pytest.raises(LedgerError, match=message):
        checked(expected, outcomes, written)


def test_a_sample_and_its_archive_may_have_the_same_key() -> None:
    assert checked(-1, [kept("archive"), archive(count=1)]).counts["in"] == 1


def test_rows_come_back_with_the_place_of_each_kept_sample(tmp_path: Path) -> None:
    outcomes = [Outcome("x", "failed", "broken", "why"), kept("a"), archive(count=3), kept("b")]
    ledger = Ledger(0, -1)
    for outcome in outcomes:
        ledger.add(outcome)
    with Folder.open(tmp_path) as folder:
        with folder.create("ledger.parquet") as file:
            ledger.write(file, [("one", 0, 10), ("two", 10, 20)])
        table = read_ledger(folder)
    assert table.column_names == SCHEMA.names
    found = [(row["key"], row["outcome"], row["file"], row["offset"], row["length"]) for row in table.to_pylist()]
    assert found == [
        ("x", "failed", None, -1, -1),
        ("a", "kept", "one", 0, 10),
        ("archive", "kept", None, -1, -1),
        ("b", "kept", "two", 10, 20),
    ]
