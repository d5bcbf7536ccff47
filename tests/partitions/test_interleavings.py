"""Whatever interleaving of workers, planners, gc, repairs and overwriting runs, asleep, killed or misled: the promises.

``LATENTMILL_EXAMPLES=5000`` explores more, and other examples each time.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_stage import assert_sound, leftovers, make, rank_of, run, slot_files
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from interleaving import Actor, World

from pipeline import storage
from pipeline.distributed import Rank
from pipeline.partitions import claims, dataset, engine, finalize, plan, planning
from pipeline.partitions import compact as compaction
from pipeline.partitions.compact import buckets_of, compact
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.gc import collect
from pipeline.partitions.packs import list_packs
from pipeline.stages.repair import repair
from pipeline.storage import Folder

EXAMPLES = int(os.environ.get("LATENTMILL_EXAMPLES", "0"))
SMALL: dict[str, Any] = {"count": 10, "partition_size": 4}
MOST_ALIVE = 5
MOST_STEPS = 1500
SCENES = [
    ("nothing", ("worker", "worker", "worker")),
    ("planned", ("worker", "worker", "worker", "gc")),
    ("planned", ("worker", "worker", "overwrite", "overwrite")),
    ("committed", ("worker", "worker", "worker")),
    ("finished", ("retry", "worker", "retry")),
    ("finished", ("overwrite", "retry", "overwrite", "overwrite")),
    ("finished", ("compact", "compact", "retry")),
    ("finished", ("compact", "overwrite", "compact", "gc")),
    ("packed", ("repair", "retry", "compact", "gc")),
    ("damaged", ("repair", "repair", "gc")),
    ("damaged", ("repair", "worker", "worker", "overwrite")),
]
EXPLORED = {
    "commit won": 50,
    "commit lost: taken": 2,
    "plan lost: taken": 2,
    "publish lost: gone": 1,
    "killed": 7,
    "stale look-ups": 1,
    "renames that succeeded and reported ENOENT": 1,
    "partitions damaged": 7,
    "gc deleted": 1,
    "woke after gc": 1,
    "woke after overwrite": 7,
    "woke after plan": 7,
    "woke after repair": 1,
    "woke after success": 7,
}
"""How often at least each of these must have happened, lest we believe to have tried what we have not."""
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
POINTS = ("commit", "plan", "finish", "publish", "trash", "move aside", "mkdir", "create", "listdir", "read", "delete")


@cache
def reference(colour: str, retries: int) -> tuple[str, dict[int, dict[str, bytes]]]:
    """Content digest and partition → files of what an undisturbed run, retried so many times, commits."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        output = Path(folder) / "output"
        for number in range(retries + 1):
            success = run(output, **SMALL, colour=colour, retry_failed=number > 0)
        slots = {int(path.name): files_in(path) for path in output.glob("data/*/0*")}
    return success["content_digest"], slots


def compact_all(output: Path) -> None:
    found = Dataset.open(output)
    compact(found, buckets_of(found))


def files_in(slot: Path) -> dict[str, bytes]:
    """Its data files and ledger; what is being removed from it is in a pack."""
    interposed, storage.interpose = storage.interpose, None
    try:
        return slot_files(slot)
    finally:
        storage.interpose = interposed


class Interleavings(RuleBasedStateMachine):
    """Any number of processes on one output. The promises are checked between any two moves."""

    statistics: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        folder = Path(tempfile.mkdtemp(dir=MEMORY, prefix="latentmill-test-"))
        self.world = World(folder, self.statistics).__enter__()
        self.output = folder / "output"
        self.committed: dict[tuple[int, str], tuple[int, dict[str, bytes]]] = {}
        self.damaged: set[tuple[int, str]] = set()
        self.planned: dict[tuple[int, str], bytes] = {}
        self.successful: tuple[int, list[str]] | None = None
        self.retries = 0
        self.overwrites = 0
        self.events: list[tuple[int, str]] = []  # (when, what) of things that sleepers sleep through
        self.slept_since: dict[Actor, int] = {}
        self.held: dict[int, Folder] = {}
        self.stepped = 0

    def teardown(self) -> None:
        try:
            self.come_to_the_end()
        finally:
            self.world.__exit__()

    def root(self) -> int:
        """Which folder the output is: it is held open, so that no later one gets its number."""
        folder = Folder.open(self.output)
        inode = os.fstat(folder.fd).st_ino
        self.held.setdefault(inode, folder)
        return inode

    # ---- moves

    @initialize(blind=st.integers(0, 3), scene=st.sampled_from(SCENES), seed=st.integers(0, 2**32))
    def begin(self, blind: int, scene: tuple[str, tuple[str, ...]], seed: int) -> None:
        """Blind: claims hold nobody off, so that all work is done by all at once."""
        there, kinds = scene
        if there == "planned":
            planning.open_or_plan(make(self.output, **SMALL))
        elif there != "nothing":
            run(self.output, **SMALL)
        if there == "committed":
            for name in ("_SUCCESS", "manifest.json", "manifest.parquet", "index.json"):
                (self.output / name).unlink()
        if blind:
            self.world._patch.setattr(claims.Claims, "take", lambda claims, name: True)
        if there == "packed":
            compact_all(self.output)
        if there in ("damaged", "packed"):
            self.success_is_true_and_stays()
            self.what_is_committed_stays_and_is_right()
            for which in (seed, seed + 1):
                self.damage(which=which % 10, name="ledger.parquet")
        for number, kind in enumerate(kinds):
            self.start(kind=kind, rank=number)
        self.all_go(seed=seed, moves=len(kinds) * 20, longest=(1, 3, 40)[seed % 3])

    def spawn(self, kind: str, function: Callable[[], Any]) -> None:
        self.world.spawn(kind, function)

    def has_room(self) -> bool:
        return len(self.world.alive) < MOST_ALIVE

    def has_actors(self) -> bool:
        return bool(self.world.alive)

    def colour(self) -> str:
        """What the output that is there is made with."""
        try:
            header = Folder.open(self.output).read_json("plan/plan.json")
        except (OSError, storage.StorageError):
            header = None
        return header["identity"]["colour"] if header else "red"

    @precondition(has_room)
    @rule(
        kind=st.sampled_from(["worker", "worker", "retry", "overwrite", "gc", "repair", "compact"]),
        rank=st.integers(0, 2),
    )
    def start(self, kind: str, rank: int) -> None:
        """A process that has not done anything yet."""
        colour = self.colour()
        settings = {**SMALL, "colour": colour}
        if kind == "worker":
            self.spawn(kind, lambda: run(self.output, rank=rank_of(rank, 3), **settings))
        elif kind == "retry" and self.retries < 2:
            self.retries += 1
            name = f"retry {self.retries}"
            self.spawn(kind, lambda: run(self.output, **settings, retry_failed=True, run_id=name))
        elif kind == "overwrite":  # now and then another life, or another rank, of a run that is there
            name = f"overwrite {rank}"
            settings["colour"] = ("red", "blue")[rank % 2]
            on = rank_of(int(self.overwrites % 3 == 2), 2)
            self.overwrites += 1
            self.spawn(kind, lambda: run(self.output, rank=on, **settings, overwrite=True, run_id=name))
        elif kind == "gc" and (self.output / "plan").exists():
            self.spawn(kind, lambda: list(collect(Dataset.open(self.output), 0.0)))
        elif kind == "repair" and (self.output / "plan").exists():
            self.spawn(kind, lambda: repair(self.output, Rank()))
        elif kind == "compact" and (self.output / "plan").exists():
            self.spawn(kind, lambda: compact_all(self.output))

    @precondition(lambda self: self.successful is not None and len(self.damaged) < 3)
    @rule(which=st.integers(0, 9), name=st.sampled_from(["ledger.parquet", "record.json", "shard.00000.mds"]))
    def damage(self, which: int, name: str) -> None:
        """The disk loses a byte of a partition that counts."""
        if not self.output.exists() or self.success() is None:
            return
        there = Dataset.open(self.output)
        if name != "shard.00000.mds" and list_packs(there.root):
            return  # the pack's copy is read
        slot = there.path_of(which % there.partitions)
        path = self.output / slot / name
        place = (self.root(), slot)
        if path.exists() and place not in self.damaged:
            data = path.read_bytes()
            path.write_bytes(data[:30] + bytes([data[30] ^ 0xFF]) + data[31:])
            self.damaged.add(place)
            self.statistics["partitions damaged"] += 1

    @precondition(has_actors)
    @rule(seed=st.integers(0, 2**32), moves=st.integers(5, 30), longest=st.sampled_from([1, 5, 40]))
    def all_go(self, seed: int, moves: int, longest: int) -> None:
        """Everybody goes on, now this one, now that one."""
        chance = random.Random(seed)
        for _ in range(moves):
            self.move(chance.randrange(99), chance.randint(1, longest))

    @precondition(has_actors)
    @rule(seed=st.integers(0, 2**32), moves=st.integers(1, 10))
    def all_go_to_points(self, seed: int, moves: int) -> None:
        """Up to just before an operation that matters: there they stay until they are moved again."""
        chance = random.Random(seed)
        for _ in range(moves):
            self.move(chance.randrange(99), 300, chance.choice(POINTS))

    @precondition(has_actors)
    @rule(point=st.sampled_from(POINTS))
    def all_meet_at(self, point: str) -> None:
        for who in range(len(self.world.alive)):
            self.move(who, 300, point)

    @precondition(has_actors)
    @rule(who=st.integers(0, 99))
    def one_goes_far(self, who: int) -> None:
        self.move(who, MOST_STEPS if who % 2 else 150)

    @precondition(lambda self: self.has_room() and self.has_actors())
    @rule()
    def gc_runs_while_all_sleep(self) -> None:
        self.start(kind="gc", rank=0)
        if self.world.alive[-1].kind == "gc":
            self.move(len(self.world.alive) - 1, MOST_STEPS)

    @precondition(has_actors)
    @rule(who=st.integers(0, 99))
    def kill(self, who: int) -> None:
        self.pick(who).kill()
        self.statistics["killed"] += 1

    @precondition(has_actors)
    @rule(who=st.integers(0, 99), look_ups=st.integers(1, 25), back=st.integers(0, 400))
    def mislead(self, who: int, look_ups: int, back: int) -> None:
        """Its next look-ups are answered as of a while ago."""
        actor = self.pick(who)
        actor.horizon = max(0, self.world.operations - back)
        actor.stale_look_ups = look_ups

    @precondition(has_actors)
    @rule(who=st.integers(0, 99))
    def retransmit(self, who: int) -> None:
        """Its next rename succeeds and reports ENOENT."""
        self.pick(who).enoent_after_rename = True

    def pick(self, who: int) -> Actor:
        alive = self.world.alive
        return alive[who % len(alive)]

    def move(self, who: int, steps: int, before: str = "") -> None:
        if not self.world.alive:
            return
        actor = self.pick(who)
        since = self.slept_since.pop(actor, self.stepped)
        for what in {what for when, what in self.events if when > since}:
            self.statistics[f"woke after {what}"] += 1
        kinds = self.snapshot()
        actor.run(steps, before)
        self.stepped += 1
        for what in self.snapshot() - kinds:
            self.events.append((self.stepped, what.partition(" ")[0]))
        for other in self.world.alive:
            self.slept_since.setdefault(other, self.stepped)
        if actor.done:
            said = re.sub(r"/\S+|\d+|[0-9a-f]{32}", "_", f"{type(actor.error).__name__}: {actor.error}"[:200])
            self.statistics[f"{actor.kind} ended: {said if actor.error else 'done'}"] += 1
            if actor.kind == "gc" and actor.result:
                self.events.append((self.stepped, "gc"))
                self.statistics["gc deleted"] += len(actor.result)

    def snapshot(self) -> set[str]:
        """What a sleeper would want to know."""
        if not self.output.exists():
            return set()
        root = self.root()
        found = {f"overwrite {root}"}
        for path in self.output.glob("plan*/plan.json"):
            kind = "repair" if b'"kind": "repair"' in path.read_bytes() else "plan"
            found.add(f"{kind} {root} {path.parent.name}")
        if (self.output / "_SUCCESS").exists():
            found.add(f"success {root} {(self.output / '_SUCCESS').stat().st_ino}")
        return found

    # ---- promises

    @invariant()
    def nothing_unexpected_is_raised(self) -> None:
        for actor in self.world.actors:
            assert not actor.unexpected, actor.unexpected

    @invariant()
    def what_is_committed_stays_and_is_right(self) -> None:
        if not self.output.exists():
            return
        root = self.root()
        slots = {str(path.relative_to(self.output)): path for path in self.output.glob("data/*/[0-9]*")}
        for (inode, slot), (_, _) in list(self.committed.items()):
            if inode == root and slot not in slots:
                assert slot not in self.counting(), f"{slot} has vanished"
                del self.committed[inode, slot]
                self.damaged.discard((inode, slot))
        for slot, path in slots.items():
            if (root, slot) in self.damaged:
                continue
            now = path.stat().st_ino, files_in(path)
            known = self.committed.setdefault((root, slot), now)
            assert now == known, f"{slot} has changed"
            expected = reference(self.colour(), 2)[1][int(path.name.partition(".")[0])]
            assert now[1] == expected, f"{slot} is not what it should be"

    def counting(self) -> set[str]:
        there = Dataset.open(self.output)
        return {there.path_of(index) for index in range(there.partitions)}

    @invariant()
    def plans_stay(self) -> None:
        if not self.output.exists():
            return
        root = self.root()
        found = {(root, p.name): (p / "plan.json").read_bytes() for p in self.output.glob("plan*")}
        for place, text in self.planned.items():
            assert place[0] != root or found.get(place) == text, f"{place[1]} has changed"
        self.planned |= found

    @invariant()
    def success_is_true_and_stays(self) -> None:
        success = self.success()
        if success is None:
            if self.successful is not None and self.output.exists():
                root, plans = self.successful
                there = Dataset.open(self.output) if (self.output / "plan").exists() else None
                same = there is not None and [plan.digest for plan in there.plans] == plans
                assert self.root() != root or not same, "_SUCCESS has vanished"
            self.successful = None
            return
        self.successful = (self.root(), success["plans"])
        there = Dataset.open(self.output)
        root = self.root()
        for index in range(there.partitions):
            slot = there.path_of(index)
            if (root, slot) not in self.damaged:
                assert there.record(index) is not None, f"_SUCCESS, but partition {index} is missing"
        for name, digest in success["digests"].items():
            assert there.root.digest_of(name) == digest, f"_SUCCESS, but {name} is of another time"
        retries = sum(plan.header["kind"] == "retry" for plan in there.plans)
        assert success["content_digest"] == reference(self.colour(), retries)[0]

    def success(self) -> dict[str, Any] | None:
        if not (self.output / "plan").exists():
            return None
        return Dataset.open(self.output).success

    @invariant()
    def only_who_opened_an_output_writes_to_it(self) -> None:
        """Whoever works for an output that was overwritten never reaches the one that took its place."""
        if not self.output.exists():
            return
        root = self.root()
        for path in [*self.output.glob(".*"), *self.output.glob("data/*/.*"), *self.output.glob("events/*/*")]:
            owner = int(path.name.removesuffix(".jsonl").removesuffix(".past")[-4:], 16) - 1
            if owner >= 0:
                actor = self.world.actors[owner]
                assert root in actor.opened, f"{actor!r} has made {path.relative_to(self.output)}"

    @invariant()
    def who_says_that_it_has_committed_has(self) -> None:
        for path in self.output.glob("events/*/*"):
            for event in map(json.loads, path.read_bytes().splitlines()):
                if event["event"] == "commit":
                    assert event["attempt"] in self.world.winners, f"{event} is not true"

    # ---- the end

    def come_to_the_end(self) -> None:
        """All go on to their ends, one after the other, or die; a last, undisturbed run finds or makes the result."""
        for actor in self.world.alive:
            actor.stale_look_ups = 0
            if actor.number % 3:
                actor.run(MOST_STEPS)
            actor.kill()
        self.check_all()
        final = self.final_run()
        if self.damaged:
            assert list(self.found_damage()) or not self.damage_counts()
            repair(self.output, Rank())
        self.check_all()
        there = Dataset.open(self.output)
        retries = sum(plan.header["kind"] == "retry" for plan in there.plans)
        assert final["content_digest"] == reference(self.colour(), retries)[0]
        assert_sound(self.output)
        assert leftovers(self.output) == []
        self.statistics["examples"] += 1
        self.statistics["operations"] += self.world.operations

    def final_run(self) -> dict[str, Any]:
        try:
            return run(self.output, **SMALL, colour=self.colour())
        except storage.StorageError:  # what the disk has lost must be mended first
            assert self.damaged
            after = repair(self.output, Rank())
            assert after is not None
            return after

    def damage_counts(self) -> bool:
        root = self.root()
        return any((root, slot) in self.damaged for slot in self.counting())

    def found_damage(self) -> Iterator[object]:
        from pipeline.partitions.verify import verify

        return verify(Dataset.open(self.output))

    def check_all(self) -> None:
        for check in (
            self.nothing_unexpected_is_raised,
            self.what_is_committed_stays_and_is_right,
            self.plans_stay,
            self.success_is_true_and_stays,
            self.only_who_opened_an_output_writes_to_it,
            self.who_says_that_it_has_committed_has,
        ):
            check()


def explore(machine: type[RuleBasedStateMachine], examples: int, *, derandomize: bool = True) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            derandomize=derandomize,
            database=None,
            deadline=None,
            phases=(Phase.generate,) if derandomize else (Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan, dataset, engine, finalize, compaction):
        monkeypatch.setattr(module, "BUCKET", 2)


def test_the_promises_hold_in_every_interleaving() -> None:
    statistics = Interleavings.statistics
    statistics.clear()
    explore(Interleavings, EXAMPLES or 100, derandomize=not EXAMPLES)
    print("\n".join(f"{count:8d} {what}" for what, count in sorted(statistics.items())))
    for what, least in EXPLORED.items():
        assert statistics[what] >= least, f"explored too little: {what}"
