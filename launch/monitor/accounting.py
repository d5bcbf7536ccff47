"""SLURM's accounting of jobs that have ended (``sacct``, if available), queried rarely."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from launch import slurm_commands as slurm
from launch.quantities import mebibytes
from pipeline.config.schema import ConfigError
from pipeline.telemetry.efficiency import Efficiency

EVERY = 60.0  # seconds between two calls of sacct, to spare its database
_SECONDS = 10.0
_FIELDS = ("JobIDRaw", "State", "ElapsedRaw", "TotalCPU", "AllocCPUS", "ReqMem", "MaxRSS", "NNodes")
_OPEN = ("RUNNING", "PENDING", "REQUEUED", "RESIZING", "SUSPENDED")


@dataclass
class JobUse:
    """Resource usage of a job over all its lives, in seconds and bytes.

    ``memory`` is that of its largest task; ``asked`` is the memory requested per node.
    """

    over: bool = True
    elapsed: float = 0.0
    cpu_seconds: float = 0.0
    cpu_seconds_given: float = 0.0
    memory: int = 0
    asked: int = 0


def parse(text: str) -> dict[str, JobUse]:
    """Parse the output of ``sacct --parsable2 --duplicates``: job id → usage, including the job's steps."""
    found: dict[str, JobUse] = {}
    for line in text.splitlines():
        row = line.split("|")
        if len(row) != len(_FIELDS):
            continue
        number, state, elapsed, cpu, cpus, asked, memory, nodes = row
        job, dot, _ = number.partition(".")
        use = found.setdefault(job, JobUse())
        if dot:
            use.memory = max(use.memory, int(mebibytes(memory) * 2**20))
            continue
        use.over = use.over and not state.startswith(_OPEN)
        seconds = float(elapsed or 0)
        use.elapsed += seconds
        use.cpu_seconds += _seconds(cpu)
        use.cpu_seconds_given += seconds * int(cpus or 0)
        use.asked = _node_memory(asked, int(cpus or 0), int(nodes or 1)) or use.asked
    return found


def _seconds(text: str) -> float:
    """Convert ``[days-][hours:]minutes:seconds[.fraction]`` to seconds."""
    days, _, clock = text.rpartition("-")
    total = 0.0
    for part in clock.split(":"):
        total = total * 60 + float(part or 0)
    return total + 86400 * int(days or 0)


def _node_memory(text: str, cpus: int, nodes: int) -> int:
    """Bytes per node, from ReqMem: of the job (``16G``), before SLURM 21.08 of a node (``16Gn``) or CPU (``2Gc``)."""
    size = mebibytes(text.strip("?")) * 2**20
    return int(size * {"c": cpus / max(1, nodes), "n": 1.0}.get(text[-1:], 1 / max(1, nodes)))


@dataclass
class Accounting:
    """Resource usage of jobs that have ended; empty if SLURM has no accounting."""

    uses: dict[str, JobUse] = field(default_factory=dict)
    problem: str = ""
    available: bool = field(default_factory=lambda: shutil.which("sacct") is not None)
    _next: float = 0.0

    def refresh(self, jobs: Iterable[str]) -> None:
        """Query the ``jobs`` whose final usage is unknown, but not more often than :data:`EVERY` seconds."""
        wanted = sorted({job for job in jobs if job and not (job in self.uses and self.uses[job].over)})
        if not self.available or not wanted or time.monotonic() < self._next:
            return

        self._next = time.monotonic() + EVERY
        command = ("sacct", f"--jobs={','.join(wanted)}", "--noheader", "--parsable2", "--duplicates")
        try:
            with slurm.outer_job_forgotten():
                said = slurm.ask(*command, f"--format={','.join(_FIELDS)}", seconds=_SECONDS)
        except (ConfigError, OSError) as error:
            self.available = not any(word in str(error) for word in ("disabled", "not enabled"))
            self.problem = f"sacct: {error}" if self.available else ""
            return
        self.problem = ""
        self.uses |= parse(said)

    def refined(self, found: Efficiency, jobs: Iterable[str]) -> Efficiency:
        """``found`` refined by the accounting of ``jobs``, which must not have run other stages."""
        uses = [self.uses[job] for job in set(jobs) if job in self.uses and self.uses[job].over]
        given = sum(use.cpu_seconds_given for use in uses)
        if not given:
            return found
        spent = max(found.cpu_seconds, sum(use.cpu_seconds for use in uses))
        memory = max(found.memory, *(use.memory for use in uses))
        return replace(
            found,
            elapsed=sum(use.elapsed for use in uses),
            cpu_seconds=spent,
            cpu=min(1.0, spent / given),
            memory=memory,
            node_memory=max(found.node_memory, memory),
            node_memory_asked=max(found.node_memory_asked, *(use.asked for use in uses)),
            source="sacct",
            advice={},
        ).advise(slurm=True)
