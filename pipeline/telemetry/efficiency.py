"""The share of its resources that a stage used, from the events of its ranks, and what to request next time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from pipeline.telemetry.events import Process
from pipeline.telemetry.units import duration, size

_LEAST = 60.0  # seconds of work below which there is no advice
_LITTLE = 0.6  # share of the request below which less would suffice
_TIGHT = 0.9  # share of the requested memory above which more would be safer
_SPARE = 1.3  # factor between peak use and advice


@dataclass
class Efficiency:
    """Resource usage: times in seconds, memory in bytes, shares from 0 to 1; None or 0 if unknown.

    Attributes:
        elapsed: time in which at least one rank was running; waiting in a queue between two lives does not count.
        ranks: number of ranks in the newest life.
        cpu_seconds: CPU time of all ranks and their children, in all lives.
        cpus: CPUs allocated to each rank.
        cpu: share of these CPUs that was used.
        gpu: mean utilization of the ranks' GPUs.
        waited: share of the ranks' time spent waiting for other ranks, or with the GPU waiting for data.
        memory: peak memory of the largest rank and its children.
        node_memory: peak memory of all ranks on one node, on the node with the highest.
        node_memory_asked: memory requested on each node.
        source: where the figures come from: ``events`` or ``sacct``.
        advice: options for next time.
    """

    elapsed: float
    ranks: int
    cpu_seconds: float
    cpus: int = 0
    cpu: float | None = None
    gpu: float | None = None
    waited: float = 0.0
    memory: int = 0
    node_memory: int = 0
    node_memory_asked: int = 0
    source: str = "events"
    advice: dict[str, str] = field(default_factory=dict)

    def advise(self, slurm: bool) -> Efficiency:
        """Set :attr:`advice`, if the ranks ran under SLURM, and return this object."""
        if not slurm or self.elapsed < _LEAST:
            return self
        if self.cpu is not None and self.cpus > 1 and self.cpu < _LITTLE:
            self.advice["cpus_per_task"] = str(max(1, min(self.cpus, ceil(self.cpu * self.cpus * _SPARE))))
        if self.node_memory and self.node_memory_asked:
            share = self.node_memory / self.node_memory_asked
            if not _LITTLE <= share <= _TIGHT:
                self.advice["mem"] = f"{max(1, ceil(self.node_memory * _SPARE / 2**30))}G"
        minutes = 10 * ceil((self.elapsed / 60 * 1.5 + 5) / 10)
        self.advice["time"] = f"{minutes // 60:02d}:{minutes % 60:02d}:00"
        return self

    def told(self) -> str:
        """One line that says what the stage used and what to request next time."""
        said = [f"took {duration(self.elapsed)} with {self.ranks} rank{'s' * (self.ranks != 1)}"]
        if self.cpu is not None:
            said.append(f"CPU {self.cpu:.0%}" + (f" of {self.cpus} for each rank" if self.cpus else ""))
        if self.gpu is not None:
            said.append(f"GPU {self.gpu:.0%}")
        if self.waited >= 0.01:
            said.append(f"waited {self.waited:.0%}")
        if self.node_memory:
            of = f" of {size(self.node_memory_asked)} asked" if self.node_memory_asked else ""
            said.append(f"memory {size(self.node_memory)} a node{of}")
        text = ", ".join(said) + (f" ({self.source})" if self.source != "events" else "")
        advice = " ".join(f"{name}={value}" for name, value in self.advice.items())
        return f"{text}; next time: {advice}" if advice else text


def efficiency(processes: Iterable[Process]) -> Efficiency | None:
    """Efficiency over all lives of a stage; None if there are no events."""
    lasts = [process.last for process in processes if process.last]
    if not lasts:
        return None
    newest = max(lasts, key=lambda event: event["begin"])
    seconds = sum(event["time"] - event["begin"] for event in lasts)
    spent = sum(float(event.get("cpu", 0.0)) for event in lasts)
    given = sum((event["time"] - event["begin"]) * event.get("cpus", 0) for event in lasts)
    gpus = [float(use) for event in lasts if not math.isnan(use := (event.get("gpu") or {}).get("mean", math.nan))]
    waited = sum(float(event.get("waited", 0.0)) for event in lasts)
    found = Efficiency(
        _elapsed(lasts),
        int(newest["world_size"]),
        round(spent, 2),
        int(newest.get("cpus", 0)),
        min(1.0, spent / given) if given else None,
        sum(gpus) / len(gpus) if gpus else None,
        min(1.0, waited / seconds) if seconds else 0.0,
        max(int(event.get("peak", 0)) for event in lasts),
        _node_memory(lasts),
        int(newest.get("node_memory", 0)),
    )
    return found.advise("job" in newest)


def _elapsed(lasts: Iterable[Mapping[str, Any]]) -> float:
    """Seconds in which at least one process was running."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted((event["begin"], event["time"]) for event in lasts):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _node_memory(lasts: Iterable[Mapping[str, Any]]) -> int:
    """Sum of the peaks of all ranks of one host in one life, for the host with the highest sum."""
    nodes: defaultdict[tuple[Any, ...], int] = defaultdict(int)
    for event in lasts:
        nodes[event.get("host"), event.get("job"), event.get("life"), event["world_size"]] += int(event.get("peak", 0))
    return max(nodes.values())
