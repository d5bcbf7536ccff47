"""What is added to a finished output: retries, what the upstream has gained, repairs. Every key still counts once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stage import (
    Fake,
    FakeConfig,
    FakeFilter,
    assert_sound,
    committed,
    kept_keys,
    leftovers,
    make,
    outcomes,
    rank_of,
    rows,
    run,
)

from pipeline import storage
from pipeline.config.schema import ShardConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.finalize import Unbalanced
from pipeline.partitions.planning import Stale, open_or_plan
from pipeline.stages.repair import repair
from pipeline.stages.shard import Shard
from pipeline.storage import StorageError

RETRYABLE = {"sample00008", "sample00009", "sample00018", "sample00019"}
FOREVER = {"sample00009", "sample00019"}


@pytest.fixture
def output(memory: Path) -> Path:
    return memory / "output"


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def shard(output: Path, upstream: Path, **settings: Any) -> dict[str, Any]:
    config = ShardConfig(input=str(upstream), output=str(output), partition_size=5, shuffle=True, **settings)
    return engine.run(Shard(config, Rank()))


# ---- retry


def test_a_retry_counts_every_key_once_by_its_newest_outcome(output: Path) -> None:
    first = run(output)
    assert first["counts"] | {"bytes": 0, "containers": 0, "containers_failed": 0} == {
        "in": 20, "kept": 12, "dropped": 2, "failed": 6, "bytes": 0, "containers": 0, "containers_failed": 0,
    }  # fmt: skip
    before = committed(output)
    second = run(output, retry_failed=True)
    counts = second["counts"]
    assert (counts["in"], counts["kept"], counts["dropped"], counts["failed"]) == (20, 14, 2, 4)
    assert_sound(output)
    assert {path: data for path, data in committed(output).items() if path in before} == before
    assert outcomes(output)["sample00008"] == "kept:"


def test_a_retry_tries_just_what_failed_retryably(output: Path) -> None:
    first = run(output)
    run(output, retry_failed=True)
    again = [row["key"] for row in rows(output) if row["partition"] >= first["partitions"]]
    assert sorted(again) == sorted(RETRYABLE)


def test_a_second_retry_tries_just_what_still_fails(output: Path) -> None:
    run(output)
    second = run(output, retry_failed=True)
    third = run(output, retry_failed=True)
    again = [row["key"] for row in rows(output) if row["partition"] >= second["partitions"]]
    assert sorted(again) == sorted(FOREVER)
    assert third["counts"] | {"bytes": 0} == second["counts"] | {"bytes": 0}
    assert_sound(output)


def test_many_retries_stay_sound(output: Path) -> None:
    run(output)
    for _ in range(4):
        run(output, retry_failed=True)
        assert_sound(output)
    assert len(Dataset.open(output).plans) == 5


def test_a_retry_with_nothing_to_retry_adds_nothing(output: Path) -> None:
    first = run(output, count=6)
    assert run(output, count=6, retry_failed=True) == first
    assert len(Dataset.open(output).plans) == 1


def test_a_run_without_retry_adds_nothing(output: Path) -> None:
    run(output)
    run(output, retry_failed=True)
    run(output)
    assert len(Dataset.open(output).plans) == 2


def test_another_life_of_a_retrying_run_does_not_retry_again(output: Path) -> None:
    run(output)
    second = run(output, retry_failed=True, run_id="one")
    assert run(output, retry_failed=True, run_id="one") == second
    assert len(Dataset.open(output).plans) == 2


def test_an_unfinished_output_is_finished_before_it_is_retried(output: Path) -> None:
    open_or_plan(make(output))
    run(output, retry_failed=True)
    assert len(Dataset.open(output).plans) == 1
    run(output, retry_failed=True)
    assert len(Dataset.open(output).plans) == 2
    assert_sound(output)


def test_too_many_failures_can_be_retried(output: Path) -> None:
    """The error advises it, although there is no _SUCCESS yet."""
    with pytest.raises(
        Unbalanced, match=r"6 of 20 samples failed, more than max_failed_fraction=0.25.*retry_failed=true"
    ):
        run(output, max_failed_fraction=0.25)
    assert run(output, max_failed_fraction=0.25, retry_failed=True)["counts"]["failed"] == 4
    assert_sound(output)


def test_too_many_failures_can_be_allowed_afterwards(output: Path) -> None:
    with pytest.raises(Unbalanced):
        run(output, max_failed_fraction=0.25)
    with pytest.raises(Unbalanced):
        run(output, max_failed_fraction=0.25)
    assert run(output, max_failed_fraction=0.3)["counts"]["failed"] == 6


def test_a_failed_archive_is_retried_as_a_whole(output: Path) -> None:
    first = run(output, archives=True)
    assert (first["counts"]["in"], first["counts"]["containers"], first["counts"]["containers_failed"]) == (16, 5, 1)
    second = run(output, archives=True, retry_failed=True)
    counts = second["counts"]
    assert (counts["in"], counts["containers"], counts["containers_failed"]) == (20, 5, 0)
    assert_sound(output)
    third = run(output, archives=True, retry_failed=True)
    assert third["counts"] | {"bytes": 0} == second["counts"] | {"bytes": 0}
    assert_sound(output)


def test_too_many_failed_archives_are_refused(output: Path) -> None:
    with pytest.raises(Unbalanced, match="1 of 5 archives failed"):
        run(output, archives=True, count=5, partition_size=1, max_failed_fraction=0.15)


def test_other_ranks_take_part_in_a_retry(output: Path) -> None:
    run(output)
    stage = make(output, rank=rank_of(1, 2), retry_failed=True, run_id="one")
    open_or_plan(make(output, retry_failed=True, run_id="one"))
    assert len(open_or_plan(stage).plans) == 2
    assert engine.run(stage)["counts"]["failed"] == 4


# ---- what the upstream has gained


@pytest.fixture
def line(memory: Path) -> tuple[Path, Path, Path]:
    """An upstream, a filter of it and shards of that, all finished."""
    upstream, filtered, shards = memory / "upstream", memory / "filter", memory / "shard"
    run(upstream)
    run(filtered, FakeFilter, input=str(upstream))
    shard(shards, filtered)
    return upstream, filtered, shards


def test_a_retry_upstream_is_appended_downstream(line: tuple[Path, Path, Path]) -> None:
    upstream, filtered, shards = line
    before, before_shards = committed(filtered), committed(shards)
    run(upstream, retry_failed=True)
    appended = run(filtered, FakeFilter, input=str(upstream))
    assert appended["counts"]["in"] == 14
    shard(shards, filtered)
    for place, old in ((filtered, before), (shards, before_shards)):
        assert_sound(place)
        assert {path: data for path, data in committed(place).items() if path in old} == old
    assert sorted(kept_keys(shards)) == sorted(kept_keys(filtered))
    assert {"sample00008", "sample00018"} <= set(kept_keys(shards))


def test_retries_of_every_stage_add_up(line: tuple[Path, Path, Path]) -> None:
    upstream, filtered, shards = line
    run(filtered, FakeFilter, input=str(upstream), retry_failed=True)
    run(upstream, retry_failed=True)
    run(filtered, FakeFilter, input=str(upstream))
    run(filtered, FakeFilter, input=str(upstream), retry_failed=True)
    shard(shards, filtered)
    for place in line:
        assert_sound(place)
    expected = sorted(k for k, said in outcomes(upstream).items() if said.startswith("kept") and not k.endswith("5"))
    assert sorted(kept_keys(shards)) == expected


def test_an_append_is_the_same_whoever_does_it(memory: Path, line: tuple[Path, Path, Path]) -> None:
    upstream, filtered, _ = line
    shutil.copytree(filtered, memory / "copy")
    run(upstream, retry_failed=True)
    run(filtered, FakeFilter, input=str(upstream))
    stages = [make(memory / "copy", FakeFilter, rank_of(n, 2), input=str(upstream), lease=1.0) for n in (0, 1)]
    engine.run(stages[0])
    engine.run(stages[1])
    assert committed(memory / "copy") == committed(filtered)


def test_an_upstream_that_gained_while_the_output_was_unfinished_is_no_dead_end(memory: Path) -> None:
    upstream, filtered = memory / "upstream", memory / "filter"
    run(upstream)
    open_or_plan(make(filtered, FakeFilter, input=str(upstream)))
    run(upstream, retry_failed=True)
    run(filtered, FakeFilter, input=str(upstream))
    assert_sound(filtered)
    assert len(Dataset.open(filtered).plans) == 2


def test_a_retry_upstream_that_brought_nothing_is_appended_as_nothing(line: tuple[Path, Path, Path]) -> None:
    upstream, filtered, shards = line
    run(upstream, retry_failed=True)
    run(filtered, FakeFilter, input=str(upstream))
    shard(shards, filtered)
    keys = kept_keys(shards)
    run(upstream, retry_failed=True)  # fails for all of them again
    run(filtered, FakeFilter, input=str(upstream))
    shard(shards, filtered)
    for place in line:
        assert_sound(place)
    assert kept_keys(shards) == keys


def test_an_upstream_that_lost_what_we_were_made_of_is_refused(memory: Path, line: tuple[Path, Path, Path]) -> None:
    upstream, filtered, shards = line
    run(upstream, retry_failed=True)
    run(filtered, FakeFilter, input=str(upstream))
    shard(shards, filtered)
    shutil.rmtree(upstream)
    run(upstream)
    with pytest.raises(Stale, match="was made from different content"):
        run(filtered, FakeFilter, input=str(upstream))


def test_a_worker_goes_on_with_what_was_added_while_it_worked(
    memory: Path, line: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow rank holds the old upstream; upstream and plan grow; the rank finds new partitions and does them."""
    upstream, filtered, _ = line
    shutil.rmtree(filtered)
    slow = make(filtered, FakeFilter, input=str(upstream))
    open_or_plan(slow)
    grown: list[int] = []

    def interpose(operation: str, path: str, do: Callable[[], Any]) -> Any:
        if operation == "rename" and path.endswith("/00002") and not grown:
            grown.append(1)
            run(upstream, retry_failed=True)
            open_or_plan(make(filtered, FakeFilter, input=str(upstream)))
        return do()

    monkeypatch.setattr(storage, "interpose", interpose)
    success = engine.run(slow)
    monkeypatch.setattr(storage, "interpose", None)
    assert len(success["plans"]) == 2
    assert success["counts"]["in"] == 14
    assert_sound(filtered)


# ---- repair


@pytest.mark.parametrize("what", ["ledger.parquet", "record.json", "shard.00000.mds"])
@pytest.mark.parametrize("how", ["flipped", "removed", "cut", "added"])
def test_a_repair_gives_the_digest_as_before(output: Path, what: str, how: str) -> None:
    before = run(output)
    same = committed(output)
    path = output / "data/000/00001" / what
    if how == "flipped":
        flip(path, len(path.read_bytes()) // 2)
    elif how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.with_name("stray").write_bytes(b"x")
    after = repair(output, Rank())
    assert after is not None
    assert after["content_digest"] == before["content_digest"]
    assert_sound(output)
    assert leftovers(output) == []
    assert [data for path, data in sorted(committed(output).items())] == [data for path, data in sorted(same.items())]


@pytest.mark.parametrize("name", ["manifest.parquet", "manifest.json", "index.json", "_SUCCESS"])
@pytest.mark.parametrize("how", ["flipped", "removed"])
def test_what_lies_at_the_root_is_mended(output: Path, name: str, how: str) -> None:
    before = run(output)
    flip(output / name) if how == "flipped" else (output / name).unlink()
    after = repair(output, Rank())
    assert after is not None
    assert after["content_digest"] == before["content_digest"]
    assert_sound(output)


@pytest.mark.parametrize("name", ["plan/plan.json", "plan/plan.parquet", "plan.1/plan.json", "plan.1/plan.parquet"])
@pytest.mark.parametrize("how", ["flipped", "removed"])
def test_a_damaged_plan_is_mended_to_the_byte(output: Path, name: str, how: str) -> None:
    run(output)
    before = run(output, retry_failed=True)
    data = (output / name).read_bytes()
    flip(output / name, 40) if how == "flipped" else (output / name).unlink()
    after = repair(output, Rank())
    assert after is not None
    assert after["content_digest"] == before["content_digest"]
    assert (output / name).read_bytes() == data
    assert_sound(output)


def test_damage_everywhere_is_mended_at_once(output: Path) -> None:
    before = run(output)
    for name in ("plan/plan.parquet", "manifest.parquet", "index.json", "data/000/00000/ledger.parquet"):
        flip(output / name, 30)
    shutil.rmtree(output / "data/000/00003")
    after = repair(output, Rank())
    assert after is not None
    assert after["content_digest"] == before["content_digest"]
    assert_sound(output)


def test_a_plan_that_nothing_knows_any_more_is_refused(output: Path) -> None:
    run(output)
    flip(output / "plan/plan.json", 40)
    (output / "_SUCCESS").unlink()
    with pytest.raises(StorageError, match="damaged"):
        repair(output, Rank())


def test_a_sound_output_is_left_alone(output: Path) -> None:
    run(output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert repair(output, Rank()) is None
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_repairs_may_follow_each_other_and_other_generations(output: Path) -> None:
    run(output)
    before = run(output, retry_failed=True)
    for _ in range(3):
        for path in output.glob("data/000/0000[15]*/ledger.parquet"):
            flip(path, 60)
        after = repair(output, Rank())
        assert after is not None
        assert after["content_digest"] == before["content_digest"]
        assert_sound(output)
        assert leftovers(output) == []
    third = run(output, retry_failed=True)
    assert third["counts"] | {"bytes": 0} == before["counts"] | {"bytes": 0}
    assert_sound(output)


def test_a_repaired_upstream_makes_nothing_stale(line: tuple[Path, Path, Path]) -> None:
    upstream, filtered, _ = line
    first = Dataset.open(filtered).require_success()
    flip(upstream / "data/000/00002/ledger.parquet", 60)
    repair(upstream, Rank())
    assert run(filtered, FakeFilter, input=str(upstream)) == first


def test_an_output_that_was_moved_is_repaired_where_it_is(output: Path, memory: Path) -> None:
    before = run(output)
    shutil.move(output, memory / "elsewhere")
    flip(memory / "elsewhere/data/000/00001/ledger.parquet", 60)
    after = repair(memory / "elsewhere", Rank())
    assert after is not None
    assert after["content_digest"] == before["content_digest"]
    assert not output.exists()


def test_a_repair_does_not_let_more_fail_than_was_allowed(output: Path) -> None:
    with pytest.raises(Unbalanced):
        run(output, max_failed_fraction=0.25)
    flip(output / "data/000/00001/ledger.parquet", 60)
    with pytest.raises(Unbalanced, match="max_failed_fraction=0.25"):
        repair(output, Rank())
    assert Dataset.open(output).success is None


def test_an_unfinished_output_keeps_its_sound_partitions_and_names(output: Path) -> None:
    reference = run(output)
    (output / "_SUCCESS").unlink()
    shutil.rmtree(output / "data/000/00004")
    flip(output / "data/000/00001/ledger.parquet", 60)
    after = repair(output, Rank())
    assert after is not None
    assert after["content_digest"] == reference["content_digest"]
    assert leftovers(output) == []
    assert sorted(path.name for path in (output / "data/000").iterdir()) == [
        "00000", "00001.1", "00002", "00003", "00004",
    ]  # fmt: skip


def test_a_repair_of_changed_inputs_says_so_even_if_it_was_interrupted(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changed(Fake):
        name = "fake"

        def process(self, partition: Any, context: Any) -> Any:
            for outcome in super().process(partition, context):
                if outcome.row is not None:
                    outcome.row["caption"] += " (changed)"
                yield outcome

    run(output)
    flip(output / "data/000/00001/ledger.parquet", 60)
    monkeypatch.setattr("pipeline.stages.get_stage", lambda name: Changed)

    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.Worker, "_attempt", stopped)
        with pytest.raises(KeyboardInterrupt):
            repair(output, Rank())
    with pytest.raises(StorageError, match="its content differs from before"):
        repair(output, Rank())


def test_a_damaged_upstream_is_named_instead_of_read(line: tuple[Path, Path, Path], memory: Path) -> None:
    upstream, _, _ = line
    for name, message in (
        ("manifest.parquet", "manifest.parquet is damaged, or was extended"),
        ("data/000/00001/ledger.parquet", "00001 is damaged: run stage=repair on"),
        ("data/000/00001/record.json", "record.json is damaged"),
    ):
        data = (upstream / name).read_bytes()
        flip(upstream / name, 50)
        with pytest.raises(StorageError, match=message):
            run(memory / "another", FakeFilter, input=str(upstream))
        (upstream / name).write_bytes(data)
    run(memory / "another", FakeFilter, input=str(upstream))
    shutil.rmtree(upstream / "data/000/00003")
    with pytest.raises(StorageError, match="00003 is missing: run stage=repair"):
        run(memory / "yet another", FakeFilter, input=str(upstream))


def test_the_fake_settings_are_all_part_of_the_identity_but_one() -> None:
    own = set(FakeConfig.__annotations__) - {"max_failed_fraction"}
    identity = {f.name for f in dataclasses.fields(FakeConfig) if f.metadata["identity"]}
    assert identity == own | {"seed"}
