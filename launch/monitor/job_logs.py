"""Finds logs that no event names: files that the launcher wrote to ``logs/`` next to an output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from launch.monitor.flight_report import FLIGHT

UNHARMED = ("0", "75", "76")
"""Exit codes of ranks that finished, were stopped, or ended because another rank failed."""
_ERROR = re.compile(r"^(?:\d\d:\d\d:\d\d \[rank [^]]*\] )?(error: .*|[A-Za-z_.]*Error: .*)$", re.MULTILINE)
_VERDICT = re.compile(r"(?:Not started again|Giving up|could not be requeued)")
_FOLDER = re.compile(r"(.+)\.(?:slurm|\d{8}-\d{6}\.\d+)")
_TAIL = 20_000  # bytes at the end of a log that are searched
_FEW = 8  # number of rank logs that are searched


@dataclass
class JobLogs:
    """Logs of the newest job that worked on an output.

    Attributes:
        outputs: SLURM's log of the job itself.
        ranks: one log per task.
        lives: folders with the ranks' reports of how they ended, one per life, the newest last.
        flight: recordings of collectives from the last life.
    """

    outputs: list[Path] = field(default_factory=list)
    ranks: list[Path] = field(default_factory=list)
    lives: list[Path] = field(default_factory=list)
    flight: list[Path] = field(default_factory=list)

    @cached_property
    def ended(self) -> dict[int, str]:
        """Rank → its exit code in the job's last life."""
        codes = [path.name.partition(".") for path in (self.lives[-1].glob("*.*") if self.lives else [])]
        return {int(rank): code for rank, _, code in codes if rank.isdigit() and code.isdigit()}

    def of_rank(self, rank: int) -> list[Path]:
        """The log of a rank; in arrays, ranks are numbered over all elements, but tasks of each element from 0."""
        tasks = {
            int(found[1]): path for path in self.ranks if (found := re.search(r"(?:-|rank)(\d+)\.log$", path.name))
        }
        return [tasks[rank % len(tasks)]] if tasks and rank % len(tasks) in tasks else []

    def of_failed(self) -> list[Path]:
        failed = [rank for rank, code in sorted(self.ended.items()) if code not in UNHARMED]
        if not failed and not self.outputs:  # without a job script, there are no reports of how ranks ended
            return [path for path in self.ranks if _ERROR.search(_end_of(path))]
        return [log for rank in failed for log in self.of_rank(rank)] or (self.outputs if self.failed else [])

    @property
    def left_out(self) -> list[str]:
        """Nodes that did badly in earlier lives and are excluded from later ones."""
        return sorted(set(_read(self.lives[-1].parent / "excluded").split())) if self.lives else []

    @property
    def failed(self) -> bool:
        """Whether the job failed, as far as its logs show."""
        if any(code not in UNHARMED for code in self.ended.values()):
            return True
        if self.outputs:
            return bool(_VERDICT.search(_last_line(self.outputs[-1])))
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """The first error that a rank reported; empty if there is none."""
        for rank, code in sorted(self.ended.items()):
            if code not in UNHARMED:
                lines = _read(self.lives[-1] / f"{rank}.{code}").splitlines()
                if len(lines) > 2 and lines[2]:
                    return f"rank {rank}: {lines[2]}"
        for path in self.ranks[:_FEW]:
            if errors := _ERROR.findall(_end_of(path)):
                return str(errors[-1])
        return _last_line(self.outputs[-1]) if self.outputs and not self.ended else ""


def newest(output: Path) -> JobLogs:
    """Logs of the newest job for an output."""
    folders = sorted(output.parent.glob(f"logs/{output.name}.*"), key=_time)
    if not folders:
        return JobLogs()
    outputs = sorted(folders[-1].glob("*.out"), key=_time)
    if not outputs:
        return JobLogs([], sorted(folders[-1].glob("rank*.log")), flight=sorted(folders[-1].glob(f"{FLIGHT}*")))
    job = outputs[-1].stem
    lives = sorted((folders[-1] / f".{job}").glob("[0-9]*.[0-9]*"), key=_time)
    flight = sorted(lives[-1].glob(f"{FLIGHT}*")) if lives else []
    return JobLogs(outputs[-1:], sorted(folders[-1].glob(f"{job}-*.log")), lives, flight)


def only_logged(folder: Path) -> Iterator[Path]:
    """Outputs below ``folder`` that have logs of a job, but no plan and no events."""
    found = (_FOLDER.fullmatch(path.name) for path in (folder / "logs").glob("*.*") if path.is_dir())
    for name in sorted({match[1] for match in found if match} - {"pack"}):
        output = folder / name
        if not any((output / part).exists() for part in ("plan", "events", "checkpoints")):
            logs = newest(output)
            if logs.failed or (logs.outputs and not re.search("finished; this life", _last_line(logs.outputs[-1]))):
                yield output


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _last_line(path: Path) -> str:
    lines = _end_of(path).strip().splitlines()
    return lines[-1] if lines else ""
