"""Calls SLURM's commands, with retries while its controller does not answer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import xxhash

from pipeline.config.options import ConfigError

T = TypeVar("T")
_PAUSES = (2, 4, 8, 15, 30, 30, 60, 60, 60)  # seconds between attempts while the controller does not answer
_ENDING = 60.0  # seconds to wait for jobs of the same name that are about to end
_AWAY = re.compile(
    "unable to contact slurm controller|socket timed out|connection refused|communication connection failure|"
    "zero bytes were transmitted|temporarily unable|resource temporarily unavailable|transport endpoint|"
    "unable to establish control|unexpected message|backup controller",
    re.IGNORECASE,
)
_UNCONFIGURED = re.compile("config(?:uration)? source|unable to process configuration file", re.IGNORECASE)
_SECONDS = 20.0  # that the controller may take to say how it is configured
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")


class SlurmError(ConfigError):
    """SLURM refused a request or cannot be reached; the message is SLURM's, on one line."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.passing = bool(_AWAY.search(message))


def without_slurm() -> str:
    """Why this machine cannot submit jobs; empty if it can. That the controller does not answer is not a reason."""
    missing = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
    if missing:
        return f"no {missing[0]} on this machine"
    try:
        ask("scontrol", "show", "config", seconds=_SECONDS)
    except SlurmError as error:
        if _UNCONFIGURED.search(str(error)):
            return "SLURM's commands are installed on this machine, but belong to no cluster (there is no slurm.conf)"
    return ""


def require_slurm() -> None:
    """Raises SlurmError if this machine cannot submit jobs."""
    if why := without_slurm():
        raise SlurmError(f"cluster=slurm: {why}: submit from a login node of the cluster, or cluster=local")


@contextlib.contextmanager
def outer_job_forgotten() -> Iterator[None]:
    """Context: removes the variables of a job around this program, which sbatch and srun would read as options.

    Outside a job, such variables (SBATCH_ACCOUNT, SQUEUE_FORMAT) were set by the user and are kept.
    """
    before = dict(os.environ)
    if "SLURM_JOB_ID" in os.environ:
        for name in before:
            if name.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_")) and name not in _KEPT:
                del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ask(*command: str, seconds: float = 120) -> str:
    """Run a SLURM command and return its output.

    Raises:
        SlurmError: it failed, or did not answer within ``seconds``.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: socket timed out") from None
    if done.returncode:
        raise SlurmError(one_line(done.stderr or done.stdout) or f"{command[0]} failed with code {done.returncode}")
    return done.stdout


def persistently(do: Callable[[], T]) -> T:
    """Return ``do()``, retried for some minutes while SLURM's controller does not answer."""
    for pause in _PAUSES:
        try:
            return do()
        except SlurmError as error:
            if not error.passing:
                raise
            print(f"SLURM does not answer ({error}): trying again in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    return do()


def find(name: str) -> tuple[str, ...]:
    """Ids of this user's pending or running jobs of that name.

    Waits up to a minute for jobs that are just ending, because they may be requeued.
    """
    command = ("squeue", "--noheader", "--me", f"--name={name}", "--format=%F %T")
    deadline = time.monotonic() + _ENDING
    while True:
        lines = persistently(lambda: ask(*command)).splitlines()
        states = [line.split() for line in lines if line.strip()]
        if any(state != "COMPLETING" for _, state in states) or not states or time.monotonic() > deadline:
            return tuple(dict.fromkeys(number for number, state in states if state != "COMPLETING"))
        print(f"{name}: job {states[0][0]} is about to end: waiting for it", file=sys.stderr, flush=True)
        time.sleep(2)


def max_array_size() -> int:
    """Maximum number of elements that SLURM allows in an array."""
    config = persistently(lambda: ask("scontrol", "show", "config"))
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return max(1, int(found[1])) if found else 1000


def name_for(stage: str, work: str) -> str:
    """The name of the job that runs ``stage`` for the output ``work``."""
    return f"{stage}-{xxhash.xxh3_64_hexdigest(f'{stage} {work}')[:10]}"


def comment_for(output: str | Path) -> str:
    """The comment of the job that works on ``output``; quotes, backslashes and spaces, which a script would lose, are
    replaced."""
    return str(output).translate({ord(c): "_" for c in "'\"\\ "})


def one_line(text: str) -> str:
    """SLURM's message on one line, without the prefixes of its lines and without repetitions."""
    lines = (re.sub(r"^(sbatch|squeue|scontrol)(: error)?: ", "", line.strip()) for line in text.splitlines())
    words = "; ".join(dict.fromkeys(line for line in lines if line))
    return words[:600]
