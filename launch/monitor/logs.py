"""Which log to look at, its end, and what comes after."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launch.monitor.flight import FLIGHT, explain
from launch.monitor.watch import ACTIVE, Snapshot, StageStatus
from pipeline.cli import nearest
from pipeline.config import ConfigError

_MOST = 5  # logs shown at a time
_UNHARMED = ("0", "75", "76")  # exit codes of ranks that finished, were stopped, or ended because another failed
_ROUND = 0.5


def choose(snapshot: Snapshot, wanted: str) -> list[Path]:
    """The logs that ``logs=wanted`` means: rank3 (or 3), failed, or job.

    Raises:
        ConfigError: there is no such log.
    """
    number = re.fullmatch(r"(?:rank)?(\d+)", wanted)
    if not number and wanted not in ("failed", "job"):
        raise ConfigError(f"logs={wanted}: {nearest(wanted, ['rank<number>', 'failed', 'job'])}")
    stage = _of_interest(snapshot.stages)
    folders = [Path(stage.path)] if stage else []
    if not snapshot.stages:
        folders = [Path(snapshot.root)]  # a stage that failed before it had planned
    found: dict[Path, None] = {}
    if number:
        rank = int(number[1])
        found |= dict.fromkeys(Path(r.log) for r in (stage.ranks if stage else []) if r.rank == rank and r.log)
        if not found:
            found |= dict.fromkeys(log for folder in folders for log in _newest(folder).of_rank(rank))
    elif wanted == "failed":
        bad = [r for r in (stage.ranks if stage else []) if r.state in ("failed", "hung", "lost", "silent", "stuck")]
        found |= dict.fromkeys(Path(r.log) for r in bad if r.log)
        if stage is None or stage.state != "finished":
            found |= dict.fromkeys(log for folder in folders for log in _newest(folder).of_failed())
    else:
        found |= dict.fromkeys(Path(r.job_log) for r in (stage.ranks if stage else []) if r.job_log)
        if not found:
            found |= dict.fromkeys(log for folder in folders for log in _newest(folder).outputs)
    logs = [path for path in found if path.is_file()][:_MOST]
    if not logs:
        where = stage.path if stage else snapshot.root
        lost = "".join(f"; {path} cannot be read here" for path in list(found)[:1])
        reason = "no rank of it failed" if wanted == "failed" and not found else f"no log of it is known{lost}"
        raise ConfigError(f"logs={wanted}: {reason} ({where})")
    return logs


def _of_interest(stages: list[StageStatus]) -> StageStatus | None:
    """The stage that runs, else that ended badly, else the one that did something last."""

    def newest(stage: StageStatus) -> float:
        return max((rank.begin for rank in stage.ranks), default=0.0)

    order = sorted(stages, key=lambda s: (s.state in ACTIVE, s.state not in ("finished", "planned"), newest(s)))
    return order[-1] if order else None


# ---- logs that no event tells of


@dataclass
class _Logs:
    """Logs of the newest job that worked on an output."""

    outputs: list[Path] = field(default_factory=list)
    ranks: list[Path] = field(default_factory=list)
    ended: dict[int, str] = field(default_factory=dict)
    """Rank → its exit code, of the job's last life."""
    flight: list[Path] = field(default_factory=list)
    """Recordings of collectives, of the same life."""

    def of_rank(self, rank: int) -> list[Path]:
        """Ranks of an array's elements count on, tasks of each from 0."""
        tasks = {
            int(found[1]): path for path in self.ranks if (found := re.search(r"(?:-|rank)(\d+)\.log$", path.name))
        }
        return [tasks[rank % len(tasks)]] if tasks and rank % len(tasks) in tasks else []

    def of_failed(self) -> list[Path]:
        failed = [rank for rank, code in sorted(self.ended.items()) if code not in _UNHARMED]
        return [log for rank in failed for log in self.of_rank(rank)] or (self.outputs if self.ended else [])


def _newest(output: Path) -> _Logs:
    """What the launcher left in ``logs/`` beside the output."""
    folders = sorted(output.parent.glob(f"logs/{output.name}.*"), key=lambda path: path.stat().st_mtime)
    if not folders:
        return _Logs()
    outputs = sorted(folders[-1].glob("*.out"), key=lambda path: path.stat().st_mtime)
    if not outputs:
        return _Logs([], sorted(folders[-1].glob("rank*.log")), flight=sorted(folders[-1].glob(f"{FLIGHT}*")))
    job = outputs[-1].stem
    lives = sorted((folders[-1] / f".{job}").glob("*.*"), key=lambda path: path.stat().st_mtime)
    codes = [path.name.partition(".") for path in (lives[-1].glob("*.*") if lives else [])]
    ended = {int(rank): code for rank, _, code in codes if rank.isdigit() and code.isdigit()}
    flight = [path for life in lives[-1:] for path in life.glob(f"{FLIGHT}*")]
    return _Logs(outputs[-1:], sorted(folders[-1].glob(f"{job}-*.log")), ended, flight)


def collectives(snapshot: Snapshot) -> list[str]:
    """Who hung in which collective, in the newest life of the newest job of the stage of interest."""
    stage = _of_interest(snapshot.stages)
    return explain(_newest(Path(stage.path)).flight) if stage and stage.state != "finished" else []


# ---- showing


def show(logs: list[Path], lines: int, more: Callable[[], bool] | None) -> None:
    """Print the last ``lines`` of each, and then, while ``more`` says so, what is added to them."""
    places = {}
    for number, path in enumerate(logs):
        if len(logs) > 1:
            print(f"{chr(10) if number else ''}==> {path} <==", flush=True)
        else:
            print(f"==> {path} <==", file=sys.stderr, flush=True)
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 200 * lines))
            text = file.read().decode("utf-8", "replace").splitlines()
            places[path] = file.tell()
        print("\n".join(text[-lines:]), flush=True)
    shown = logs[-1]
    while more is not None:
        going_on = more()
        for path, added in _added(places):
            if path != shown:
                print(f"\n==> {path} <==", flush=True)
                shown = path
            print(added, end="", flush=True)
        if not going_on:
            return
        time.sleep(_ROUND)


def _added(places: dict[Path, int]) -> Iterator[tuple[Path, str]]:
    for path, place in places.items():
        with path.open("rb") as file:
            file.seek(place)
            if added := file.read():
                places[path] = file.tell()
                yield path, added.decode("utf-8", "replace")
