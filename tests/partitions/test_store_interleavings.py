"""An output in an object store, whatever its writers do, and whatever the store does to their requests.

A request may fail after it was carried out, be carried out after it has failed, or be carried out twice, then or later.
``LATENTMILL_EXAMPLES=5000`` explores more, and other examples each time.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_stage import make, rank_of, run
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interleaving import Actor, World
from partitions.test_interleavings import EXAMPLES, MEMORY, MOST_STEPS, SMALL, explore, reference

from pipeline import storage, stores
from pipeline.partitions import dataset, engine, finalize, plan, planning
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.gc import collect
from pipeline.partitions.verify import verify
from pipeline.storage import digest
from pipeline.stores import Store, StoreError

OUTPUT = "s3://bucket/output"
CHANGING = ("written", "deleted from")
FAULTS = ("lost", "never", "late", "again", "again later")
"""Of a request that changes something: done, but it fails; not done, and it fails; it fails, and is done later; done
twice, and answered the second time; done, and once more later."""
SCENES = [
    ("nothing", ("worker", "worker", "worker")),
    ("planned", ("worker", "worker", "worker", "gc")),
    ("finished", ("retry", "worker", "retry")),
    ("finished", ("retry", "gc", "worker", "gc")),
]
EXPLORED = {
    "commit won": 50,
    "commit lost": 2,
    "plan lost": 1,
    "killed": 7,
    "success lost": 1,
    "success replaced": 5,
    "requests carried out late": 2,
    "attempts deleted by gc": 2,
    **{f"fault {kind}": 1 for kind in FAULTS},
}
"""How often at least each of these must have happened, lest we believe to have tried what we have not."""
POINTS = ("record.json", "plan.json", "_SUCCESS", "manifest", "ledger.parquet", "claims")


class StoreWorld(World):
    """A store in memory; actors stop before each request."""

    def __enter__(self) -> StoreWorld:
        from obstore.store import MemoryStore

        super().__enter__()
        self.memory = MemoryStore()
        self.late: list[tuple[str, str, Callable[[], Any]]] = []
        self.faults: dict[int, str] = {}
        self._patch.setattr("pipeline.stores.store.client_of", lambda root: self.memory)
        self._patch.setenv("LATENTMILL_CACHE", str(self.folder / "cache"))
        self._patch.setattr("pipeline.stores.cache.locked", nullcontext)  # who stops in it would hold up the others
        self._patch.setattr(tempfile, "tempdir", str(self.folder))
        return self

    def _interpose(self, operation: str, path: str, do: Callable[[], Any]) -> Any:
        if not path.startswith("s3://"):
            return do()  # an attempt's own folder
        actor = self._current()
        if actor is None:
            return do()
        actor.pause(operation, path)
        self.operations += 1
        kind = self.faults.pop(actor.number, "") if operation in CHANGING else ""
        if not kind:
            return self._done(operation, path, do)
        self.statistics[f"fault {kind}"] += 1
        if kind in ("late", "again later"):
            self.late.append((operation, path, do))
        if kind in ("lost", "again", "again later"):
            result = self._done(operation, path, do)
        if kind == "again":
            result = self._done(operation, path, do)
        if kind in ("again", "again later"):
            return result
        raise StoreError(f"{path}: the network broke")

    def _done(self, operation: str, path: str, do: Callable[[], Any]) -> Any:
        name = path.rpartition("/")[2]
        what = {"record.json": "commit", "plan.json": "plan", "_SUCCESS": "success"}.get(name, "")
        if operation != "written" or not what:
            return do()
        existed = Store(path).exists("") if what == "success" else False
        try:
            result = do()
        except Exception:
            self.statistics[f"{what} lost"] += 1
            raise
        self.statistics[f"{what} {'replaced' if existed else 'won'}"] += 1
        return result

    def deliver(self, number: int) -> None:
        """Let the store carry out a request that it has held back."""
        operation, path, do = self.late.pop(number % len(self.late))
        self.statistics["requests carried out late"] += 1
        try:
            self._done(operation, path, do)
        except Exception as error:  # nobody hears of it
            self.statistics[f"late: {type(error).__name__}"] += 1


class StoreInterleavings(RuleBasedStateMachine):
    """Any number of processes on one output. The promises are checked between any two moves."""

    statistics: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        folder = Path(tempfile.mkdtemp(dir=MEMORY, prefix="latentmill-test-"))
        self.world = StoreWorld(folder, self.statistics).__enter__()
        self.store = Store(OUTPUT)
        self.fixed: dict[str, bytes] = {}
        self.retries = 0

    def teardown(self) -> None:
        try:
            self.come_to_the_end()
        finally:
            self.world.__exit__()

    # ---- moves

    @initialize(blind=st.integers(0, 3), scene=st.sampled_from(SCENES), seed=st.integers(0, 2**32))
    def begin(self, blind: int, scene: tuple[str, tuple[str, ...]], seed: int) -> None:
        """Blind: claims hold nobody off, so that all work is done by all at once."""
        there, kinds = scene
        if there == "planned":
            planning.open_or_plan(make(Path(OUTPUT), **SMALL))
        elif there == "finished":
            run(Path(OUTPUT), **SMALL)
        if blind:
            self.world._patch.setattr("pipeline.partitions.claims.Claims.take", lambda claims, name: True)
        for number, kind in enumerate(kinds):
            self.start(kind=kind, rank=number)
        if there == "nothing" and seed % 2:
            self.all_meet_at(point="plan.json")
        self.all_go(seed=seed, moves=len(kinds) * 20, longest=(1, 3, 40)[seed % 3])

    def has_actors(self) -> bool:
        return bool(self.world.alive)

    @precondition(lambda self: len(self.world.alive) < 5)
    @rule(kind=st.sampled_from(["worker", "worker", "retry", "gc"]), rank=st.integers(0, 2))
    def start(self, kind: str, rank: int) -> None:
        """A process that has not done anything yet."""
        output = Path(OUTPUT)
        if kind == "worker":
            self.world.spawn(kind, lambda: run(output, rank=rank_of(rank, 3), **SMALL))
        elif kind == "retry" and self.retries < 2:
            self.retries += 1
            name = f"retry {self.retries}"
            self.world.spawn(kind, lambda: run(output, **SMALL, retry_failed=True, run_id=name))
        elif kind == "gc" and self.store.exists("plan/plan.json"):
            self.world.spawn(kind, lambda: list(collect(Dataset.open(OUTPUT), 0.0)))

    @precondition(has_actors)
    @rule(seed=st.integers(0, 2**32), moves=st.integers(5, 30), longest=st.sampled_from([1, 5, 40]))
    def all_go(self, seed: int, moves: int, longest: int) -> None:
        """Everybody goes on, now this one, now that one."""
        chance = random.Random(seed)
        for _ in range(moves):
            self.move(chance.randrange(99), chance.randint(1, longest))

    @precondition(has_actors)
    @rule(point=st.sampled_from(POINTS))
    def all_meet_at(self, point: str) -> None:
        """Up to just before a request that changes an object of this name."""
        for who in range(len(self.world.alive)):
            self.move(who, 300, point)

    @precondition(has_actors)
    @rule(seed=st.integers(0, 2**32), point=st.sampled_from((*POINTS, "")))
    def break_requests(self, seed: int, point: str) -> None:
        """Of each process that gets there, one that changes an object of this name."""
        chance = random.Random(seed)
        for who in range(len(self.world.alive)):
            self.move(who, 200 if point else 1, point)
        for actor in self.world.alive:
            self.world.faults[actor.number] = chance.choice(FAULTS)
        self.all_go(seed=seed, moves=5, longest=3)

    @precondition(lambda self: bool(self.world.late))
    @rule(number=st.integers(0, 99))
    def deliver(self, number: int) -> None:
        self.world.deliver(number)

    @precondition(has_actors)
    @rule(who=st.integers(0, 99))
    def one_goes_far(self, who: int) -> None:
        self.move(who, MOST_STEPS if who % 2 else 150)

    @precondition(has_actors)
    @rule(who=st.integers(0, 99))
    def kill(self, who: int) -> None:
        self.pick(who).kill()
        self.statistics["killed"] += 1

    def pick(self, who: int) -> Actor:
        return self.world.alive[who % len(self.world.alive)]

    def move(self, who: int, steps: int, before: str = "") -> None:
        if not self.world.alive:
            return
        actor = self.pick(who)
        for count in range(steps):
            operation, path = actor.next
            if actor.done or (count and before and operation in CHANGING and before in path):
                break
            actor.step()
        if actor.done and actor.kind == "gc" and actor.result:
            self.statistics["attempts deleted by gc"] += len(actor.result)

    # ---- promises

    @invariant()
    def nothing_unexpected_is_raised(self) -> None:
        for actor in self.world.actors:
            assert not actor.unexpected, actor.unexpected

    @invariant()
    def what_is_committed_stays_and_is_right(self) -> None:
        """Records and plans are never changed, and all that a record names is there, as it should be."""
        there = {o.path for o in self.store.objects()}
        proofs = {p for p in there if p.endswith(("/record.json", "/plan.json"))}
        for path, data in self.fixed.items():
            assert path in proofs and self.store.read(path) == data, f"{path} has changed"
        for path in proofs - self.fixed.keys():
            data = self.fixed[path] = self.store.read(path)
            if path.endswith("/plan.json"):
                continue
            record = json.loads(data)
            index = record["partition"]
            wanted = reference("red", 2)[1][index]
            assert {file["name"] for file in record["files"]} == wanted.keys()
            assert all(digest(wanted[file["name"]]) == file["xxh3"] for file in record["files"]), path
        for path in proofs:
            if path.endswith("/record.json"):
                for file in json.loads(self.fixed[path])["files"]:
                    folder = stores.folder.attempt_folder(path.rpartition("/")[0], self.fixed[path])
                    assert f"{folder}/{file['name']}" in there, f"{path} names {file['name']}, which is not there"

    @invariant()
    def success_is_true(self) -> None:
        if not self.store.exists("plan/plan.json"):
            return
        there = Dataset.open(OUTPUT)
        if there.success is None:
            return
        for index in range(there.partitions):
            assert there.record(index) is not None, f"_SUCCESS, but partition {index} is missing"
        for name, expected in there.success["digests"].items():
            assert there.root.digest_of(name) == expected, f"_SUCCESS, but {name} is of another time"
        retries = sum(plan.header["kind"] == "retry" for plan in there.plans)
        assert there.success["content_digest"] == reference("red", retries)[0]

    # ---- the end

    def come_to_the_end(self) -> None:
        """All go on to their ends, or die; the store does what it has held back; a last run makes the result."""
        for actor in self.world.alive:
            if actor.number % 3:
                self.move(self.world.alive.index(actor), MOST_STEPS)
            actor.kill()
        self.check_all()
        while self.world.late and self.world.operations % 2:
            self.world.deliver(0)
        final = run(Path(OUTPUT), **SMALL)
        while self.world.late:
            self.world.deliver(0)
        self.check_all()
        there = Dataset.open(OUTPUT)
        retries = sum(plan.header["kind"] == "retry" for plan in there.plans)
        assert final["content_digest"] == reference("red", retries)[0]
        assert list(verify(there)) == []
        access = RandomAccess(there)
        keys = [row["key"] for row in access.rows(range(len(access)))]
        assert len(keys) == len(set(keys)) == final["counts"]["kept"]
        list(collect(there, 0.0))
        assert list(verify(Dataset.open(OUTPUT))) == []
        self.statistics["examples"] += 1

    def check_all(self) -> None:
        self.nothing_unexpected_is_raised()
        self.what_is_committed_stays_and_is_right()
        self.success_is_true()


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (plan, dataset, engine, finalize):
        monkeypatch.setattr(module, "BUCKET", 2)
    yield
    assert storage.interpose is None


def test_the_promises_hold_in_a_store_that_delays_repeats_and_reorders() -> None:
    statistics = StoreInterleavings.statistics
    statistics.clear()
    explore(StoreInterleavings, EXAMPLES or 60, derandomize=not EXAMPLES)
    print("\n".join(f"{count:8d} {what}" for what, count in sorted(statistics.items())))
    for what, least in EXPLORED.items():
        assert statistics[what] >= least, f"explored too little: {what}"
