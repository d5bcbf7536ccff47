"""The status page: tables and plots in a single HTML file that refreshes itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader
from numpy.typing import NDArray

from launch.monitor import status_table
from launch.monitor.ranks import BAD
from launch.monitor.watch import Snapshot, StageStatus
from pipeline.storage import Folder
from pipeline.telemetry.events import DONE, GPU, LOSS, MEMORY, READ, TIME, WAITED, WRITTEN, Process
from pipeline.telemetry.units import duration, size

_TIMES = 120
_STEADY = 5  # newest points of a live process over which its current speed is averaged
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 340, 150, 46, 20, 8
Series = NDArray[np.float64]


@dataclass(frozen=True)
class Plot:
    title: str
    svg: str


def write(path: Path, snapshot: Snapshot, processes: dict[str, list[Process]], every: float) -> None:
    """Write the page atomically: readers see either the old or the new one.

    Args:
        processes: path of a stage → its processes, with their past events.
        every: seconds after which the page reloads itself; 0: never.
    """
    with Folder.open(path.absolute().parent) as folder:
        folder.write_atomic(path.name, render(snapshot, processes, every).encode())


def render(snapshot: Snapshot, processes: dict[str, list[Process]], every: float) -> str:
    places = [PackageLoader("launch.monitor", "."), PackageLoader("pipeline.stages")]  # it shares the report's style
    environment = Environment(loader=ChoiceLoader(places), autoescape=True)
    environment.globals |= {
        "bad": BAD,
        "duration": duration,
        "megabytes": status_table.megabytes,
        "number": status_table.number,
        "own_share": status_table.own_share,
        "ranks_of": status_table.ranks_of,
        "share": status_table.share,
        "size": size,
        "foremost": status_table.foremost,
    }
    return environment.get_template("page.html").render(
        now=snapshot,
        plots={stage.path: plots(stage, processes.get(stage.path, []), snapshot.time) for stage in snapshot.stages},
        made=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.time)),
        every=max(1, round(every)) if every else 0,
    )


def plots(stage: StageStatus, processes: list[Process], now: float) -> list[Plot]:
    """Plots of a stage since its first process began."""
    if not processes:
        return []
    begin = min(process.last["begin"] for process in processes)
    end = max(process.last["time"] for process in processes)
    end = now if stage.state == "running" else max(end, begin + 1)
    times = np.linspace(begin, end, _TIMES)
    drawn = [
        ("samples/s", _slope(processes, times, DONE)),
        ("MB/s in", _slope(processes, times, READ) / 1e6),
        ("MB/s out", _slope(processes, times, WRITTEN) / 1e6),
        ("ranks", _level(processes, times, None)),
        ("memory of all ranks, GB", _level(processes, times, MEMORY) / 1e9),
        ("idle, %", 100 * _slope(processes, times, WAITED) / np.maximum(1, _level(processes, times, None))),
    ]
    gpu = _mean(processes, times, GPU)
    loss = _mean(processes, times, LOSS)
    drawn += [("GPU use, %", 100 * gpu)] if np.isfinite(gpu).any() else []
    drawn += [("loss", loss)] if np.isfinite(loss).any() else []
    return [Plot(title, draw(times, values)) for title, values in drawn]


def _columns(process: Process) -> Series:
    """Points of a process, (points, columns), preceded by one for its start."""
    first = [process.last["begin"], *[0.0] * WAITED, *process.points[0][MEMORY:]]
    return np.array([first, *process.points], np.float64)


def _slope(processes: list[Process], times: Series, column: int) -> Series:
    """Sum over all processes of the growth per second of a column that they count up, at each of ``times``."""
    total = np.zeros(len(times))
    for process in processes:
        points = _columns(process)
        seen, counted = points[:, TIME], np.maximum.accumulate(points[:, column])
        if not process.ended and len(points) > 2:  # until its next event, assume its last speed instead of 0
            since = max(0, len(points) - 1 - _STEADY)
            speed = (counted[-1] - counted[since]) / max(seen[-1] - seen[since], 1e-9)
            ahead = 2 * process.last.get("beat", 10.0)
            seen, counted = np.append(seen, seen[-1] + ahead), np.append(counted, counted[-1] + speed * ahead)
        total += np.interp(times, seen, counted)
    found: Series = np.maximum(0, np.gradient(total, times))
    return found


def _level(processes: list[Process], times: Series, column: int | None) -> Series:
    """Sum of a column over the processes that live at each of ``times``; with None, the number of processes."""
    total = np.zeros(len(times))
    for process in processes:
        points = _columns(process)
        alive = (times >= points[0, TIME]) & (times <= points[-1, TIME] + 2 * process.last.get("beat", 10.0))
        total += alive * (1.0 if column is None else np.interp(times, points[:, TIME], points[:, column]))
    return total


def _mean(processes: list[Process], times: Series, column: int) -> Series:
    """Mean of a column over the processes that report it at each of ``times``; NaN if none does."""
    total, count = np.zeros(len(times)), np.zeros(len(times))
    for process in processes:
        points = _columns(process)
        points = points[np.isfinite(points[:, column])]
        if len(points):
            alive = (times >= points[0, TIME]) & (times <= points[-1, TIME] + 2 * process.last.get("beat", 10.0))
            total += alive * np.interp(times, points[:, TIME], points[:, column])
            count += alive
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / count)


# ---- drawing


def draw(times: Series, values: Series) -> str:
    """An SVG with ``values`` as a line over ``times``."""
    good = np.isfinite(values)
    top = nice(float(values[good].max()) if good.any() else 1.0)
    right, bottom = _WIDTH - 8, _HEIGHT - _BOTTOM

    def x(t: Any) -> Any:
        return _LEFT + (t - times[0]) / max(1e-9, times[-1] - times[0]) * (right - _LEFT)

    def y(v: Any) -> Any:
        return bottom - v / top * (bottom - _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for level in (0, top / 2, top):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(level) + 4:.1f}" text-anchor="end">{level:.4g}</text>')
    form = "%H:%M:%S" if times[-1] - times[0] < 600 else "%H:%M" if times[-1] - times[0] < 129_600 else "%d %b"
    for part, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        at = times[0] + part * (times[-1] - times[0])
        said = time.strftime(form, time.localtime(at))
        parts.append(f'<text x="{x(at):.1f}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{said}</text>')
    points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in zip(times[good], values[good], strict=True))
    if good.any():
        first, last = x(times[good][0]), x(times[good][-1])
        parts.append(f'<polygon points="{first:.1f},{bottom} {points} {last:.1f},{bottom}"/>')
        parts.append(f'<polyline points="{points}"/>')
    return "".join([*parts, "</svg>"])


def nice(value: float) -> float:
    """``value`` rounded up to 1, 2, 4 or 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 4, 10) if step * power >= value * 0.999))
