"""Derives the state of each rank from the events of its processes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from launch.monitor.queue import Queue
from pipeline.telemetry.events import DONE, READ, WAITED, WRITTEN, Process
from pipeline.telemetry.units import duration

LIVE = ("running", "waiting", "slow", "stuck")
BAD = ("failed", "hung", "lost", "silent", "stuck", "slow")
"""States that a person should know about, the worst first."""
_MISSED = 2.5  # missed heartbeats after which SLURM is asked about the job
_SILENT = 6  # missed heartbeats after which a rank counts as silent
_STUCK = 30  # heartbeats without progress after which a rank counts as stuck
_SLOW = 1 / 3  # share of the median speed below which a rank counts as slow
_ENDED = {"finish": "finished", "stop": "stopped", "error": "failed", "hang": "hung"}


@dataclass
class RankStatus:
    """The state of one rank; sizes in bytes, times in seconds, rates per second over five minutes, shares 0 to 1."""

    rank: int
    state: str
    note: str
    host: str
    pid: int
    job: str
    life: int
    begin: float
    heartbeat: float
    """Seconds since its last event."""
    at: int
    """The partition that it is working on; -1: none."""
    partitions: int
    samples: int
    kept: int
    dropped: int
    failed: int
    rate: float
    read_rate: float
    write_rate: float
    memory: int
    peak_memory: int
    idle: float
    gpu: float | None
    gpu_memory: int | None
    log: str
    job_log: str

    @property
    def live(self) -> bool:
        return self.state in LIVE


def current(processes: Iterable[Process], now: float) -> list[Process]:
    """The newest process of each rank of the newest run, ordered by rank; earlier runs may have had other world sizes.

    Also includes live processes of other jobs that work on the same output at the same time.
    """
    newest = sorted(processes, key=lambda process: process.last["begin"])
    if not newest:
        return []
    world, job = newest[-1].last["world_size"], _job(newest[-1])
    by_rank = {p.last["rank"]: p for p in newest if p.last["world_size"] == world}
    shown = {id(process) for process in by_rank.values()}
    beside = {
        (_job(p), p.last["rank"]): p
        for p in newest
        if _job(p) not in ("", job) and not p.ended and now + p.skew - p.last["time"] < _SILENT * _beat(p)
    }
    others = [process for process in beside.values() if id(process) not in shown]
    return sorted([*by_rank.values(), *others], key=lambda process: (process.last["rank"], process.last["begin"]))


def _job(process: Process) -> str:
    return str(process.last.get("job", ""))


def statuses(processes: Iterable[Process], queue: Queue, now: float) -> list[RankStatus]:
    """The state of each rank of the newest run; ``now`` is the time by the file server's clock."""
    shown = current(processes, now)
    ranks = [_status(process, queue, now + process.skew) for process in shown]
    speeds = [rank.rate for rank in ranks if rank.state == "running"]
    if len(speeds) >= 4:
        median = statistics.median(speeds)
        for process, rank in zip(shown, ranks, strict=True):
            settled = now + process.skew - rank.begin > _SILENT * _beat(process)
            if rank.state == "running" and settled and rank.rate < _SLOW * median:
                rank.state = "slow"
                rank.note = f"{rank.rate:.3g} samples/s, the median is {median:.3g}"
    return ranks


def _status(process: Process, queue: Queue, now: float) -> RankStatus:
    last, totals = process.last, process.last["totals"]
    state, note = _state(process, queue, now)
    live = state in LIVE
    gpu = last.get("gpu") or {}
    return RankStatus(
        rank=last["rank"],
        state=state,
        note=note,
        host=str(last.get("host", "")),
        pid=int(last.get("pid", 0)),
        job=str(last.get("job", "")),
        life=int(last.get("life", 0)),
        begin=last["begin"],
        heartbeat=max(0.0, now - last["time"]),
        at=int(last.get("partition", -1)),
        partitions=totals.get("partitions", 0),
        samples=int(process.points[-1][DONE]),
        kept=totals.get("kept", 0),
        dropped=totals.get("dropped", 0),
        failed=totals.get("failed", 0),
        rate=process.rate(DONE, now) if live else 0.0,
        read_rate=process.rate(READ, now) if live else 0.0,
        write_rate=process.rate(WRITTEN, now) if live else 0.0,
        memory=int(last.get("rss", 0)),
        peak_memory=int(last.get("peak", 0)),
        idle=min(1.0, process.rate(WAITED, now)) if live else 0.0,
        gpu=gpu.get("use"),
        gpu_memory=gpu.get("memory"),
        log=str(last.get("log", "")),
        job_log=str(last.get("job_log", "")),
    )


def _beat(process: Process) -> float:
    return float(process.last.get("beat", 10.0))


def _state(process: Process, queue: Queue, now: float) -> tuple[str, str]:
    last, ended = process.last, process.ended
    if ended:
        if ended["event"] == "hang":
            note = f"no progress for {duration(ended.get('seconds', 0))}{_place(last)}: ended itself"
            return "hung", f"{note}; its log shows where"
        return _ENDED[ended["event"]], str(ended.get("error", "")) if ended["event"] == "error" else ""
    silence = now - last["time"]
    over = queue.is_over(_job(process), last["time"] - process.skew) if silence > _MISSED * _beat(process) else ""
    if over:
        return "lost", f"it ended without a message{_place(last)}: {over}"
    if silence > _SILENT * _beat(process):
        return "silent", f"no sign of life for {duration(silence)}{_place(last)}: killed, lost or frozen"
    if last.get("still", 0) > _STUCK * _beat(process):
        return "stuck", f"no progress for {duration(last['still'])}{_place(last)}"
    return ("waiting" if last.get("partition") == -1 and last["event"] != "start" else "running"), ""


def _place(event: dict[str, object]) -> str:
    return f" at partition {event['partition']}" if event.get("partition", -1) != -1 else ""
