"""Progress events: append-only JSON lines, one file per process, in ``events/`` of the folder that it works on.

Every event contains the process's totals so far, so that a reader needs only the last line of each file.
Files of a rank's earlier processes are folded into one, ``<rank>.<uuid>.past.jsonl``, so that a job of many lives
leaves few files.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.distributed.rank import Rank
from pipeline.distributed.signals import Stopped
from pipeline.storage import GONE, Folder, StorageError
from pipeline.telemetry.log_rotation import limit, rotate
from pipeline.telemetry.process_stats import Vitals, asked

BEAT = 10.0  # seconds between two beats (events that show that a process is alive)
ENDS = ("finish", "stop", "error", "hang")
_PER_BUCKET = 1000
_MOST_BYTES = 1 << 20  # size of an event file above which it is thinned out
_KEPT = 200  # newest events that thinning out keeps
_TAIL = 16384  # bytes read at the end of a file
_WHOLE = 65536  # with `past`, files up to this size are read completely, larger ones at _PLACES positions
_PLACES = 24
_RECENT = 300.0  # seconds over which the rate of a process is averaged
_MOST_POINTS = 128
_APART = 4.0  # seconds between points
_DEAD = 600.0  # seconds without events after which a file is read only once a minute
_FEW = 3  # files of a rank's earlier processes that are not folded
_OF_PAST = 24  # events per process in a folded file
_NAME = re.compile(r"\d+\.\w+(\.past)?\.jsonl")


# ---- writing


class Events:
    """The event file of one process.

    Args:
        root: the folder that it works on.
        beat: seconds between two beats; also written to the file, so that readers can tell when a process is silent.
    """

    def __init__(self, root: Folder, rank: Rank, beat: float = BEAT) -> None:
        self._root = root
        self._log_limit = limit()
        rank.life.work = str(root.path)
        bucket = f"events/{rank.rank // _PER_BUCKET:03d}"
        root.mkdir("events", exist_ok=True)
        root.mkdir(bucket, exist_ok=True)
        self._name = f"{bucket}/{rank.rank:05d}.{uuid.uuid4().hex}.jsonl"
        self._rank = rank
        self._vitals = Vitals(rank)
        self._fixed = {
            "begin": time.time(),
            "rank": rank.rank,
            "world_size": rank.world_size,
            "host": rank.node or socket.gethostname(),
            "pid": os.getpid(),
            "beat": beat,
            **_job(),
            **asked(rank.local_world_size),
        }
        self.beat = beat
        self._bytes = 0
        self._lock = threading.Lock()
        self.totals: Counter[str] = Counter()

    def emit(self, event: str, **values: Any) -> None:
        """Append one event; ``values`` must be JSON-able. A failed write is only counted (``events_lost``)."""
        line = {
            "event": event,
            "time": time.time(),
            **self._fixed,
            **self._vitals.read(),
            **self._rank.now,
            "totals": dict(self.totals),
            **values,
        }
        data = json.dumps(line).encode() + b"\n"
        try:
            with self._lock:
                self._root.append(self._name, data)
                self._bytes += len(data)
                if self._bytes > _MOST_BYTES:
                    self._thin()
        except OSError:
            self.totals["events_lost"] += 1

    def _thin(self) -> None:
        """Remove every second one of the older events, so that files of runs of months do not grow to gigabytes."""
        lines = self._root.read(self._name).splitlines(keepends=True)
        kept = b"".join([*lines[:1], *lines[1:-_KEPT:2], *lines[-_KEPT:]])
        bucket, _, name = self._name.rpartition("/")
        with self._root.folder(bucket) as folder:
            folder.write_atomic(name, kept)
        self._bytes = len(kept)

    @contextmanager
    def around(self, **values: Any) -> Iterator[None]:
        """Context: emits an event at the start (with ``values``), every ``beat`` seconds, and at the end."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beats, args=(ended,), name="latentmill-events", daemon=True)
        self.emit("start", **values)
        thread.start()
        last: dict[str, Any] = {"event": "finish"}
        try:
            yield
        except BaseException as error:
            name = "stop" if isinstance(error, Stopped) else "error"
            last = {"event": name, "error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            ended.set()
            thread.join()
            self.emit(**last)

    def _beats(self, ended: threading.Event) -> None:
        folded = False
        while not ended.wait(self.beat):
            self.emit("beat")
            rotate(self._log_limit)
            if not folded:  # not at the start, when many ranks access the file system at once
                folded = True
                with suppress(OSError, StorageError):
                    fold(self._root, self._name.rpartition("/")[0], self._rank.rank)


def fold(root: Folder, bucket: str, rank: int) -> None:
    """Merge the event files of this rank's earlier processes into one, thinned out, if there are more than a few.

    Files of processes that may still run are left alone: a process counts as past if it has emitted a final event,
    belongs to an earlier life of this job, or has been silent for long. If it does write again, readers recognize it.
    Two processes that fold at the same time lose nothing either, because each writes its own file before it deletes
    those that it has read.
    """
    with root.folder(bucket) as folder:
        names = [name for name in folder.listdir() if _NAME.fullmatch(name) and int(name.partition(".")[0]) == rank]
        if len(names) <= _FEW:
            return
        reader = EventReader(root, past=True)
        past: dict[str, list[bytes]] = {}
        for name in names:
            lines = folder.read(name).splitlines(keepends=True)
            if name.endswith(".past.jsonl"):
                past[name] = lines
            elif (process := reader.read(f"{bucket}/{name}")) and _is_past(process):
                lines = [line for line in lines if _event(line)]
                past[name] = [*lines[:: max(1, len(lines) // _OF_PAST)], *lines[-1:]]
        if len(past) <= _FEW:
            return
        lines = [line for lines in past.values() for line in lines]
        if sum(map(len, lines)) > _MOST_BYTES:
            lines = list({_identity(json.loads(line)): line for line in lines}.values())  # the newest of each process
        folder.write_atomic(f"{rank:05d}.{uuid.uuid4().hex}.past.jsonl", b"".join(lines))
        for name in past:
            folder.unlink(name, missing_ok=True)


def _is_past(process: Process) -> bool:
    job, life = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
    last = process.last
    earlier = bool(job) and last.get("job") == job and int(last.get("life") or 0) < int(life or 0)
    return bool(process.ended) or earlier or time.time() - process.written > _DEAD


def _job() -> dict[str, str]:
    """SLURM job, life and log files of this process, as far as the environment (set by slurm/job.sh) says."""
    told = {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "life": os.environ.get("SLURM_RESTART_COUNT", ""),
        "job_log": os.environ.get("LATENTMILL_JOB_OUTPUT", ""),
    }
    if prefix := os.environ.get("LATENTMILL_TASK_OUTPUT"):
        told["log"] = f"{prefix}-{os.environ.get('SLURM_PROCID', '0')}.log"
    else:
        with suppress(OSError):
            path = os.readlink("/proc/self/fd/2")
            told["log"] = path if os.path.isfile(path) else ""
    return {name: value for name, value in told.items() if value}


# ---- reading

Point = tuple[float, ...]
"""Time; samples done, bytes read, bytes written and seconds waited since the process began; memory in bytes; GPU
utilization (0 to 1) and loss, which may be NaN."""
TIME, DONE, READ, WRITTEN, WAITED, MEMORY, GPU, LOSS = range(8)


@dataclass
class Process:
    """The events of one process.

    Attributes:
        last: its newest event.
        ended: its final event (finish, stop, error or hang); empty if there is none.
        points: its progress over time, oldest first.
        written: when ``last`` was written, by the file server's clock; 0 if unknown.
    """

    last: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    written: float = 0.0

    @property
    def skew(self) -> float:
        """Seconds by which the clock of the process's node is ahead of the file server's; 0 if unknown."""
        return float(self.last["time"]) - self.written if self.written else 0.0

    def add(self, event: dict[str, Any]) -> None:
        """Add an event, which must be newer than all others."""
        self.last = event
        if event["event"] in ENDS and not self.ended:
            self.ended = event
        point = _point(event)
        if len(self.points) > 1 and point[0] - self.points[-2][0] < _APART:
            self.points.pop()
        self.points.append(point)
        if len(self.points) > _MOST_POINTS:
            recent = next(i for i, old in enumerate(self.points) if old[0] >= point[0] - _RECENT)
            self.points = [*self.points[:recent:2], *self.points[recent:]]

    def rate(self, column: int, now: float) -> float:
        """Growth per second of a column of ``points``, over the last minutes of the process or its whole life."""
        end = self.ended.get("time") or max(now, self.last["time"])
        first: Point = (self.last["begin"], 0.0, 0.0, 0.0, 0.0)  # only columns that grow
        if end - first[0] > _RECENT and len(self.points) > 1:
            first = next((point for point in reversed(self.points) if point[0] <= end - _RECENT), self.points[0])
        found: float = max(0.0, self.points[-1][column] - first[column]) / max(1.0, end - first[0])
        return found


def _point(event: dict[str, Any]) -> Point:
    done = float(event.get("done", event["totals"].get("in", 0)))
    return (
        float(event["time"]),
        done,
        float(event.get("read", 0)),
        float(event.get("written", 0)),
        float(event.get("waited", 0)),
        float(event.get("rss", 0)),
        float((event.get("gpu") or {}).get("use", math.nan)),
        math.nan if event.get("loss") is None else float(event["loss"]),
    )


Identity = tuple[Any, ...]
"""Identity of a process: start time, rank, host and process id."""


class EventReader:
    """Reads the event files below ``root`` incrementally.

    A refresh lists the folders and, for each process that may still run, reads what was added to its file.

    Args:
        past: also read earlier events, for plots; otherwise only the end of each file.
    """

    def __init__(self, root: Folder, past: bool = False) -> None:
        self.processes: dict[Identity, Process] = {}
        self._root = root
        self._past = past
        self._files: dict[str, Identity] = {}  # file → process of its newest event
        self._offsets: dict[str, int] = {}
        self._looked: dict[str, float] = {}

    def refresh(self) -> list[Process]:
        """All processes that ever worked on ``root``; unreadable lines are skipped."""
        now = time.time()
        for bucket in self._list("events"):
            for name in self._list(f"events/{bucket}"):
                path = f"events/{bucket}/{name}"
                if _NAME.fullmatch(name) and self._due(path, now):
                    with suppress(OSError):
                        self._read(path)
                        self._looked[path] = now
        return list(self.processes.values())

    def read(self, path: str) -> Process | None:
        """The process with the newest event in one file; None if the file has no readable events."""
        self._read(path)
        return self.processes.get(self._files[path]) if path in self._files else None

    def _list(self, name: str) -> list[str]:
        try:
            with self._root.folder(name) as folder:
                return folder.listdir()
        except OSError as error:
            if error.errno in (*GONE, 20):
                return []
            raise

    def _due(self, path: str, now: float) -> bool:
        if path not in self._files:
            return True
        process = self.processes[self._files[path]]
        dead = now - process.last["time"] > _DEAD
        return not process.ended and not _is_folded(path) and (not dead or now - self._looked[path] >= 60)

    def _read(self, path: str) -> None:
        fd = self._root.open_file(path)
        try:
            if self._offsets.get(path, 0) > os.fstat(fd).st_size:  # thinned out since the last read
                self._offsets.pop(path)
                self.processes.pop(self._files.pop(path), None)
            if path in self._offsets:
                start = self._offsets[path]
                text = _read_from(fd, start)
            else:
                size = os.fstat(fd).st_size
                start = max(0, size - _TAIL) if size > (_WHOLE if self._past else _TAIL) else 0
                if _is_folded(path):
                    start = 0
                if start and self._past:
                    for place in range(0, start, max(2048, start // _PLACES)):
                        self._add(path, os.pread(fd, 4096, place).split(b"\n")[1:-1][:1])
                text = _read_from(fd, start)
            written = os.fstat(fd).st_mtime
        finally:
            os.close(fd)
        complete = text.rfind(b"\n") + 1
        lines = text[:complete].split(b"\n")
        self._add(path, lines[1 if start and path not in self._offsets else 0 : -1])
        self._offsets[path] = start + complete
        if complete and path in self._files and not _is_folded(path):
            self.processes[self._files[path]].written = written

    def _add(self, path: str, lines: list[bytes]) -> None:
        for line in lines:
            if not (event := _event(line)):
                continue
            identity = _identity(event)
            process = self.processes.setdefault(identity, Process())
            if self._files.get(path) != identity and process.last and event["time"] <= process.last["time"]:
                continue  # already read from another file: one of the two was folded into the other
            process.add(event)
            self._files[path] = identity


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None if it is damaged or incomplete."""
    try:
        event: dict[str, Any] = json.loads(line)
        _point(event), _identity(event), event["event"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return event


def _identity(event: dict[str, Any]) -> Identity:
    return (event["begin"], event["rank"], event.get("host"), event.get("pid"))


def _is_folded(path: str) -> bool:
    return path.endswith(".past.jsonl")


def _read_from(fd: int, start: int) -> bytes:
    parts = []
    while part := os.pread(fd, 1 << 20, start):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def last_events(root: Path) -> Iterator[dict[str, Any]]:
    """The newest event of every process that worked on ``root``."""
    try:
        folder = Folder.open(root)
    except OSError:
        return
    with folder:
        yield from (process.last for process in EventReader(folder).refresh())
