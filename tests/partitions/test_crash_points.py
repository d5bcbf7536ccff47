"""A process may be killed, or refused by the disk, at every single operation: run again, the result is the same.

Every scenario is run again and again, each time ended some operations later, until it passes undisturbed: three at a
time, or at every single one with ``CRASH_POINTS_EVERY=1`` (``make crash-points``), which takes three times as long.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_stage import FakeFilter, assert_sound, committed, leftovers, run

from pipeline import storage
from pipeline.distributed import Rank
from pipeline.partitions.attempt import Superseded
from pipeline.partitions.dataset import Dataset
from pipeline.stages.compact import compact_below
from pipeline.stages.release import release
from pipeline.stages.repair import repair
from pipeline.stages.takedown import takedown
from pipeline.storage import StorageError

SMALL: dict[str, Any] = {"count": 10, "partition_size": 4, "lease": 0.05}
EVERY = int(os.environ.get("CRASH_POINTS_EVERY", "3"))
"""Operations from one trial to the next."""
WRITES = ("makedirs", "mkdir", "create", "write", "write_small", "fsync")


@dataclass(frozen=True)
class Scenario:
    """What is there before (in ``<folder>/output``, and what it is made from next to it), and what is done."""

    before: Callable[[Path], Any]
    act: Callable[[Path], Any]
    operations: int = 100
    """How many there are at least, lest we believe to have tried what we have not."""


def finished(folder: Path) -> None:
    run(folder / "output", **SMALL)


def damaged(folder: Path) -> None:
    finished(folder)
    (folder / "output/data/000/00001/ledger.parquet").write_bytes(b"x")
    (folder / "output/plan/plan.parquet").write_bytes(b"x")
    (folder / "output/index.json").unlink()


def gained(folder: Path) -> None:
    run(folder / "upstream", **SMALL)
    run(folder / "output", FakeFilter, input=str(folder / "upstream"), lease=SMALL["lease"])
    run(folder / "upstream", **SMALL, retry_failed=True)


def unwanted(folder: Path) -> None:
    run(folder / "upstream", **{**SMALL, "count": 5})
    run(folder / "output", FakeFilter, input=str(folder / "upstream"), lease=SMALL["lease"])
    (folder / "wanted.txt").write_text("sample00001\nsample00003\n")


def compact_all(folder: Path) -> None:
    list(compact_below(folder / "output", Rank()))


def packed_and_unwanted(folder: Path) -> None:
    run(folder / "output", **{**SMALL, "count": 5}, compact=True)
    (folder / "wanted.txt").write_text("sample00001\nsample00003\n")


def small(folder: Path) -> None:
    run(folder / "output", **{**SMALL, "count": 7})


SCENARIOS = {
    "a first run": Scenario(lambda folder: None, lambda folder: run(folder / "output", **{**SMALL, "count": 18})),
    "a retry": Scenario(finished, lambda folder: run(folder / "output", **SMALL, retry_failed=True, run_id="one")),
    "a repair": Scenario(damaged, lambda folder: repair(folder / "output", Rank())),
    "an append": Scenario(
        gained, lambda f: run(f / "output", FakeFilter, input=str(f / "upstream"), lease=SMALL["lease"])
    ),
    "a takedown": Scenario(unwanted, lambda folder: takedown(folder, folder / "wanted.txt", Rank())),
    "a compaction": Scenario(small, lambda folder: compact_all(folder), 20),
    "a takedown of packed samples": Scenario(
        packed_and_unwanted, lambda folder: takedown(folder, folder / "wanted.txt", Rank())
    ),
    "a release": Scenario(small, lambda folder: release(folder / "output", Rank())),
    "an overwrite": Scenario(
        finished, lambda f: run(f / "output", **SMALL, colour="blue", overwrite=True, run_id="one")
    ),
}


@pytest.fixture(params=SCENARIOS)
def scenario(request: pytest.FixtureRequest) -> Scenario:
    return SCENARIOS[request.param]


@pytest.fixture
def tries(memory: Path, scenario: Scenario) -> Iterator[Callable[[], Path]]:
    """Makes a fresh copy of what is there before."""
    (memory / "before").mkdir()
    scenario.before(memory / "before")
    place = memory / "try"  # always the same, because plans name it

    def fresh() -> Path:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(memory / "before", place)
        return place

    return fresh


@pytest.fixture
def reference(memory: Path, scenario: Scenario) -> tuple[str, list[bytes]]:
    """Content digest and committed bytes of the undisturbed scenario."""
    folder = memory / "reference"
    folder.mkdir()
    scenario.before(folder)
    scenario.act(folder)
    assert_sound(folder / "output")
    return result(folder)


def result(folder: Path) -> tuple[str, list[bytes]]:
    """Content digest and committed bytes of a finished output, without anything left over."""
    success = Dataset.open(folder / "output").require_success()
    for name, digest in success["digests"].items():
        assert storage.digest((folder / "output" / name).read_bytes()) == digest, name
    assert leftovers(folder / "output") == []
    return success["content_digest"], [data for _, data in sorted(committed(folder / "output").items())]


class At:
    """Interposes: does ``harm`` at operation number ``k`` (of those in ``only``), or from there on (``every``)."""

    def __init__(
        self,
        k: int,
        harm: Callable[[str, str, Callable[[], Any]], Any],
        every: bool = False,
        only: tuple[str, ...] | None = None,
    ) -> None:
        self.k = k
        self.harm = harm
        self.every = every
        self.only = only
        self.count = -1

    def __call__(self, operation: str, path: str, do: Callable[[], Any]) -> Any:
        if self.only is not None and operation not in self.only:
            return do()
        self.count += 1
        if self.count == self.k or (self.every and self.count > self.k):
            return self.harm(operation, path, do)
        return do()


# ---- killed


def die(operation: str, path: str, do: Callable[[], Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(operation: str, path: str, do: Callable[[], Any]) -> None:
    """A write of which half reaches the disk."""
    before = os.stat(path).st_size if os.path.isfile(path) else 0
    try:
        do()
        os.truncate(path, (before + os.stat(path).st_size) // 2)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def in_child(act: Callable[[], Any], interposer: Callable[..., Any]) -> str:
    """Run ``act`` in a process of its own with the interposer: ``killed``, ``done``, ``undisturbed``, or its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "failed by itself"
        try:
            storage.interpose = interposer
            act()
            said = "undisturbed" if isinstance(interposer, At) and interposer.count < interposer.k else "done"
        except StorageError as error:
            said = f"error: {error}"
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert said != "failed by itself"
    return "killed" if killed else said


def killed(act: Callable[[], Any], interposer: Callable[..., Any]) -> bool:
    return in_child(act, interposer) == "killed"


@pytest.mark.parametrize(
    ("harm", "only", "least"),
    [(die, None, 100), (die_half_way, ("write", "write_small"), 12)],  # of a scenario with 100 operations
    ids=["before it", "half-way in a write"],
)
def test_killed_at_any_operation_and_run_again_the_result_is_the_same(
    scenario: Scenario,
    tries: Callable[[], Path],
    reference: tuple[str, list[bytes]],
    harm: Callable[..., Any],
    only: tuple[str, ...] | None,
    least: int,
) -> None:
    k = 0
    while True:
        folder = tries()
        if not killed(lambda folder=folder: scenario.act(folder), At(k, harm, only=only)):  # type: ignore[misc]
            break
        scenario.act(folder)
        assert result(folder) == reference, f"killed at operation {k}"
        k += EVERY if only is None else 1
    assert result(folder) == reference
    assert k >= least * scenario.operations // 100


def test_killed_again_and_again_it_comes_to_its_end(memory: Path) -> None:
    """Every life gets a little further, is killed, and leaves what it did to the next."""
    reference = run(memory / "reference", **SMALL)
    lives = 0
    while killed(lambda: run(memory / "output", **SMALL), At(80 + lives % 9, die)):
        lives += 1
    assert lives >= 2
    assert assert_sound(memory / "output")["content_digest"] == reference["content_digest"]
    assert leftovers(memory / "output") == []


# ---- refused by the disk


def refuse(code: int, operations: tuple[str, ...] | None = None) -> Callable[..., Any]:
    def harm(operation: str, path: str, do: Callable[[], Any]) -> Any:
        if operations is None or operation in operations:
            raise OSError(code, os.strerror(code), path)
        return do()

    return harm


@pytest.mark.parametrize(
    ("code", "operations", "every"),
    [(errno.EIO, None, False), (errno.ENOSPC, WRITES, True), (errno.EROFS, (*WRITES, "rename", "unlink"), True)],
    ids=["one I/O error", "the disk full from then on", "read-only from then on"],
)
def test_refused_at_any_operation_there_is_a_clear_error_and_run_again_the_result_is_the_same(
    scenario: Scenario,
    tries: Callable[[], Path],
    reference: tuple[str, list[bytes]],
    code: int,
    operations: tuple[str, ...] | None,
    every: bool,
) -> None:
    k = 0
    refused = 0
    said = ""
    while said != "undisturbed":
        folder = tries()
        said = in_child(lambda folder=folder: scenario.act(folder), At(k, refuse(code, operations), every))  # type: ignore[misc]
        assert said in ("done", "undisturbed") or os.strerror(code) in said, f"operation {k}: {said}"
        refused += said.startswith("error")
        scenario.act(folder)
        assert result(folder) == reference, f"refused at operation {k}"
        k += (5 if every else 2) * EVERY
    assert refused >= max(1, scenario.operations // (10 * EVERY))


@pytest.mark.parametrize("operation", ["stat", "read", "open", "listdir"])
def test_a_look_up_that_finds_nothing_for_once_does_no_harm(
    scenario: Scenario,
    tries: Callable[[], Path],
    reference: tuple[str, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
) -> None:
    """What was created by another node may not be seen for a while."""
    k = 0
    while True:
        folder = tries()
        seen = [-1]

        def stale(
            what: str, path: str, do: Callable[[], Any], k: int = k, seen: list[int] = seen, place: str = str(folder)
        ) -> Any:
            if what != operation or place not in path:
                return do()
            seen[0] += 1
            if seen[0] != k:
                return do()
            if operation == "listdir":
                return []
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "interpose", stale)
            with suppress(StorageError, Superseded, ValueError):
                scenario.act(folder)
        if seen[0] < k:
            break
        scenario.act(folder)
        assert result(folder) == reference, f"{operation} number {k}"
        k += EVERY


# ---- what was committed before a kill stays as it is


def test_what_was_committed_is_not_done_again(memory: Path) -> None:
    """The work of a killed life is kept: the next one does only what is missing."""
    output = memory / "output"
    renames = [0]

    def at_the_fourth_commit(operation: str, path: str, do: Callable[[], Any]) -> Any:
        renames[0] += operation == "rename" and "/data/000/0" in path
        if renames[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return do()

    assert killed(lambda: run(output), at_the_fourth_commit)
    inodes = {path.name: path.stat().st_ino for path in output.glob("data/000/0*")}
    assert sorted(inodes) == ["00000", "00001", "00002"]
    run(output)
    for name, inode in inodes.items():
        assert (output / "data/000" / name).stat().st_ino == inode
    assert Dataset.open(output).require_success()["counts"]["in"] == 20
