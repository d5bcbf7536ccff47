"""A series of failures on a real SLURM of four nodes; each time, the result must equal the undisturbed one bit for bit.

    python benchmarks/chaos.py [trials=40] [seed=1] [events=kill_a_rank,preempt]        # root, on Debian; make slurm

Prints a table; exit code 1 if any trial failed.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from slurm_cluster import chaos, cluster  # noqa: E402


def plan(trials: int, seed: int, events: list[str]) -> list[tuple[str, str, int]]:
    """(event, way to submit, seed) of each trial: all events equally often, in an order determined by the seed."""
    dice = random.Random(seed)
    rounds = [dice.sample(events, len(events)) for _ in range(-(-trials // len(events)))]
    chosen = [event for order in rounds for event in order][:trials]
    ways = ("submit", "template", "array")
    return [(event, _way(event, dice.choice(ways)), dice.randrange(10**6)) for event in chosen]


def _way(event: str, way: str) -> str:
    """The way to submit a trial; events that act on a single job are not used with arrays."""
    alone = event.startswith(("reach", "lose", "crash", "cut", "orphan", "reboot", "make", "delete", "throttle", "let"))
    if event == "cancel_an_element":
        return "array"
    return "submit" if (alone and way == "array") or event == "reach_time_limit" else way


def main(arguments: list[str]) -> int:
    given = dict(argument.split("=", 1) for argument in arguments)
    events = given.get("events", "").split(",") if given.get("events") else list(chaos.EVENTS)
    trials, seed = int(given.get("trials", "40")), int(given.get("seed", "1"))
    if reason := cluster.why_not():
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run the cleanup that stops the cluster
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    running = cluster.start()
    failed = 0
    begin = time.monotonic()
    try:
        work = chaos.Work.undisturbed(folder, 70)
        print(f"seed {seed}, undisturbed digest {work.digest}")
        print(f"{'':>3} {'event':<27} {'way':<9} {'lives':>5} {'seconds':>7}  {'result':<9} what happened")
        for number, (event, way, own) in enumerate(plan(trials, seed, events), 1):
            place, start = folder / f"{number:03d}", time.monotonic()
            try:
                running.await_idle(120)
                trial = chaos.run(running, place, event, work, way, own)
                lives, result, what = str(trial.lives()), "same", trial.note
                shutil.rmtree(place, ignore_errors=True)
            except Exception as error:
                failed += 1
                lives, result, what = "?", "FAILED", f"{type(error).__name__}: {error}"
            took = time.monotonic() - start
            print(f"{number:>3} {event:<27} {way:<9} {lives:>5} {took:>7.1f}  {result:<9} {what}", flush=True)
        minutes = (time.monotonic() - begin) / 60
        print(f"{trials - failed} of {trials} trials gave the undisturbed result; {minutes:.0f} minutes")
    finally:
        running.stop()
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
