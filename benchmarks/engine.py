"""How the exactly-once engine scales: a plan of a million partitions, and what 100,000 of them cost each rank.

    python benchmarks/engine.py [plan=1000000] [partitions=100000] [world=1000] [folder=<where to work>]

Every phase runs in its own process, so that its peak memory is measured separately. Partitions are empty, so that only
the engine is measured. Most are put in place by this program; those of the measured ranks are processed by real
workers. File operations are those of the main thread that pass through `pipeline.storage`; a heartbeat adds one for
each claim held (one at a time) and one event, six times per lease. In memory (/dev/shm, the default if it exists),
seconds are the engine's own; the time on a real file system follows from the counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.monitor.queue import EVERY
from launch.monitor.watch import Watch
from pipeline import storage
from pipeline.config.schema import DownloadConfig
from pipeline.distributed import Place, Rank
from pipeline.partitions.attempt import Attempt
from pipeline.partitions.compact import buckets_of, compact
from pipeline.partitions.dataset import RECORD, Dataset
from pipeline.partitions.engine import _WATCHED, Worker
from pipeline.partitions.finalize import finalize
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.plan import BUCKET, PARTITIONS, Input, Partition
from pipeline.partitions.planning import open_or_plan
from pipeline.partitions.stage import Context, Stage
from pipeline.samples import Outcome, Schema
from pipeline.telemetry import events as telemetry
from pipeline.telemetry.events import BEAT, Events

FULL = 1_000_000  # number of partitions that results are extrapolated to
LOOKS = 25  # looks of an idle rank
EVENTS = 20  # lines in each rank's event file


# ---- a stage that does nothing


class Empty(Stage):
    """`count` partitions, each with one input and no sample. It uses the name of a stage that the engine knows."""

    name = "download"
    reads_upstream = False

    def schema(self) -> Schema:
        return {"key": "str", "jpg": "jpeg"}

    def plan(self, since: int = 0) -> Iterator[Partition]:
        for number in range(self.config.count):
            path = f"photos/{number // 1000:04d}/{number:09d}.jpg"
            yield Partition((Input(path, size=100_000 + number, mtime_ns=1_700_000_000_000_000_000 + number),), 0)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        return iter(())


def make(output: str, count: int, rank: int = 0, world: int = 1) -> Empty:
    return Empty(DownloadConfig(output=output, count=count), Rank(Place(rank=rank, world_size=world)))


# ---- measurement


@dataclass
class Cost:
    """Cost of a phase; operations are counted by kind, separately for what a worker did after its own range."""

    seconds: float = 0.0
    busy: float = 0.0
    before: float = 0.0
    peak: float = 0.0
    own: Counter[str] = field(default_factory=Counter)
    helping: Counter[str] = field(default_factory=Counter)
    note: dict[str, float] = field(default_factory=dict)


class Enough(Exception):
    """Raised when the idle rank has looked often enough."""


class Meter:
    """Context that measures into ``cost``, and raises Enough before the ``looks``-th look for work."""

    def __init__(self, looks: int = 0) -> None:
        self.cost = Cost()
        self._looks = looks

    def __enter__(self) -> Meter:
        self.cost.before = memory("VmRSS")
        storage.interpose = self._count
        self._begin = perf_counter(), process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self.cost.seconds = perf_counter() - self._begin[0]
        self.cost.busy = process_time() - self._begin[1]
        storage.interpose = None
        self.cost.peak = memory("VmHWM")

    def _count(self, operation: str, path: str, do: Callable[[], Any]) -> Any:
        if threading.current_thread() is threading.main_thread():
            cost = self.cost
            kind = f"list {_listed(path)}" if operation == "listdir" else operation
            if kind == "list claims" and self._looks and cost.helping[kind] == self._looks:
                raise Enough
            phase = cost.helping if cost.helping or kind == "list claims" else cost.own
            phase[kind] += 1
        return do()


def _listed(path: str) -> str:
    parent, _, name = path.rpartition("/")
    if name == "claims":
        return "claims"
    return "bucket" if parent.endswith("/data") else "attempt" if "/data/" in path else "other"


def memory(name: str) -> float:
    """A value of /proc/self/status in MiB; unlike ru_maxrss, VmHWM does not inherit the peak of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def apart(phase: Callable[..., Cost], *arguments: Any) -> Cost:
    """Run ``phase`` in a fresh process that ends with this one."""
    if sys.stderr.isatty():
        print(f"  {phase.__name__} ...", end="\r", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, phase, arguments), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        raise SystemExit(f"{phase.__name__} failed") from None
    finally:
        child.terminate()
        child.join()


def _child(sender: Connection, phase: Callable[..., Cost], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    with BytesIO() as file:  # loads libraries lazily, which is not part of the phase
        pq.write_table(pa.table({"warm": [["up"]]}), file, compression="zstd")
        pq.read_table(file)
    sender.send(phase(*arguments))


# ---- partitions that exist without work


def fill(dataset: Dataset, indices: Iterable[int]) -> None:
    """Put committed empty partitions in place, as copies of one made by the engine; then mark full buckets."""
    record, ledger = _pattern(dataset)
    present = {path.name: set(os.listdir(path)) for path in (dataset.root.path / "data").iterdir()}
    first: dict[str, Path] = {}
    for index in indices:
        slot, bucket = dataset.root.path / dataset.path_of(index), dataset.bucket(index)
        if slot.name in present[bucket]:
            continue
        slot.mkdir()
        (slot / RECORD).write_bytes(storage.seal({**record, "partition": index, "attempt": uuid.uuid4().hex}))
        if bucket in first:
            os.link(first[bucket], slot / LEDGER)
        else:
            first[bucket] = slot / LEDGER
            first[bucket].write_bytes(ledger)
    for number in range(-(-dataset.partitions // BUCKET)):
        whole = min(BUCKET, dataset.partitions - number * BUCKET)
        if len(os.listdir(dataset.root.path / f"data/{number:03d}")) == whole:
            dataset.root.append(_marker(number), b"")


def _pattern(dataset: Dataset) -> tuple[dict[str, Any], bytes]:
    """Record and ledger of partition 0, which is processed now if it does not exist yet."""
    if dataset.record(0) is None:
        with Attempt(dataset, 0) as attempt:
            attempt.run((), 2**26, lambda: None)
    record = dataset.record(0)
    assert record is not None
    record.pop("digest", None)
    return record, dataset.root.read(f"{dataset.path_of(0)}/{LEDGER}")


def reopen(dataset: Dataset, indices: Iterable[int]) -> None:
    """Remove partitions again, and the marks of their full buckets."""
    for index in indices:
        shutil.rmtree(dataset.root.path / dataset.path_of(index))
        dataset.root.unlink(_marker(index // BUCKET), missing_ok=True)


def _marker(bucket: int) -> str:
    return f"claims/{bucket:03d}.0.full"


def span(dataset: Dataset, rank: int, world: int) -> range:
    return range(dataset.partitions * rank // world, dataset.partitions * (rank + 1) // world)


# ---- phases


def planning(output: str, count: int) -> Cost:
    """Rank 0 makes the plan."""
    with Meter() as meter:
        dataset = open_or_plan(make(output, count))
    meter.cost.note["MiB"] = (dataset.root.path / dataset.plans[0].folder / PARTITIONS).stat().st_size / 2**20
    return meter.cost


def reading(output: str, rank: int, world: int) -> Cost:
    """A rank opens the dataset and reads its own range from the plan."""
    with Meter() as meter:
        dataset = Dataset.open(output)
        own = span(dataset, rank, world)
        inputs = sum(len(dataset.partition(index).inputs) for index in own)
    assert inputs == len(own)
    return meter.cost


def filling(output: str, count: int) -> Cost:
    """Plan, and put all partitions in place."""
    with Meter() as meter:
        dataset = open_or_plan(make(output, count))
        fill(dataset, range(count))
    return meter.cost


def claiming(output: str, count: int, rank: int, dead: int, world: int) -> Cost:
    """A worker processes its own range, then that of a missing rank; all others have finished theirs."""
    dataset = Dataset.open(output)
    reopen(dataset, [*span(dataset, rank, world), *span(dataset, dead, world)])
    worker = _worker(Worker, dataset, count, rank, world)
    try:
        with Meter() as meter:
            worker.work()
    finally:
        worker.close()
    meter.cost.note = {"own": len(span(dataset, rank, world)), "helped": len(span(dataset, dead, world))}
    return meter.cost


class Sleepless(Worker):
    """Asks to sleep, but does not."""

    def _sleep(self, seconds: float) -> None:
        self.asked = seconds


def idling(output: str, count: int, rank: int, world: int) -> Cost:
    """A worker that has finished looks for work while all others are at the last partition of their ranges."""
    dataset = Dataset.open(output)
    others = [span(dataset, other, world) for other in range(world) if other != rank]
    busy = [indices[-1] for indices in others if indices]
    reopen(dataset, busy)
    claims = [f"claims/{dataset.bucket(index)}/{dataset.slot(index)}" for index in busy]
    owner = {"host": "elsewhere", "boot": "", "pid": 1, "start": "1", "owner": uuid.uuid4().hex, "counter": 1}
    for claim in claims:
        dataset.root.mkdir(claim.rpartition("/")[0], exist_ok=True)
        dataset.root.write_new(claim, json.dumps(owner).encode())
    worker = _worker(Sleepless, dataset, count, rank, world)
    meter = Meter(LOOKS)
    try:
        with meter:
            worker.work()
    except Enough:
        meter.cost.note["pause"] = worker.asked
    finally:
        worker.close()
    for claim in claims:
        dataset.root.unlink(claim)
    fill(dataset, busy)
    return meter.cost


def _worker(kind: type[Any], dataset: Dataset, count: int, rank: int, world: int) -> Any:
    stage = make(str(dataset.root.path), count, rank, world)
    return kind(stage, dataset, Events(dataset.root, stage.rank))


def status(output: str, world: int, looks: int) -> Cost:
    """Cost of the first look of launch/status.py, or (2) of its second, while all ranks are at work."""
    with storage.Folder.open(output) as root:
        shutil.rmtree(Path(output) / "events")  # from previous workers
        for rank in range(world):
            events = Events(root, Rank(Place(rank=rank, world_size=world)))
            events.totals.update({"partitions": 100, "in": 100_000, "kept": 90_000, "dropped": 10_000, "bytes": 10**10})
            for number in range(EVENTS):
                events.emit("commit", partition=number, seconds=1.0)
    watch = Watch(output)
    for _ in range(looks):
        with Meter() as meter:
            (stage,) = watch.look().stages
    assert len(stage.ranks) == world and stage.total == Dataset.open(output).partitions
    return meter.cost


def footprint(output: str, count: int) -> Cost:
    """Process `count` partitions with an empty tar each on one rank, then pack them; measures files per partition."""
    stage = make(output, count)
    dataset = open_or_plan(stage)
    events = Events(dataset.root, stage.rank)
    worker = Worker(stage, dataset, events)
    try:
        with Meter() as meter, events.around():
            worker.work()
            worker.finish()
    finally:
        worker.close()
    place = Path(output)
    meter.cost.note = {
        "inodes": sum(1 for _ in place.glob("data/*/**/*")) / count,
        "event bytes": sum(path.stat().st_size for path in place.glob("events/*/*")) / count,
    }
    finished = Dataset.open(output)
    compact(finished, buckets_of(finished))
    meter.cost.note["packed inodes"] = sum(1 for _ in place.glob("data/*/**/*")) / count
    before = sum(path.stat().st_size for path in place.glob("events/*/*"))
    events.emit("beat")
    meter.cost.note["beat bytes"] = sum(path.stat().st_size for path in place.glob("events/*/*")) - before
    return meter.cost


def requests_of_a_chain(folder: Path) -> Counter[str]:
    """SLURM commands run to submit three stages, each a request to the controller; counted by stand-ins."""
    programs = folder / "bin"
    programs.mkdir()
    answers = {"sbatch": "Submitted batch job 7", "scontrol": "MaxArraySize = 1001"}
    answers |= dict.fromkeys(("squeue", "srun", "sacctmgr"), "")
    for name, answer in answers.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name}" >> {folder}/asked\necho "{answer}"\n')
        (programs / name).chmod(0o755)
    command = [sys.executable, str(Path(__file__).parents[1] / "launch/submit.py"), "stage=download,filter,shard"]
    arguments = ["dataset=shapes", f"data_dir={folder}/chain", "cluster=slurm"]
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run([*command, *arguments], env=environment, check=True, capture_output=True)
    return Counter((folder / "asked").read_text().split())


def starting(folder: Path) -> Counter[str]:
    """System calls with which stage=download starts and checks its finished output; empty without strace."""
    command = [
        sys.executable,
        "-m",
        "pipeline.stages.download",
        "dataset=shapes",
        "count=1",
        f"data_dir={folder}/start",
    ]
    root = Path(__file__).parents[1]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    if shutil.which("strace") is None:
        return Counter()
    calls = "open,openat,stat,lstat,newfstatat,statx,getdents64,readlink"
    traced = ["strace", "--follow-forks", "--summary-only", f"--trace={calls}", *command]
    said = subprocess.run(traced, cwd=root, check=True, capture_output=True, text=True).stderr
    rows = [line.split() for line in said.splitlines()]
    return Counter(
        {row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] in calls.split(",")}
    )


def load_table(cost: Cost, idle: Cost, asked: Counter[str], start: Counter[str]) -> None:
    """Load of a run on the file system and on SLURM's controller."""
    note = cost.note
    said = ", ".join(f"{name} {count:,}" for name, count in start.most_common()) or "not counted: no strace here"
    print(f"\nOn the file system, when a rank starts: {said}")
    print("\nOn the file system, per 1,000 partitions of one data file each:")
    print(f"  inodes {1000 * note['inodes']:,.0f}, packed {1000 * note['packed inodes']:,.0f}; "
          f"file operations {(cost.own + cost.helping).total():,}; events {note['event bytes']:,.0f} kB")  # fmt: skip
    hour, look = 3600.0, sum(idle.helping.values()) / LOOKS
    beats = hour / BEAT
    print("per rank and hour:")
    print(f"  signs of life {2 * beats:,.0f} operations, {beats * note['beat bytes'] / 1e3:,.0f} kB, no event file "
          f"above {telemetry._MOST_BYTES / 2**20:.0f} MiB")  # fmt: skip
    print(f"  idle: {look:.3g} operations a look, then paused to 1.5 a second: at most {1.5 * hour:,.0f}")
    print("requests to SLURM's controller:")
    said = ", ".join(f"{name} {count}" for name, count in sorted(asked.items()))
    print(f"  a chain of three stages: {said}; launch/status.py: {hour / EVERY:.0f} an hour")


def finishing(output: str) -> Cost:
    """One rank reads all records and finishes the dataset."""
    with Meter() as meter:
        finalize(Dataset.open(output))
    return meter.cost


# ---- the table


def row(what: str, cost: Cost, factor: float = 0.0) -> None:
    """Print a row; ``factor``: factor of growth with FULL partitions (0: none)."""
    operations = (cost.own + cost.helping).total()
    line = f"{what:<48}{cost.seconds:>9.2f}{cost.busy:>8.2f}{cost.peak:>8.0f}{cost.peak - cost.before:>+8.0f}"
    more = factor or 1.0
    grown = cost.before + (cost.peak - cost.before) * more
    then = f"{cost.seconds * more:>9.2f}{cost.busy * more:>8.2f}{grown:>8.0f}{operations * more:>13,.0f}"
    print(f"{line}{operations:>11,}   |{then}", flush=True)


def kinds(counts: Counter[str], per: float) -> str:
    return ", ".join(f"{kind} {count / per:.4g}" for kind, count in sorted(counts.items())) or "none"


def claims_table(costs: dict[int, Cost], idle: Cost, count: int, world: int) -> None:
    """Print the operations of workers by kind."""
    print(f"\nOperations of workers, of {world:,} ranks with {count:,} partitions:")
    own = sum((cost.own for cost in costs.values()), Counter[str]())
    helping = sum((cost.helping for cost in costs.values()), Counter[str]())
    print(f"  own range, per partition: {kinds(own, sum(cost.note['own'] for cost in costs.values()))}")
    print(f"  helping,   per partition: {kinds(helping, sum(cost.note['helped'] for cost in costs.values()))}")
    for rank, cost in costs.items():
        listed = f"{cost.own['list bucket']} for its own range, {cost.helping['list bucket']} where it helps"
        print(f"  rank {rank} lists buckets: {listed} (of {-(-count // BUCKET)}); looks: {cost.helping['list claims']}")
    ranks = min(world, count) / -(-count // BUCKET)
    print(f"  idle rank, per look (pauses grow to {idle.note['pause']:.3g} s): {kinds(idle.helping, LOOKS)}")
    print(
        f"    in each bucket {ranks:.3g} partitions are claimed by others; it looks at no more than {_WATCHED} of them"
    )


def measure(folder: Path, plan: int, count: int, world: int) -> None:
    large, output, more = str(folder / "large"), str(folder / "output"), FULL / count
    ranks = {rank: (rank + world // 5) % world for rank in sorted({world // 8, world // 2, world - world // 8})}
    print(f"{'':57}{'of it':>8}{'peak':>8}{'of it':>8}{'file':>11}   |{f'with {FULL:,} partitions':>38}")
    head = f"{'':48}{'seconds':>9}{'on CPU':>8}{'MiB':>8}{'new':>8}{'operations':>11}"
    print(f"{head}   |{'seconds':>9}{'on CPU':>8}{'MiB':>8}{'operations':>13}", flush=True)
    made = apart(planning, large, plan)
    row(f"plan {plan:,} ({made.note['MiB']:.1f} MiB plan.parquet)", made, FULL / plan)
    row(f"one of {world:,} ranks reads its range of it", apart(reading, large, world // 2, world), FULL / plan)
    shutil.rmtree(large)
    row(f"(put {count:,} in place, by this program)", apart(filling, output, count))
    costs = {rank: apart(claiming, output, count, rank, dead, world) for rank, dead in ranks.items()}
    for rank, cost in costs.items():
        row(f"rank {rank} does {cost.note['own']:.0f} of its own, helps with {cost.note['helped']:.0f}", cost, more)
    idle = apart(idling, output, count, world // 2, world)
    row(f"idle rank, {LOOKS} looks without pauses", idle)
    seen = [apart(status, output, world, looks) for looks in (1, 2)]
    for which, cost in zip(("first", "second"), seen, strict=True):
        row(f"status: {which} look at {world:,} ranks", cost)
    done = apart(finishing, output)
    row(f"finalize {count:,}", done, more)
    claims_table(costs, idle, count, world)
    requests = requests_of_a_chain(folder)
    load_table(apart(footprint, str(folder / "footprint"), 1000), idle, requests, starting(folder))
    print(f"\nstatus: {kinds(seen[0].own, world)} per rank at the first look, then {kinds(seen[1].own, world)}")
    print(f"finalize: {kinds(done.own, count)} per partition")


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    where = options.get("folder") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    folder = Path(tempfile.mkdtemp(prefix="latentmill-engine-", dir=where))
    try:
        numbers = (int(options.get(*given)) for given in (("plan", FULL), ("partitions", 100_000), ("world", 1000)))
        measure(folder, *numbers)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
