"""A run adopts the plan that fits, refuses the one that does not and says why, or makes one; many may try at once."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_stage import Fake, FakeFilter, assert_sound, committed, leftovers, make, outcomes, rank_of, run

from pipeline import storage
from pipeline.config.schema import ConfigError
from pipeline.partitions import engine, planning
from pipeline.partitions.attempt import Superseded
from pipeline.partitions.dataset import Dataset, Unfinished
from pipeline.partitions.plan import Partition, read_plans
from pipeline.partitions.planning import Stale, open_or_plan
from pipeline.storage import Folder, StorageError


@pytest.fixture
def output(memory: Path) -> Path:
    return memory / "output"


def together(*runs: Callable[[], Any]) -> list[Any]:
    """Results, or errors, of functions that run at the same time."""
    results: list[Any] = [None] * len(runs)

    def one(number: int) -> None:
        try:
            results[number] = runs[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ---- the same again


def test_a_finished_output_is_adopted_as_it_is(output: Path) -> None:
    first = run(output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert run(output) == first
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_settings_that_do_not_change_the_result_may_change(output: Path) -> None:
    first = run(output)
    assert run(output, lease=5.0, run_id="x", max_failed_fraction=0.9) == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"colour": "blue"},
            "was made with colour=red, now colour=blue is requested: choose another output= or variant=",
        ),
        ({"count": 21}, "count=20, now count=21"),
        ({"seed": 1}, "seed=0, now seed=1"),
        ({"archives": True}, "archives=false, now archives=true"),
    ],
)
def test_a_changed_setting_is_named(output: Path, settings: dict[str, Any], message: str) -> None:
    run(output)
    before = committed(output)
    with pytest.raises(Stale, match=message):
        run(output, **settings)
    assert committed(output) == before
    assert_sound(output)


def test_another_stage_and_another_version_are_named(output: Path, memory: Path) -> None:
    run(output)

    class Newer(Fake):
        version = 2

    with pytest.raises(Stale, match="was made by version 1 of stage fake, this is 2"):
        run(output, Newer)
    with pytest.raises(Stale, match="is the output of stage fake, not fakefilter"):
        run(output, FakeFilter, input=str(memory / "output"))


def test_a_setting_that_an_older_plan_did_not_know_counts_as_its_default(output: Path) -> None:
    class Older(Fake):
        pass

    stage = make(output)
    dataset = open_or_plan(stage)
    del dataset.plans[0].header["identity"]["colour"]
    planning.require_same(dataset, stage)
    with pytest.raises(Stale, match="colour=red, now colour=blue"):
        planning.require_same(dataset, make(output, colour="blue"))


def test_an_input_that_has_changed_since_the_plan_is_noticed(output: Path) -> None:
    class Rechecked(Fake):
        rechecks = True
        more = looks = 0

        def plan(self, since: int = 0) -> Iterator[Partition]:
            Rechecked.looks += 1
            yield from super().plan(since)
            yield from list(super().plan(since))[: self.more]

    run(output, Rechecked)
    assert Rechecked.looks == 1, "who has just planned need not look again"
    run(output, Rechecked)
    assert Rechecked.looks == 2
    Rechecked.more = 1
    with pytest.raises(Stale, match="the input has changed since it was planned"):
        run(output, Rechecked)


# ---- places that cannot be used


def test_a_folder_with_other_things_is_refused(output: Path) -> None:
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty \(thesis.tex ...\) and no dataset directory"):
        run(output)
    with pytest.raises(ConfigError, match="is not empty"):
        run(output, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["data", "claims", ".git"])
def test_overwrite_takes_nothing_away_that_was_not_planned_by_us(output: Path, name: str) -> None:
    (output / name).mkdir(parents=True)
    (output / name / "precious").write_text("x")
    run(output, overwrite=True)
    assert (output / name / "precious").read_text() == "x"


def test_a_stage_without_inputs_says_so_and_leaves_no_plan(output: Path) -> None:
    with pytest.raises(ConfigError, match="stage fake: there is nothing to do"):
        run(output, count=0)
    assert read_plans(Folder.open(output)) == []
    assert run(output)["counts"]["in"] == 20


def test_an_output_below_a_file_is_one_clear_error(output: Path) -> None:
    output.write_text("a file")
    with pytest.raises(StorageError, match="output .* cannot be made"):
        run(output / "below")


# ---- the upstream


def test_a_missing_upstream_is_named(output: Path, memory: Path) -> None:
    with pytest.raises(Unfinished, match="stage fakefilter cannot start: .*/nothing does not exist"):
        run(output, FakeFilter, input=str(memory / "nothing"))
    assert not output.exists()


def test_an_unfinished_upstream_is_named_with_what_to_run(output: Path, memory: Path) -> None:
    upstream = memory / "upstream"
    open_or_plan(make(upstream))
    with pytest.raises(Unfinished, match=r"is not finished \(no valid _SUCCESS\): run stage=fake again"):
        run(output, FakeFilter, input=str(upstream))
    run(upstream)
    (upstream / "_SUCCESS").unlink()
    with pytest.raises(Unfinished, match="is not finished"):
        run(output, FakeFilter, input=str(upstream))


def test_an_upstream_that_was_made_anew_with_other_content_makes_the_output_stale(output: Path, memory: Path) -> None:
    upstream = memory / "upstream"
    run(upstream)
    run(output, FakeFilter, input=str(upstream))
    run(upstream, colour="blue", overwrite=True)
    with pytest.raises(Stale, match=r"was made from different content of .*/upstream \(its content_digest changed\)"):
        run(output, FakeFilter, input=str(upstream))


def test_an_upstream_that_was_made_anew_with_equal_content_makes_nothing_stale(output: Path, memory: Path) -> None:
    upstream = memory / "upstream"
    run(upstream)
    first = run(output, FakeFilter, input=str(upstream))
    run(upstream, overwrite=True)
    assert run(output, FakeFilter, input=str(upstream)) == first


def test_an_upstream_that_was_moved_makes_nothing_stale(output: Path, memory: Path) -> None:
    run(memory / "upstream")
    first = run(output, FakeFilter, input=str(memory / "upstream"))
    shutil.move(memory / "upstream", memory / "elsewhere")
    assert run(output, FakeFilter, input=str(memory / "elsewhere")) == first


# ---- many at once


def test_two_runs_at_once_give_one_result(output: Path, memory: Path) -> None:
    reference = run(memory / "reference", count=40)
    first, second = together(lambda: run(output, count=40), lambda: run(output, count=40))
    assert first == second == assert_sound(output)
    assert first["content_digest"] == reference["content_digest"]
    assert leftovers(output) == []


def test_of_two_runs_with_different_settings_one_goes_on_and_the_other_is_told(output: Path) -> None:
    results = together(lambda: run(output, colour="red"), lambda: run(output, colour="blue"))
    refused = [result for result in results if isinstance(result, Stale)]
    assert len(refused) == 1
    assert "colour=" in str(refused[0])
    assert_sound(output)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_work_and_the_result_is_the_same(output: Path, memory: Path, world_size: int) -> None:
    run(memory / "reference")
    runs = [lambda rank=rank: run(output, rank=rank_of(rank, world_size)) for rank in range(world_size)]
    results = together(*runs)
    assert all(result == results[0] for result in results)
    assert committed(output) == committed(memory / "reference")
    assert_sound(output)


def test_any_one_of_many_ranks_can_do_everything(output: Path, memory: Path) -> None:
    reference = run(memory / "reference")
    open_or_plan(make(output))
    assert run(output, rank=rank_of(4, 7))["content_digest"] == reference["content_digest"]


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(planning, "time", clock)
    return clock


def test_another_rank_plans_if_rank_0_is_not_there(output: Path, clock: Clock) -> None:
    """As where an indexed Job starts its first pod last: nobody waits for a lease, which is there for the dead."""
    assert run(output, rank=rank_of(1, 2), lease=600.0)["counts"]["in"] == 20
    assert 0 < clock.now <= planning._HEAD_START + 1


def test_another_rank_plans_if_the_one_that_planned_has_died(output: Path, clock: Clock) -> None:
    output.mkdir()
    with Folder.open(output) as root:
        root.mkdir("claims")
        root.write_new("claims/plan", b'{"host": "another", "boot": "", "pid": 1, "start": "", "owner": "x"}')
        looks: list[float] = []

        def silent_for_a_while() -> None:
            looks.append(clock.now)
            if clock.now > 20:
                root.unlink("claims/plan", missing_ok=True)

        clock.slept = silent_for_a_while
        assert run(output, rank=rank_of(1, 2), lease=600.0)["counts"]["in"] == 20
    assert 20 < clock.now <= 20 + planning._LOOK + 1


# ---- overwriting


def test_overwrite_makes_the_output_anew(output: Path) -> None:
    run(output)
    run(output, colour="blue", overwrite=True)
    assert "blue" in str(Dataset.open(output).header["identity"])
    assert_sound(output)
    assert leftovers(output) == []


def test_overwrite_moves_aside_once_in_a_run_of_several_lives(output: Path) -> None:
    run(output, colour="blue", overwrite=True, run_id="one")
    plan = (output / "plan").stat().st_ino
    run(output, colour="blue", overwrite=True, run_id="one")
    assert (output / "plan").stat().st_ino == plan
    run(output, colour="blue", overwrite=True, run_id="two")
    assert (output / "plan").stat().st_ino != plan


def test_overwrite_on_several_ranks_needs_their_common_name(output: Path) -> None:
    with pytest.raises(ConfigError, match="overwrite=true on several ranks needs run_id="):
        run(output, rank=rank_of(1, 2), overwrite=True)


def test_ranks_of_an_overwriting_run_wait_for_its_own_plan(output: Path, memory: Path) -> None:
    run(output)
    settings = {"colour": "blue", "overwrite": True, "run_id": "again"}
    results = together(*[lambda rank=rank: run(output, rank=rank_of(rank, 3), **settings) for rank in (1, 2, 0)])
    assert all(result == results[0] for result in results)
    assert {row.partition(":")[0] for row in outcomes(output).values()} == {"kept", "dropped", "failed"}
    assert results[0]["content_digest"] == run(memory / "reference", colour="blue")["content_digest"]


def test_overwrite_replaces_a_damaged_output(output: Path) -> None:
    run(output)
    (output / "plan/plan.json").write_bytes(b"garbage")
    with pytest.raises(StorageError, match="damaged"):
        run(output)
    run(output, overwrite=True)
    assert_sound(output)


def test_an_overwriter_that_slept_gives_back_what_its_next_life_has_made(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Life 1 looks at the old output and sleeps; life 2 of the same run overwrites and finishes; life 1 wakes."""
    run(output)
    settings = {"colour": "blue", "overwrite": True, "run_id": "one"}
    slept: list[dict[str, Any]] = []

    def interpose(operation: str, path: str, do: Callable[[], Any]) -> Any:
        if operation == "rename" and "/.output." in path and not slept:
            slept.append({})
            slept[0] = run(output, **settings)
        return do()

    monkeypatch.setattr(storage, "interpose", interpose)
    success = run(output, **settings)
    monkeypatch.setattr(storage, "interpose", None)
    assert success == slept[0] == assert_sound(output)
    assert leftovers(output) == []


def test_a_run_whose_output_was_overwritten_meanwhile_says_so(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[dict[str, Any]] = []

    def interpose(operation: str, path: str, do: Callable[[], Any]) -> Any:
        if operation == "rename" and path.endswith("/00003") and not done:
            done.append({})
            done[0] = run(output, colour="blue", overwrite=True)
        return do()

    monkeypatch.setattr(storage, "interpose", interpose)
    with pytest.raises(Superseded, match="was removed or overwritten while we ran"):
        engine.run(make(output))
    monkeypatch.setattr(storage, "interpose", None)
    assert assert_sound(output) == done[0]
