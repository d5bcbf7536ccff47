"""Output of submit.py about future jobs: estimates and suggestions in a dry run, warnings before a submission."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch import site
from launch.estimate import Estimate, amount, estimates, idle_gpus, span
from pipeline.telemetry.units import counted

if TYPE_CHECKING:
    from launch.job import Job


def _place(jobs: Sequence[Job]) -> Path:
    return next((job.output for job in jobs if job.output), Path.cwd())


def _stages(jobs: Sequence[Job]) -> list[Job]:
    return [part for job in jobs for part in job.parts or (job,)]


def print_for_slurm(jobs: Sequence[Job], available: bool) -> None:
    """Print the estimated cost of the stages, proposed options, and warnings about limits of the site.

    Args:
        available: whether SLURM can be queried.
    """
    known = site.look() if available else site.Site()
    found = estimates(jobs, known, site.room(_place(_stages(jobs))))
    print("# ==== estimated")
    for estimate in found:
        print("\n".join(lines(estimate)))
    if idle := idle_gpus(_stages(jobs), found):
        print(f"pack=all: {idle}")
    for problem in known.problems:
        print(f"! the limits of this site are not completely known: {problem}")


def print_for_here(jobs: Sequence[Job]) -> None:
    """Print the estimated cost of the stages on this machine."""
    print("\nestimated:")
    for estimate in estimates(jobs, rooms=site.room(_place(jobs))):
        print("\n".join(lines(replace(estimate, proposal={}))))


def warn(jobs: Sequence[Job]) -> None:
    """Warn before a submission if quota, time limit or the partition's limits are too low."""
    found: list[Estimate] = estimates(jobs, site.look(), site.room(_place(_stages(jobs))), walk=False)
    for estimate in found:
        for warning in estimate.warnings:
            print(f"warning: {estimate.stage}: {warning}", file=sys.stderr, flush=True)


# ---- text


def lines(estimate: Estimate) -> Iterator[str]:
    """The lines of a dry run about a stage."""
    yield f"{estimate.stage}: {summary(estimate)}"
    if estimate.basis and estimate.basis != summary(estimate) and not estimate.finished:
        yield f"    from {estimate.basis}"
    if estimate.proposal:
        yield "    proposed: " + " ".join(f"{name}={value}" for name, value in estimate.proposal.items())
    for warning in estimate.warnings:
        yield f"    ! {warning}"


def summary(estimate: Estimate) -> str:
    """Amount of work, time, CPU and GPU hours, bytes and inodes, as far as they are known."""
    work = estimate.work
    if estimate.finished:
        partitions = counted(work.partitions, "partition")
        return f"finished: {work.samples:,} samples, {amount(estimate.output_bytes)} in {partitions}"
    said = [f"{work.samples:,} samples" if work.samples >= 0 else "unknown samples"]
    if work.bytes > 0:
        said[0] += f" ({amount(work.bytes)})"
    if work.samples < 0 > work.partitions and estimate.hours is None:
        return estimate.basis
    if work.partitions >= 0:
        said[0] += f" in {counted(work.partitions, 'partition')}"
    said.append("time unknown" if estimate.hours is None else f"about {span(estimate.hours)}")
    for hours, name in ((estimate.cpu_hours, "CPU"), (estimate.gpu_hours, "GPU")):
        if hours:
            said.append(f"{hours:,.1f} {name} hours" if hours >= 0.1 else f"less than 0.1 {name} hours")
    if estimate.output_bytes >= 0:
        said.append(f"writes {amount(estimate.output_bytes)}")
    if estimate.inodes >= 0:
        said.append(f"{estimate.inodes:,} inodes")
    return ", ".join(said)
