"""Determines the state of all stages in a folder; each look reads only files that may have changed since the last one.

A look takes, for each stage, one listing of its folder and one of ``claims/``; one listing for each bucket of 1,000
partitions that is not complete, but after the first look at most a hundred; and one read for each process that may
still run. Nothing is done per partition.
"""

from __future__ import annotations

import errno
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from launch.monitor.accounting import Accounting
from launch.monitor.job_logs import newest, only_logged
from launch.monitor.queue import EVERY, Queue, QueuedJob
from launch.monitor.ranks import BAD, RankStatus, statuses
from launch.pack import comment, places
from launch.slurm_commands import comment_for, name_for
from launch.submission import going_on
from pipeline.config.schema import MAIN_LINE, ConfigError
from pipeline.partitions.dataset import SUCCESS, Dataset
from pipeline.partitions.plan import BUCKET
from pipeline.storage import GONE, Folder, StorageError
from pipeline.telemetry.efficiency import Efficiency, efficiency
from pipeline.telemetry.events import DONE, EventReader, Process
from pipeline.telemetry.host_stats import Hosts, HostStatus, hosts_of
from pipeline.training.uploads import problem as upload_problem

_DEPTH = 4  # <data_dir>/<dataset>/<split>/<stage>
_MOST_NAMES = 2000  # entries of a folder to read; folders of a data_dir do not have more
_REDISCOVER = 30.0  # seconds between searches for new outputs
_FRESH = 1.0  # maximum age in seconds of what is known, before everything is reported as over
_LISTINGS = 100
_HOSTS = 20
_MANY = 4  # if more ranks than this have the same problem, they are reported in one line
ACTIVE = ("running", "starting")


@dataclass
class StageStatus:
    """The state of a dataset directory or a training run; units as in :class:`RankStatus`.

    Attributes:
        done, total: partitions, or steps of a training run.
        rate: samples per second of all ranks together.
        eta: seconds until it is done; None if unknown.
        world_size: number of ranks started.
        hosts: servers from which most samples were downloaded.
        efficiency: how well it has used its resources so far.
    """

    path: str
    name: str
    stage: str
    state: str
    done: int = 0
    total: int = 0
    samples: int = 0
    kept: int = 0
    dropped: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    rate: float = 0.0
    read_rate: float = 0.0
    write_rate: float = 0.0
    eta: float | None = None
    memory: int = 0
    gpu: float | None = None
    idle: float | None = None
    loss: float | None = None
    world_size: int = 0
    states: dict[str, int] = field(default_factory=dict)
    hosts: list[HostStatus] = field(default_factory=list)
    efficiency: Efficiency | None = None
    problems: list[str] = field(default_factory=list)
    jobs: list[QueuedJob] = field(default_factory=list)
    ranks: list[RankStatus] = field(default_factory=list)

    @property
    def unit(self) -> str:
        return "steps" if self.stage == "train" else "partitions"


@dataclass
class Snapshot:
    """The state of everything below ``root`` at ``time``. ``jobs`` are jobs in SLURM's queue without an output yet."""

    root: str
    time: float
    stages: list[StageStatus]
    jobs: list[QueuedJob]
    slurm: str
    """Problem with SLURM, if any."""
    submission: str = ""
    """Current stage of a command that runs several stages here; only determined if nothing else runs."""

    @property
    def over(self) -> bool:
        """Whether nothing is running or pending."""
        return (
            not self.jobs
            and not self.submission
            and not any(stage.jobs or stage.state in ACTIVE for stage in self.stages)
        )

    def as_dict(self) -> dict[str, Any]:
        """All values, JSON-able."""
        stages = [
            {**asdict(stage), "unit": stage.unit, "jobs": [job.as_dict() for job in stage.jobs]}
            for stage in self.stages
        ]
        return {**asdict(self), "stages": stages, "jobs": [job.as_dict() for job in self.jobs], "over": self.over}


class Watch:
    """Watches everything below ``root``, which may itself be a dataset directory or a run.

    Args:
        past: also read past events, for plots.
        only: only stages with this name (of their folder, or filter, shard, …).

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, root: str | Path, past: bool = False, only: str = "") -> None:
        self.root = Path(root).absolute()
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"{root} is not a folder")
        self.works: dict[Path, Work] = {}
        self._past = past
        self._only = only
        self._queue = Queue(self.root)
        self._accounting = Accounting()
        self._discovered = -math.inf
        self._known: set[str] = set()
        if not self.root.exists():
            self._queue.refresh()
            if not self._coming(set()):
                queue = ", and no job in SLURM's queue is for it" if self._queue.available else ""
                raise ConfigError(f"{root}: no such folder{queue}")

    def look(self) -> Snapshot:
        """The current state. Before it reports that everything is over, it checks queue and folders again."""
        snapshot = self._look(_REDISCOVER, EVERY)
        stale = time.monotonic() - self._discovered > _FRESH
        snapshot = self._look(_FRESH, _FRESH) if snapshot.over and stale else snapshot
        if snapshot.over:
            folders = {folder for path in self.works for folder in (path, path.parent, path.parent.parent)}
            snapshot.submission = going_on(sorted({folder / "logs" for folder in (self.root, *folders)}))
        return snapshot

    def _look(self, folders: float, queue: float) -> Snapshot:
        """The state; ``folders`` and ``queue`` are the maximum age in seconds of what is known about each."""
        self._queue.refresh(queue)
        jobs = {f"{job.id} {job.state}" for job in self._queue.jobs}
        if time.monotonic() >= self._discovered + folders or jobs != self._known:
            self._discover()
            self._discovered, self._known = time.monotonic(), jobs
        # modification times are set by the file server, whose clock may be ahead of this machine's
        now = max([time.time(), *(p.written for work in self.works.values() for p in work.processes)])
        stages, gone, taken = [], [], set()
        for path, work in self.works.items():
            try:
                status = work.look(self._queue, now)
            except (OSError, StorageError, ConfigError) as error:
                if work.root.in_place():
                    status = StageStatus(str(path), path.name, "", "unreadable", problems=[str(error)])
                else:
                    gone.append(path)  # moved aside: a replacement will be found by the next search
                    continue
            status.name = os.path.relpath(path, self.root) if path != self.root else path.name
            stages.append(status)
            taken |= {job.id for job in status.jobs}
        for path in gone:
            self.works.pop(path).root.close()
            self._discovered = -math.inf
        if self._only:
            stages = [s for s in stages if self._only in (s.stage, s.name, Path(s.path).name)]
        self._account(stages)
        problem = self._queue.problem or self._accounting.problem
        return Snapshot(str(self.root), now, stages, self._coming(taken), problem)

    def _account(self, stages: list[StageStatus]) -> None:
        """Refine the efficiency of stages that are over by SLURM's accounting, except for jobs shared with others."""
        jobs = {
            path: {str(process.last["job"]) for process in work.processes if process.last.get("job")}
            for path, work in self.works.items()
        }
        shared = Counter(job for of_stage in jobs.values() for job in of_stage)
        over = [stage for stage in stages if stage.efficiency and not stage.jobs and stage.state not in ACTIVE]
        alone = {stage.path: {job for job in jobs.get(Path(stage.path), ()) if shared[job] == 1} for stage in over}
        self._accounting.refresh(job for of_stage in alone.values() for job in of_stage)
        for stage in over:
            if stage.efficiency and alone[stage.path] == jobs.get(Path(stage.path)):
                stage.efficiency = self._accounting.refined(stage.efficiency, alone[stage.path])

    def _discover(self) -> None:
        for path, kind in find(self.root):
            if not isinstance(self.works.get(path), kind):  # an output that had only logs may have a plan by now
                self.works[path] = kind(path, self._past)
        self.works = {path: self.works[path] for path in sorted(self.works, key=_place)}

    def _coming(self, taken: set[str]) -> list[QueuedJob]:
        """Jobs for outputs below the root that do not exist yet; for packed jobs, reduced to these outputs."""
        if not self._queue.jobs:
            return []

        root = comment_for(self.root)
        there = {comment_for(path) for path in self.works}
        coming = [job for job in self._queue.jobs if job.id not in taken and job.is_below(root)]
        for job in self._queue.jobs:
            missing = [place for place in places(job.comment) if place not in there]
            if job.id in taken and len(places(job.comment)) > 1 and missing:
                coming.append(replace(job, name="packed", comment=comment(missing)))
        return coming


def find(root: Path) -> Iterator[tuple[Path, type[Work]]]:
    """Dataset directories and training runs at and below ``root``; their subfolders are not searched."""
    level = [root]
    for depth in range(_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    some = islice(entries, _MOST_NAMES)
                    names = {entry.name for entry in some if not entry.name.startswith(".") and entry.is_dir()}
            except OSError:
                continue
            if "plan" in names and "data" in names:
                yield folder, DatasetWork
            elif "checkpoints" in names or "events" in names:
                yield folder, RunWork
            else:
                if "logs" in names:
                    yield from ((place, LoggedWork) for place in only_logged(folder))
                if depth < _DEPTH:
                    below += [folder / name for name in sorted(names - {"logs"})]
        level = below


class Work(ABC):
    """A folder that ranks work on."""

    def __init__(self, path: Path, past: bool) -> None:
        self.path = path
        self.root = Folder.open(path)
        self._events = EventReader(self.root, past)

    @property
    def processes(self) -> list[Process]:
        return list(self._events.processes.values())

    def look(self, queue: Queue, now: float) -> StageStatus:
        """The current state.

        Raises:
            OSError, StorageError, ConfigError: the folder was moved, or is damaged.
        """
        if not self.root.in_place():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        self._events.refresh()
        ranks = statuses(self.processes, queue, now)
        status = StageStatus(str(self.path), self.path.name, self._stage(), "", ranks=ranks)
        self._add_up(status)
        status.efficiency = efficiency(self.processes)
        status.jobs = self._jobs(queue, status.stage)
        self._measure(status)
        self._judge(status)
        return status

    @abstractmethod
    def _stage(self) -> str:
        """Name of the stage."""

    @abstractmethod
    def _measure(self, status: StageStatus) -> None:
        """Set done, total and eta of ``status``, and its state if it is clear."""

    def _add_up(self, status: StageStatus) -> None:
        totals: Counter[str] = Counter()
        hosts = Hosts()
        running = {(rank.begin, rank.host, rank.pid) for rank in status.ranks if rank.live}
        for process in self.processes:
            totals.update(process.last["totals"])
            hosts.merge(hosts_of(process.last))
            status.samples += self._samples(process, running)
        status.kept, status.dropped, status.failed = totals["kept"], totals["dropped"], totals["failed"]
        status.reasons = {
            name.removeprefix("reason:"): n for name, n in totals.most_common() if name.startswith("reason:")
        }
        status.hosts = hosts.statuses(_HOSTS)
        live = [rank for rank in status.ranks if rank.live]
        gpus = [rank.gpu for rank in live if rank.gpu is not None]
        status.rate = sum(rank.rate for rank in live)
        status.read_rate, status.write_rate = sum(r.read_rate for r in live), sum(r.write_rate for r in live)
        status.memory = sum(rank.memory for rank in live)
        status.gpu = sum(gpus) / len(gpus) if gpus else None
        status.idle = sum(rank.idle for rank in live) / len(live) if live else None
        status.world_size = max((process.last["world_size"] for process in self.processes), default=0)
        if status.ranks:
            newest = max(self.processes, key=lambda process: process.last["begin"])
            status.world_size = newest.last["world_size"]
        status.states = dict(Counter(rank.state for rank in status.ranks).most_common())

    def _samples(self, process: Process, running: set[tuple[float, str, int]]) -> int:
        """Samples that a process has processed; ``running``: start, host and process id of processes still running."""
        return int(process.points[-1][DONE])

    def _jobs(self, queue: Queue, stage: str) -> list[QueuedJob]:
        if not queue.jobs:
            return []

        known = {process.last.get("job") for process in self.processes} - {None}
        name, comment = name_for(stage, str(self.path)), comment_for(self.path)
        return [job for job in queue.jobs if job.name == name or job.number in known or job.speaks_of(comment)]

    def _judge(self, status: StageStatus) -> None:
        """Set the state, unless it is already clear, and the problems that a person should know about."""
        if status.state == "finished":
            return
        states = status.states
        if any(rank.live for rank in status.ranks):
            status.state = "running"
        elif status.jobs:
            status.state = "starting" if any(job.state == "RUNNING" for job in status.jobs) else "pending"
        elif not status.ranks:
            status.state = "planned"
        else:
            worst = [state for state in ("failed", "hung", "lost", "silent") if states.get(state)]
            status.state = worst[0] if worst else "stopped"
        for state in BAD:
            bad = [rank for rank in status.ranks if rank.state == state]
            if len(bad) > _MANY:
                first = f"rank {bad[0].rank} on {bad[0].host}: {bad[0].note}"
                status.problems.append(f"{len(bad)} ranks {state}: {ranges([r.rank for r in bad])}; {first}")
            else:
                status.problems += [f"rank {r.rank} on {r.host} {state}: {r.note}" for r in bad]
        for job in status.jobs:
            if job.why:
                status.problems.append(f"job {job.id} pending: {job.why}")
        if any(job.excluded for job in status.jobs) and (nodes := newest(self.path).left_out):
            status.problems.append(f"left out because they did worse than other nodes: {', '.join(nodes)}")


class LoggedWork(Work):
    """A stage that has only logs so far: it is pending or starting, or it failed before it had planned anything."""

    def __init__(self, path: Path, past: bool) -> None:
        self.path = path
        self.root = Folder.open(path.parent / "logs")

    @property
    def processes(self) -> list[Process]:
        return []

    def look(self, queue: Queue, now: float) -> StageStatus:
        logs = newest(self.path)
        status = StageStatus(str(self.path), self.path.name, self._stage(), "failed" if logs.failed else "")
        status.jobs = self._jobs(queue, status.stage)
        if logs.failed:
            waits = "; its job is in SLURM's queue again" if status.jobs else ""
            status.problems.append(f"{logs.reason or 'it failed before anything was planned: see its logs'}{waits}")
        else:
            self._judge(status)
        if status.jobs:
            status.state = "starting" if any(job.state == "RUNNING" for job in status.jobs) else "pending"
        return status

    def _stage(self) -> str:
        return self.path.name.partition("-")[0]

    def _measure(self, status: StageStatus) -> None:
        pass


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: ``0-4,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


class DatasetWork(Work):
    """A dataset directory."""

    def __init__(self, path: Path, past: bool) -> None:
        super().__init__(path, past)
        self._dataset = Dataset(self.root)
        self._names: list[str] = []
        self._counts: dict[int, int] = {}
        self._redone: dict[int, str] = {}

    def _stage(self) -> str:
        return self._dataset.stage

    def _samples(self, process: Process, running: set[tuple[float, str, int]]) -> int:
        """For a process that has ended, only samples of partitions that it committed; another one repeats the rest."""
        last = process.last
        if (last["begin"], str(last.get("host", "")), int(last.get("pid", 0))) in running:
            return super()._samples(process, running)
        return int(last["totals"].get("in", 0))

    def _measure(self, status: StageStatus) -> None:
        names = self.root.listdir()
        if names != self._names or (self._dataset.success is None and SUCCESS in names):
            plans = len(self._dataset.plans)
            self._dataset, self._names = Dataset(self.root), names
            if len(self._dataset.plans) != plans or not self._counts:
                self._counts.clear()
                redone = set().union(*(plan.redo for plan in self._dataset.plans))
                self._redone = {index: self._dataset.slot(index) for index in redone}
        dataset, success = self._dataset, self._dataset.success
        status.total = dataset.partitions
        if success is not None:
            counts = success["counts"]
            status.state, status.done, status.reasons = "finished", dataset.partitions, dict(success["reasons"])
            status.samples, status.kept = counts["in"], counts["kept"]
            status.dropped, status.failed = counts["dropped"], counts["failed"]
            return
        status.done = self._committed()
        expected = [plan.header["expected"] for plan in dataset.plans]
        left = float(sum(expected) - status.samples)
        committed = sum(process.last["totals"].get("in", 0) for process in self.processes)
        partitions = sum(process.last["totals"].get("partitions", 0) for process in self.processes)
        if min(expected) < 0 or len(expected) > 1 or left < 0:
            left = (status.total - status.done) * committed / partitions if partitions else -1.0
        status.eta = left / status.rate if left >= 0 and status.rate > 0 else None

    def _committed(self) -> int:
        """Number of committed partitions; buckets that are complete are not listed again."""
        total = self._dataset.partitions
        buckets = -(-total // BUCKET)
        spans = [min(BUCKET, total - bucket * BUCKET) for bucket in range(buckets)]
        mark = re.compile(rf"(\d+)\.{self._dataset.plans[-1].generation}\.full")
        for name in self._list("claims"):
            if (found := mark.fullmatch(name)) and int(found[1]) < buckets:
                self._counts[int(found[1])] = spans[int(found[1])]
        unseen = [bucket for bucket in range(buckets) if bucket not in self._counts]
        seen = [bucket for bucket, count in self._counts.items() if count < spans[bucket]]
        for bucket in unseen + seen[: max(0, _LISTINGS - len(unseen))]:
            self._counts.pop(bucket, None)  # to the end of the queue
            self._counts[bucket] = self._count(bucket)
        return sum(self._counts.values())

    def _count(self, bucket: int) -> int:
        names = self._list(f"data/{bucket:03d}")
        if not self._redone:
            return sum(name.isdigit() for name in names)
        slots = ((name, int(name.partition(".")[0])) for name in names if name[:1].isdigit())
        return sum(name == self._redone.get(index, f"{index:05d}") for name, index in slots)

    def _list(self, name: str) -> list[str]:
        try:
            with self.root.folder(name) as folder:
                return folder.listdir()
        except OSError as error:
            if error.errno not in GONE:
                raise
            return []


class RunWork(Work):
    """A training run."""

    def _stage(self) -> str:
        return "train"

    def _measure(self, status: StageStatus) -> None:
        by_rank = {rank.rank: rank for rank in status.ranks}
        last = max((p.last for p in self.processes), key=lambda event: event.get("step", 0), default={})
        status.done, status.total, status.loss = last.get("step", 0), last.get("of", 0), last.get("loss")
        if said := upload_problem(self.path):
            status.problems.append(said)
        if status.ranks and all(rank.state == "finished" for rank in status.ranks):
            status.state, status.total = "finished", status.done  # it may have stopped early
            return
        rank = by_rank.get(last.get("rank", -1))
        if rank is not None and rank.rate > 0 and last.get("batch"):
            status.eta = (status.total - status.done) * last["batch"] / rank.rate


_ORDER = {stage: number for number, stage in enumerate((*MAIN_LINE[:2], "score", "select", "dedup", *MAIN_LINE[2:]))}


def _place(path: Path) -> tuple[str, bool, str, int, str]:
    """Sort key: outputs of a dataset in the order in which they run, the stages of each split, then training runs."""
    stage = path.name.partition("-")[0]
    return str(path.parent.parent), path.parent.name == "runs", path.parent.name, _ORDER.get(stage, 99), str(path)
