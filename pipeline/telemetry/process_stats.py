"""Resource usage of a process: memory, CPU, bytes read and written, its GPU. Sampled with each event."""

from __future__ import annotations

import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.distributed.progress import Progress, bytes_moved

if TYPE_CHECKING:
    from pipeline.distributed import Rank

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Vitals:
    """Samples the resource usage of the process of ``rank``; see :meth:`read`."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._progress = Progress(rank)
        self._since = time.monotonic()
        self._peak = 0
        self._looks, self._use = 0, 0.0

    def read(self) -> dict[str, Any]:
        """The current values, JSON-able.

        ``rss`` and ``peak`` memory in bytes and ``cpu`` seconds, all including child processes (image workers, data
        loaders); bytes ``read`` and ``written``; seconds ``waited`` for other ranks or data; seconds ``still``, since
        the last progress; and, if the rank uses a GPU, ``gpu`` with its ``use`` (0 to 1), the ``mean`` of that so far
        and ``memory`` in bytes.
        """
        now = time.monotonic()
        if self._progress.made():
            self._since = now
        read, written = bytes_moved()
        children = _children()
        resident = _resident(children)
        self._peak = max(self._peak, resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        values = {
            "rss": resident,
            "peak": self._peak,
            "cpu": round(_cpu(children), 2),
            "read": read,
            "written": written,
            "waited": round(self._rank.waited, 3),
            "still": round(now - self._since, 1),
        }
        gpu = _gpu(self._rank)
        if gpu:
            self._looks, self._use = self._looks + 1, self._use + gpu["use"]
            gpu["mean"] = round(self._use / self._looks, 3)
        return values | ({"gpu": gpu} if gpu else {})


def asked(local_world_size: int) -> dict[str, int]:
    """Resources allocated to this process, for its events: ``cpus``, ``node_ranks`` (ranks on its node) and, if known,
    ``node_memory`` in bytes."""
    environment = os.environ
    cpus = environment.get("SLURM_CPUS_PER_TASK", "1" if "SLURM_STEP_ID" in environment else "")
    values = {
        "cpus": int(cpus) if cpus.isdigit() else max(1, len(os.sched_getaffinity(0)) // local_world_size),
        "node_ranks": local_world_size,
    }
    memory = environment.get("SLURM_MEM_PER_NODE", "")
    each = environment.get("SLURM_MEM_PER_CPU", "")
    if memory.isdigit():
        values["node_memory"] = int(memory) << 20
    elif each.isdigit():
        values["node_memory"] = (int(each) << 20) * values["cpus"] * local_world_size
    return values


def _children() -> list[str]:
    """Ids of the child processes: image workers, data loaders."""
    children: list[str] = []
    with suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            children += Path(f"/proc/self/task/{thread}/children").read_text().split()
    return children


def _resident(children: list[str]) -> int:
    """Resident memory of this process and its children, in bytes."""
    pages = 0
    for process in ("self", *children):
        with suppress(OSError, ValueError, IndexError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * _PAGE


def _cpu(children: list[str]) -> float:
    """CPU seconds of this process and its children, including children that have ended."""
    own = os.times()
    ticks = 0
    for process in children:
        with suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, stat[11:15]))  # user and system time, its own and that of its ended children
    return own.user + own.system + own.children_user + own.children_system + ticks / _TICKS


def _gpu(rank: Rank) -> dict[str, Any]:
    """Utilization and memory of the rank's GPU; empty if it has not used one yet, or if the driver does not report."""
    torch, device = sys.modules.get("torch"), vars(rank).get("device")
    if torch is None or device is None or device.type != "cuda" or not torch.cuda.is_initialized():
        return {}
    with suppress(Exception):  # a missing library, a refusing driver and a lost GPU all raise different exceptions
        return {"use": torch.cuda.utilization(device) / 100, "memory": torch.cuda.memory_reserved(device)}
    return {}
