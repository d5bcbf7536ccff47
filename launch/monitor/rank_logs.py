"""Selects the log of a rank, shows its end, and follows it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from launch.monitor.flight_report import explain
from launch.monitor.job_logs import newest
from launch.monitor.watch import ACTIVE, Snapshot, StageStatus
from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError

_MOST = 5  # logs shown at the same time
_ROUND = 0.5


def choose(snapshot: Snapshot, wanted: str) -> list[Path]:
    """The logs selected by ``logs=wanted``: rank3 (or 3), failed, or job.

    Raises:
        ConfigError: there is no such log.
    """
    number = re.fullmatch(r"(?:rank)?(\d+)", wanted)
    if not number and wanted not in ("failed", "job"):
        raise ConfigError(f"logs={wanted}: {nearest(wanted, ['rank<number>', 'failed', 'job'])}")
    stage = _of_interest(snapshot.stages)
    folders = [Path(stage.path)] if stage else []
    if not snapshot.stages:
        folders = [Path(snapshot.root)]  # for a stage that failed before it had a plan
    found: dict[Path, None] = {}
    if number:
        rank = int(number[1])
        found |= dict.fromkeys(Path(r.log) for r in (stage.ranks if stage else []) if r.rank == rank and r.log)
        if not found:
            found |= dict.fromkeys(log for folder in folders for log in newest(folder).of_rank(rank))
    elif wanted == "failed":
        bad = [r for r in (stage.ranks if stage else []) if r.state in ("failed", "hung", "lost", "silent", "stuck")]
        found |= dict.fromkeys(Path(r.log) for r in bad if r.log)
        if stage is None or stage.state != "finished":
            found |= dict.fromkeys(log for folder in folders for log in newest(folder).of_failed())
    else:
        found |= dict.fromkeys(Path(r.job_log) for r in (stage.ranks if stage else []) if r.job_log)
        if not found:
            found |= dict.fromkeys(log for folder in folders for log in newest(folder).outputs)
    logs = [path for path in found if path.is_file()][:_MOST]
    if not logs:
        where = stage.path if stage else snapshot.root
        lost = "".join(f"; {path} cannot be read here" for path in list(found)[:1])
        reason = "no rank of it failed" if wanted == "failed" and not found else f"no log of it is known{lost}"
        raise ConfigError(f"logs={wanted}: {reason} ({where})")
    return logs


def _of_interest(stages: list[StageStatus]) -> StageStatus | None:
    """The running stage, else one that ended badly, else the most recent one."""

    def begun(stage: StageStatus) -> float:
        return max((rank.begin for rank in stage.ranks), default=0.0)

    order = sorted(stages, key=lambda s: (s.state in ACTIVE, s.state not in ("finished", "planned"), begun(s)))
    return order[-1] if order else None


def collectives(snapshot: Snapshot) -> list[str]:
    """Which ranks hung in which collective, in the newest life of the newest job of the stage of interest."""
    stage = _of_interest(snapshot.stages)
    return explain(newest(Path(stage.path)).flight) if stage and stage.state != "finished" else []


# ---- showing


def show(logs: list[Path], lines: int, more: Callable[[], bool] | None) -> None:
    """Print the last ``lines`` of each log, and then, as long as ``more`` returns True, what is added to them."""
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
        with suppress(FileNotFoundError), path.open("rb") as file:  # while it is being replaced
            file.seek(
                place if place <= os.fstat(file.fileno()).st_size else 0
            )  # otherwise it is a new file, because the old one was full
            if added := file.read():
                places[path] = file.tell()
                yield path, added.decode("utf-8", "replace")
