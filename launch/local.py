"""cluster=local: the ranks of a job as processes of this machine, with their progress on the terminal."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.monitor.flight import FLIGHT
from launch.script import is_single
from pipeline.distributed import EXIT_STOPPED, Rank
from pipeline.telemetry.events import last_events

if TYPE_CHECKING:
    from launch.submit import Job

_GRACE = 30.0  # seconds that ranks have to stop at a safe boundary before they are killed
_TICK = 0.2
_PLAIN_EVERY = 10.0  # seconds between progress lines where there is no terminal
_PR_SET_PDEATHSIG = 1


def planner() -> Rank:
    """A rank for looking at plans only."""
    return Rank()


def run(job: Job) -> int:
    """Start the ranks, show what they do, wait for their end. Ctrl-C stops them at a safe boundary.

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
    """Where the ranks' output goes, beside the stage's own output; None: to this terminal."""
    if job.output is None:
        return None
    logs = job.output.parent / "logs" / f"{job.output.name}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return logs


def _start(job: Job, logs: Path | None) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
        env = {"OMP_NUM_THREADS": str(max(1, cores // job.ranks)), **os.environ}
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
    """Ranks are told to stop when the launcher dies, whatever kills it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            with suppress(ProcessLookupError):
                rank.send_signal(number)


def _report(job: Job, ranks: list[subprocess.Popen[bytes]], logs: Path | None) -> int:
    """Say how the job ended: what came out, or the end of the log of the rank that failed first."""
    codes = [rank.returncode for rank in ranks]
    bad = [number for number, code in enumerate(codes) if code not in (0, EXIT_STOPPED)]
    if not bad and any(codes):
        print(f"{job.stage}: stopped by a signal; the same command resumes", file=sys.stderr)
        return EXIT_STOPPED
    worst = min(bad, key=lambda number: (codes[number] in (-signal.SIGTERM, -signal.SIGKILL), number), default=None)
    for number in range(len(ranks)) if worst is None else [worst]:
        if logs and (worst is not None or number == 0):
            brief = codes[worst] == 2 if worst is not None else not is_single(job.stage, job.arguments)
            _tail(logs / f"rank{number}.log", 1 if brief else 40)
    if worst is None:
        return 0
    print(
        f"{job.stage}: rank {worst} failed with code {codes[worst]}" + (f"; logs in {logs}" if logs else ""),
        file=sys.stderr,
    )
    return codes[worst] if codes[worst] > 0 else 1


def _tail(path: Path, lines: int) -> None:
    text = path.read_bytes()[-20_000:].decode("utf-8", "replace").splitlines()
    print("\n".join(text[-lines:]), flush=True)


class _Interrupt:
    """Context: counts Ctrl-C and SIGTERM instead of dying of them."""

    def __enter__(self) -> _Interrupt:
        self.count = 0
        self._before = {n: signal.signal(n, self._seen) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _seen(self, number: int, frame: object) -> None:
        self.count += 1

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Progress:
    """One line about a running job: rewritten on a terminal, now and then elsewhere."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._begin = time.time()
        self._live = sys.stderr.isatty()
        self._next = time.monotonic() + (0.5 if self._live else _PLAIN_EVERY)
        self._shown = ""

    def show(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (0.5 if self._live else _PLAIN_EVERY)
        line = self.line()
        if line and line != self._shown:
            self._shown = line
            print(
                f"\r\033[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True
            )

    def end(self) -> None:
        if self._live and self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def line(self) -> str:
        """The state of the job from its events, or of a training run from its log; empty if there is none yet."""
        if self._job.output is None:
            return ""
        if self._job.stage == "train":
            return self._training()
        events = [event for event in last_events(self._job.output) if event["begin"] >= self._begin - 1]
        if not events:
            return ""
        totals: dict[str, int] = {}
        for event in events:
            for name, value in event["totals"].items():
                totals[name] = totals.get(name, 0) + value
        total = max((event.get("partitions", 0) for event in events), default=0) or self._partitions()
        samples = totals.get("in", 0)
        rate = samples / max(time.time() - min(event["begin"] for event in events), 0.1)
        bad = f", {totals['failed']} failed" if totals.get("failed") else ""
        return (
            f"{self._job.stage}: {totals.get('partitions', 0)}/{total or '?'} partitions, "
            f"{samples} samples{bad}, {rate:.0f}/s, {totals.get('bytes', 0) / 1e6:.1f} MB"
        )

    def _partitions(self) -> int:
        assert self._job.output is not None
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads((self._job.output / "plan/plan.json").read_text())["partitions"])
        return 0

    def _training(self) -> str:
        assert self._job.output is not None
        if not (last := last_logged(self._job.output)):
            return ""
        loss = f", loss {last['loss']:.4f}" if "loss" in last else ""
        newest = max(last_events(self._job.output), key=lambda event: event["time"], default={})
        of = newest.get("of") or self._job.config.steps  # with epochs= only the ranks know
        return f"train: step {last.get('step', '?')}/{of}{loss}"


def last_logged(run: Path) -> dict[str, Any]:
    """The newest line of a training run's logs; empty if there is none."""
    with suppress(OSError, ValueError, IndexError):
        logs = sorted((run / "logs").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        last: dict[str, Any] = json.loads(logs[-1].read_text().splitlines()[-1])
        return last
    return {}
