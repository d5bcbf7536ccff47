"""A plan is committed as a whole, numbers its partitions, and notices when a byte of it has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.partitions import plan as plans
from pipeline.partitions.plan import (
    Input,
    Partition,
    PartitionReader,
    commit_plan,
    generations,
    inputs_digest,
    read_plans,
)
from pipeline.storage import Folder, StorageError


@pytest.fixture
def root(memory: Path) -> Iterator[Folder]:
    with Folder.open(memory / "output", create=True) as opened:
        yield opened


def header(generation: int = 0, first: int = 0) -> dict[str, object]:
    return {"generation": generation, "first": first, "kind": "plan"}


def some(number: int, inputs: int = 1) -> list[Partition]:
    return [
        Partition(tuple(Input(f"file {n} {i}", i, i + 1, 5, 7, "tag") for i in range(inputs)), n) for n in range(number)
    ]


@pytest.mark.parametrize(("number", "inputs"), [(1, 1), (999, 1), (1000, 1), (1001, 1), (3100, 2), (7, 20_000)])
def test_partitions_come_back_as_they_were_planned(root: Folder, number: int, inputs: int) -> None:
    planned = some(number, inputs)
    assert commit_plan(root, header(), iter(planned))
    (plan,) = read_plans(root)
    assert (plan.first, plan.stop) == (0, number)
    reader = PartitionReader(root, plan)
    for index in {0, number // 2, number - 1, *range(0, number, 333)}:
        found = reader[index]
        assert (found.inputs, found.count, found.index) == (planned[index].inputs, planned[index].count, index)


def test_keys_of_a_retry_come_back(root: Folder) -> None:
    commit_plan(root, header(), [Partition((Input("a"),), 2, frozenset({"x", "y"}), 2), Partition((Input("b"),))])
    reader = PartitionReader(root, read_plans(root)[0])
    assert reader[0].only == {"x", "y"}
    assert reader[0].wants("x")
    assert not reader[0].wants("z")
    assert reader[1].only is None
    assert reader[1].wants("anything")


def test_a_reader_holds_one_group_of_a_large_plan(root: Folder) -> None:
    commit_plan(root, header(), some(5000))
    reader = PartitionReader(root, read_plans(root)[0])
    assert reader[4321].index == 4321
    assert reader._table.num_rows <= plans.BUCKET


def test_the_first_plan_wins(root: Folder) -> None:
    assert commit_plan(root, header(), some(3))
    assert not commit_plan(root, header(), some(4))
    assert read_plans(root)[0].stop == 3
    assert sorted(os.listdir(root.path)) == ["data", "plan"]


def test_buckets_are_there_before_the_plan_can_be_seen(root: Folder) -> None:
    def seen() -> Iterator[Partition]:
        yield from some(2500)
        assert not root.exists("plan")

    commit_plan(root, header(), seen())
    assert sorted(os.listdir(root.path / "data")) == ["000", "001", "002"]


def test_a_plan_that_fails_leaves_nothing(root: Folder) -> None:
    def broken() -> Iterator[Partition]:
        yield from some(2)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        commit_plan(root, header(), broken())
    assert os.listdir(root.path) == []


def test_a_plan_whose_folder_gc_took_away_does_not_count(root: Folder) -> None:
    def taken() -> Iterator[Partition]:
        yield from some(1)
        (name,) = os.listdir(root.path)
        root.trash(name)
        yield from some(60_000)

    assert not commit_plan(root, header(), taken())
    assert read_plans(root) == []
    assert commit_plan(root, header(), some(2))


def test_an_input_that_vanishes_while_planning_is_no_lost_plan(root: Folder) -> None:
    def vanished() -> Iterator[Partition]:
        yield from some(1)
        raise FileNotFoundError("input/x.jpg")

    with pytest.raises(FileNotFoundError, match="x.jpg"):
        commit_plan(root, header(), vanished())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], 0),
        (["data", ".plan.0123"], 0),
        (["plan"], 1),
        (["plan", "plan.1", "plan.2"], 3),
        (["plan", "plan.2"], 1),
        (["plan.1"], 0),
        (["plan", "plan.1", "plan.10", "plan.x", "planned"], 2),
    ],
)
def test_generations_are_counted_without_gaps(names: list[str], expected: int) -> None:
    assert generations(names) == expected


def test_the_digest_of_inputs_tells_every_field(root: Folder) -> None:
    base = {"path": "a", "start": 1, "stop": 2, "size": 3, "mtime_ns": 4, "etag": "e"}
    plain = inputs_digest([Partition((Input(**base),), 5)])
    others = [
        *(Partition((Input(**{**base, name: "z" if isinstance(v, str) else 99}),), 5) for name, v in base.items()),
        Partition((Input(**base),), 6),
        Partition((Input(**base), Input(**base)), 5),
        Partition((Input(**base),), 5, frozenset()),
    ]
    digests = {inputs_digest([partition]) for partition in others}
    assert len(digests) == len(others)
    assert plain not in digests
    commit_plan(root, header(), [Partition((Input(**base),), 5)])
    assert read_plans(root)[0].header["inputs_digest"] == plain


def test_any_changed_byte_of_a_plan_header_is_noticed(root: Folder) -> None:
    commit_plan(root, header(), some(2))
    path = root.path / "plan/plan.json"
    text = path.read_bytes()
    for at in range(len(text)):
        path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        with pytest.raises(StorageError, match=r"damaged|format_version"):
            read_plans(root)
    path.unlink()
    with pytest.raises(StorageError, match="plan.json is missing: run stage=repair"):
        read_plans(root)


@pytest.mark.parametrize("damage", ["gone", "torn", "garbage"])
def test_damaged_partitions_are_a_clear_error(root: Folder, damage: str) -> None:
    commit_plan(root, header(), some(20))
    path = root.path / "plan/plan.parquet"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[: len(data) // 2] if damage == "torn" else b"PAR1" + b"\xff" * 400 + b"PAR1")
    with pytest.raises(StorageError, match="plan.parquet is missing or damaged.*run stage=repair"):
        PartitionReader(root, read_plans(root)[0])[3]
