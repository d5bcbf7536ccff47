"""The jobs of a user in SLURM's queue, queried rarely."""

from __future__ import annotations

import os
import pwd
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import slurm_commands as slurm
from launch.pack import places
from pipeline.config.schema import ConfigError

EVERY = 10.0  # seconds between two calls of squeue, to spare the controller
_FIELDS = ("%A", "%F", "%i", "%j", "%T", "%S", "%M", "%l", "%D", "%N", "%r", "%x", "%k")
_REASONS = {
    "Resources": "waits for nodes to become free",
    "Priority": "others come first",
    "Dependency": "waits for the job before it",
    "DependencyNeverSatisfied": "the job before it failed: it will never run",
    "BeginTime": "was requeued: SLURM lets it wait for two minutes",
    "JobArrayTaskLimit": "the number of running elements has reached array_parallelism=",
    "JobHeldUser": "held by its user: scontrol release <job>",
    "JobHeldAdmin": "held by an administrator",
    "launch failed requeued held": "the controller was restarted just after the submission: scontrol release <job>",
    "PartitionTimeLimit": "time= is longer than its partition allows",
    "PartitionNodeLimit": "nodes= is more than its partition allows",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is inactive",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "Reservation": "waits for its reservation",
    "BadConstraints": "no node meets its request",
    "InvalidAccount": "account= is not valid",
    "InvalidQOS": "qos= is not valid",
    "Licenses": "waits for a licence",
    "Cleaning": "SLURM is still cleaning up after its previous life",
}
_NO_CLUSTER = ("Could not establish a configuration source", "Unable to process configuration file")
"""Messages of squeue on a machine that does not belong to a cluster."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the output of squeue.

    Attributes:
        why: explanation of its reason for being pending.
        excluded: nodes that it excludes: those given by the user, and those that did badly in an earlier life.
    """

    number: str
    base: str
    id: str
    name: str
    state: str
    start: str
    elapsed: str
    limit: str
    nodes: str
    nodelist: str
    reason: str
    comment: str
    excluded: str = ""

    @property
    def why(self) -> str:
        if self.state != "PENDING":
            return ""
        reason = self.reason.strip("()")
        meaning = _REASONS.get(reason) or _REASONS.get(reason.partition(",")[0].partition(" ")[0])
        if meaning is None and reason.startswith(("Assoc", "QOS", "MaxJobs", "MaxCpu")):
            meaning = "a limit of the account or quality of service is reached"
        begin = f"; expected to start {self.start.replace('T', ' ')}" if self.start not in ("N/A", "") else ""
        return f"{meaning or 'waits'} ({reason}){begin}"

    def speaks_of(self, comment: str) -> bool:
        """Whether the job's comment names this output; a comment of slurm/pipeline.sh ends in ``*`` for any variant."""
        if self.comment.endswith("*"):
            return comment == self.comment[:-1] or comment.startswith(self.comment[:-1] + "-")
        return bool(comment) and comment in places(self.comment)

    @property
    def label(self) -> str:
        """Short text for the job: its name, or the folders of the stages of a packed job."""
        outputs = places(self.comment)
        return ", ".join(output.rpartition("/")[2] for output in outputs) if len(outputs) > 1 else self.name

    def is_below(self, root: str) -> bool:
        """Whether an output that the job's comment names is at or below the folder ``root``."""
        return any((place + "/").startswith(root + "/") for place in places(self.comment))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "label": self.label, "why": self.why}


class Queue:
    """The jobs of the user who owns ``folder``, at most :data:`EVERY` seconds old."""

    def __init__(self, folder: Path) -> None:
        self.jobs: tuple[QueuedJob, ...] = ()
        self.problem = ""
        self.asked = 0.0
        """Time of the last successful query, in seconds since the epoch."""
        self.available = shutil.which("squeue") is not None
        self._user = _owner(folder)
        self._next = 0.0

    def refresh(self, oldest: float = EVERY) -> None:
        """Query the queue again if the last answer is older than ``oldest`` seconds."""
        if not self.available or time.monotonic() < self._next - EVERY + oldest:
            return

        self._next = time.monotonic() + EVERY
        now = time.time()
        try:
            with slurm.outer_job_forgotten():
                for name in [name for name in os.environ if name.startswith("SQUEUE_")]:
                    del os.environ[name]
                form = "\t".join(_FIELDS)
                text = slurm.ask("squeue", "--noheader", f"--user={self._user}", f"--format={form}", seconds=20)
        except (ConfigError, OSError) as error:
            self.available = not any(words in str(error) for words in _NO_CLUSTER)
            self.problem = f"SLURM does not answer: {error}" if self.available else ""
            return
        self.jobs = tuple(job for line in text.splitlines() if (job := _job(line)))
        self.problem, self.asked = "", now

    def is_over(self, job: str, seen: float) -> str:
        """What became of a job that was running at the time ``seen``; empty if it may still be running."""
        if not job or not self.asked or seen > self.asked:
            return ""
        found = [other for other in self.jobs if job in (other.number, other.base)]
        if not found:
            return "its job is no longer in SLURM's queue"
        if any(other.number == job and other.state == "PENDING" for other in found):
            return "its job waits in SLURM's queue again"
        return ""


def _job(line: str) -> QueuedJob | None:
    parts = line.split("\t", len(_FIELDS) - 1)
    if len(parts) != len(_FIELDS):
        return None
    number, base, id_, name, state, start, elapsed, limit, nodes, nodelist, reason, excluded, comment = (
        p.strip() for p in parts
    )
    place = comment.partition(" ")[0]  # followed by the user's own comment
    return QueuedJob(number, base, id_, name, state, start, elapsed, limit, nodes, nodelist, reason, place, excluded)


def _owner(folder: Path) -> str:
    uid = folder.stat().st_uid if folder.exists() else os.getuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
