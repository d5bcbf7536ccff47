"""What submit.py says of the jobs to come: estimates and proposals in a dry run, warnings before a submission."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch import site
from launch.estimate import Estimate, estimates, idle_gpus, lines

if TYPE_CHECKING:
    from launch.submit import Job


def _place(jobs: Sequence[Job]) -> Path:
    return next((job.output for job in jobs if job.output), Path.cwd())


def _stages(jobs: Sequence[Job]) -> list[Job]:
    return [part for job in jobs for part in job.parts or (job,)]


def print_for_slurm(jobs: Sequence[Job], available: bool) -> None:
    """What the stages will take, what to ask for, and where the site's limits will not do.

    Args:
        available: SLURM can be asked.
    """
    known = site.look() if available else site.Site()
    found = estimates(jobs, known, site.room(_place(_stages(jobs))))
    print("# ==== estimated")
    for estimate in found:
        print("\n".join(lines(estimate)))
    if idle := idle_gpus(_stages(jobs), found):
        print(f"pack=all: {idle}")
    for problem in known.problems:
        print(f"! limits of this site are not known in full: {problem}")


def print_for_here(jobs: Sequence[Job]) -> None:
    """What the stages will take on this machine."""
    print("\nestimated:")
    for estimate in estimates(jobs, rooms=site.room(_place(jobs))):
        print("\n".join(lines(replace(estimate, proposal={}))))


def warn(jobs: Sequence[Job]) -> None:
    """Say before a submission where quota, time limit or the partition's limits will not do."""
    found: list[Estimate] = estimates(jobs, site.look(), site.room(_place(_stages(jobs))), walk=False)
    for estimate in found:
        for warning in estimate.warnings:
            print(f"warning: {estimate.stage}: {warning}", file=sys.stderr, flush=True)
