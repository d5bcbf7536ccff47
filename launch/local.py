"""cluster=local: runs the ranks of a job as processes on this machine, and shows their progress on the terminal."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.monitor.flight_report import FLIGHT
from launch.script import is_single
from pipeline.distributed import EXIT_STOPPED, Rank
from pipeline.distributed.environment import free_port
from pipeline.telemetry.events import last_events
from pipeline.telemetry.log_rotation import LIMIT
from pipeline.telemetry.units import duration

if TYPE_CHECKING:
    from launch.job import Job

_GRACE = 30.0  # seconds in which ranks must stop at a safe boundary before they are killed
_TICK = 0.2
_PLAIN_EVERY = 10.0  # seconds between progress lines without a terminal
_PR_SET_PDEATHSIG = 1


def planner() -> Rank:
    """A rank that is only used for planning."""
    return Rank()


def run(job: Job) -> int:
    """Start the ranks, show their progress and wait for their end. Ctrl-C stops them at a safe boundary.

    Returns:
        0, or the first failed rank's exit code; 130 after Ctrl-C.
    """
    logs = _log_folder(job)
    ranks = _start(job, logs)
    progress = Progress(job)
    stopped = False
    with _Interrupt() as interrupt:
        while any(rank.poll() is None for rank in ranks):
            time.sleep(_TICK)
            progress.show()
            failed = [rank for rank in ranks if rank.poll()]
            if (failed or interrupt.count) and not stopped:
                stopped = True
                _signal(ranks, signal.SIGTERM)
                deadline = time.monotonic() + _GRACE
            if stopped and (time.monotonic() > deadline or interrupt.count > 1):
                _signal(ranks, signal.SIGKILL)
    progress.end()
    if interrupt.count:
        print(f"{job.stage}: stopped; the same command resumes", file=sys.stderr)
        return 130
    return _report(job, ranks, logs)


def _log_folder(job: Job) -> Path | None:
    """The folder for the ranks' logs, next to the stage's output; None: they write to this terminal."""
    if job.output is None:
        return None
    logs = job.output.parent / "logs" / f"{job.output.name}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return logs


def _start(job: Job, logs: Path | None) -> list[subprocess.Popen[bytes]]:
    port = free_port()
    cores = len(os.sched_getaffinity(0))
    root = Path(__file__).resolve().parent.parent
    ranks = []
    for rank in range(job.ranks):
        world = {
            "RANK": rank,
            "WORLD_SIZE": job.ranks,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": job.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        env = {"OMP_NUM_THREADS": str(max(1, cores // job.ranks)), LIMIT: "64", **os.environ}
        env |= {key: str(value) for key, value in world.items()}
        env |= {"TORCH_FR_DUMP_TEMP_FILE": str(logs / FLIGHT), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"} if logs else {}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        output = (logs / f"rank{rank}.log").open("ab") if logs else None
        ranks.append(
            subprocess.Popen(
                job.command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        )
        if output:
            output.close()
    return ranks


def _die_with_parent() -> None:
    """Let the system send SIGTERM to this rank when the launcher dies for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            with suppress(ProcessLookupError):
                rank.send_signal(number)


def _report(job: Job, ranks: list[subprocess.Popen[bytes]], logs: Path | None) -> int:
    """Print how the job ended, with the end of the log of the rank that failed first. Returns the exit code."""
    codes = [rank.returncode for rank in ranks]
    bad = [number for number, code in enumerate(codes) if code not in (0, EXIT_STOPPED)]
    if not bad and any(codes):
        print(f"{job.stage}: stopped by a signal; the same command resumes", file=sys.stderr)
        return EXIT_STOPPED
    worst = min(bad, key=lambda number: (codes[number] in (-signal.SIGTERM, -signal.SIGKILL), number), default=None)
    for number in range(len(ranks)) if worst is None else [worst]:
        if logs and (worst is not None or number == 0):
            brief = worst is None and not is_single(job.stage, job.arguments)
            _tail(logs / f"rank{number}.log", 1 if brief else 40)
    if worst is None:
        return 0
    print(
        f"{job.stage}: rank {worst} failed with code {codes[worst]}" + (f"; logs in {logs}" if logs else ""),
        file=sys.stderr,
    )
    return codes[worst] if codes[worst] > 0 else 1


def _tail(path: Path, lines: int) -> None:
    """Show the end of a log: what went wrong, if its last line says so, else its last lines."""
    text = path.read_bytes()[-20_000:].decode("utf-8", "replace").splitlines()
    plain = bool(text) and re.search(r"(^|\] )error: ", text[-1])
    print("\n".join(text[-1:] if plain else text[-lines:]), flush=True)


class _Interrupt:
    """Context: counts SIGINT (Ctrl-C) and SIGTERM instead of ending the process."""

    def __enter__(self) -> _Interrupt:
        self.count = 0
        self._before = {n: signal.signal(n, self._seen) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _seen(self, number: int, frame: object) -> None:
        self.count += 1

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class State:
    """Progress of a running job."""

    done: int
    total: int
    """0 if unknown."""
    unit: str
    text: str
    """Further information, such as the rate."""
    before: int = 0
    """Part of ``done`` that earlier runs did."""


class Progress:
    """Progress of a running job on stderr: a bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._begin = time.time()
        self._live = sys.stderr.isatty()
        self._next = time.monotonic() + (0.5 if self._live else _PLAIN_EVERY)
        self._shown = ""
        self._display: Any = None

    def show(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (0.5 if self._live else _PLAIN_EVERY)
        if self._live:
            self._draw()
        elif (line := self.line()) and line != self._shown:
            self._shown = line
            print(line, file=sys.stderr, flush=True)

    def _draw(self) -> None:
        state = self.state()
        if state is None:
            return
        if self._display is None:
            self._display = _bar()
            self._display.start()
            self._task = self._display.add_task(self._job.stage, total=None, text="")
        elapsed = time.time() - self._begin
        remaining = (state.total - state.done) * elapsed
        left = f", {duration(remaining / (state.done - state.before))} left" if _can_tell(state) else ""
        self._display.update(
            self._task, completed=state.done, total=state.total or None, text=f"{state.text}{left}", refresh=True
        )

    def end(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def line(self) -> str:
        """The state of the job in one line; empty if there is none yet."""
        state = self.state()
        if state is None:
            return ""
        count = (
            f"{state.unit} {state.done}/{state.total or '?'}"
            if state.unit == "step"
            else (f"{state.done}/{state.total or '?'} {state.unit}")
        )
        return f"{self._job.stage}: {count}{state.text and ', '}{state.text}"

    def state(self) -> State | None:
        """The state of the job from its events, or of a training run from its log; None if there is none yet."""
        if self._job.output is None:
            return None
        if self._job.stage == "train":
            return self._training()
        every = list(last_events(self._job.output))
        events = [event for event in every if event["begin"] >= self._begin]
        if not events:
            return None
        totals: dict[str, int] = {}
        for event in events:
            for name, value in event["totals"].items():
                totals[name] = totals.get(name, 0) + value
        total = max((event.get("partitions", 0) for event in events), default=0) or self._partitions()
        generation = max(event.get("generation", 0) for event in events)
        before = sum(
            event["totals"].get("partitions", 0)
            for event in every
            if event["begin"] < self._begin and event.get("generation", 0) == generation
        )
        samples = sum(event.get("done", event["totals"].get("in", 0)) for event in events)
        rate = samples / max(time.time() - min(event["begin"] for event in events), 0.1)
        bad = "".join(f", {totals[name]} {name}" for name in ("dropped", "failed") if totals.get(name))
        resumed = f"{before} of them before, " if before else ""
        text = f"{resumed}{samples} samples{bad}, {rate:.0f}/s, {totals.get('bytes', 0) / 1e6:.1f} MB"
        return State(before + totals.get("partitions", 0), total, "partitions", text, before)

    def _partitions(self) -> int:
        assert self._job.output is not None
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads((self._job.output / "plan/plan.json").read_text())["partitions"])
        return 0

    def _training(self) -> State | None:
        assert self._job.output is not None
        if not (last := last_logged(self._job.output)):
            return None
        newest = max(last_events(self._job.output), key=lambda event: event["time"], default={})
        of = newest.get("of") or self._job.config.steps  # with epochs= only the ranks know
        text = f"loss {last['loss']:.4f}" if "loss" in last else ""
        return State(int(last.get("step", 0)), int(of or 0), "step", text)


def _can_tell(state: State) -> bool:
    """Whether the remaining time can be computed; not for training runs, which may have resumed at any step."""
    return state.unit != "step" and state.before < state.done < state.total


def _bar() -> Any:
    """A progress bar of one line that disappears at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        expand=True,
        auto_refresh=False,
    )


def last_logged(run: Path) -> dict[str, Any]:
    """The newest line of a training run's logs; empty if there is none."""
    with suppress(OSError, ValueError, IndexError):
        logs = sorted((run / "logs").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        last: dict[str, Any] = json.loads(logs[-1].read_text().splitlines()[-1])
        return last
    return {}
