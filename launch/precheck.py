"""Checks on the login node before a job is submitted: missing inputs, and outputs made with other settings.

Also compares the settings of a job with those of a job that SLURM already has for the same output.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import cli
from pipeline.config.options import require_files
from pipeline.config.schema import STAGES, ConfigError, identity, public_text, traits_of
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.planning import Stale, require_same
from pipeline.partitions.stage import input_folder, open_input, upstreams_of
from pipeline.registry import tasks
from pipeline.storage import StorageError

if TYPE_CHECKING:
    from launch.job import Job

_LAUNCH_ONLY = ("run_id", "output", "input", "data_dir")


def check(job: Job, coming: Collection[str]) -> None:
    """Raise errors that the job would raise as soon as it runs, as far as they can be known now.

    Args:
        coming: outputs that are being made, or will be made before this job starts.

    Raises:
        ConfigError: the input does not exist or is not finished, or the output was made with other settings.
    """
    require_files(job.config)
    _check_input(job, coming)
    if traits_of(job.stage).partitioned and job.output is not None and not job.config.overwrite:
        _check_output(job)


def check_inputs(jobs: Sequence[Job]) -> None:
    """Raise ConfigError if an input is missing or not finished that none of ``jobs`` makes before it is needed."""
    coming: set[str] = set()
    for job in jobs:
        require_files(job.config)
        _check_input(job, coming)
        coming |= {str(job.output)} if job.output else set()


def _check_input(job: Job, coming: Collection[str]) -> None:
    given = str(getattr(job.config, "input", "") or "")
    if getattr(job.config, "wait", 0.0) or "://" in given:
        return
    upstreams = () if given or job.stage not in STAGES else upstreams_of(job.config, job.stage)
    if not given and (not upstreams or not _is_known(job.config)):
        return
    try:
        path = Path(given).absolute() if given else input_folder(job.config, job.stage)
    except ConfigError:
        return  # not known yet: the previous stage may still be pending
    if str(path) in coming or str(path / "data") in coming:
        return
    if given and not os.path.exists(path):
        if any(letter in given for letter in "*?[{,"):
            return  # a pattern or a list
        raise ConfigError(f"input={given}: there is no such file or folder")
    if not given or (traits_of(job.stage).upstream and (path / "plan").is_dir()):
        try:
            open_input(job.config, job.stage)
        except (StorageError, OSError, KeyError, TypeError):
            return  # damaged: the stage will report how


def _is_known(config: Any) -> bool:
    """Whether the default input follows from the settings: an installed package's task may read something else."""
    task = getattr(config, "task", "")
    return not task or task in tasks.builtin


def _check_output(job: Job) -> None:
    from pipeline.stages import get_stage

    try:
        dataset = Dataset.open(job.output or "")
        require_same(dataset, get_stage(job.stage)(job.config, Rank()))
    except Stale:
        raise
    except (ConfigError, StorageError, OSError, KeyError, TypeError):
        return  # there is no output yet, or the stage itself will report the problem


# ---- comparison with a submitted job


def arguments_of(script: Path) -> list[dict[str, str]]:
    """Settings of each stage that a script runs; empty if it cannot be read."""
    try:
        text = script.read_text()
    except OSError:
        return []
    runs = re.findall(r"^run(?:_together)? python -m pipeline\.stages\.\w+((?:\\\n|.)*)", text, re.MULTILINE)
    words = [shlex.split(run.replace("\\\n", " ")) for run in runs]
    return [dict(word.partition("=")[::2] for word in of_one if "=" in word) for of_one in words]


def differences(job: Job, script: Path) -> tuple[list[str], list[str]]:
    """The settings in which the job that ``script`` started differs from ``job``.

    Returns two lists of texts ``name=<old>, now <new>``: settings that affect results, and others.
    """
    results: list[str] = []
    others: list[str] = []
    for part, was in zip(job.parts or (job,), arguments_of(script), strict=False):
        of_results, of_others = _differences(part, was)
        results += of_results
        others += of_others
    return results, others


def _differences(job: Job, was: dict[str, str]) -> tuple[list[str], list[str]]:
    now = dict(word.partition("=")[::2] for word in job.arguments)
    try:
        before: dict[str, Any] = identity(cli.load(job.stage, [f"{key}={value}" for key, value in was.items()]))
        after: dict[str, Any] = identity(job.config)
    except ConfigError:
        before, after = {}, {}
    results = [name for name in after if before.get(name) != after[name]]
    others = [n for n in sorted({*was, *now}) if was.get(n) != now.get(n) and n not in (*results, *_LAUNCH_ONLY)]
    return (
        [f"{name}={_text(before.get(name))}, now {_text(after[name])}" for name in results],
        [f"{name}={_text(was.get(name, 'unset'))}, now {_text(now.get(name, 'unset'))}" for name in others],
    )


def _text(value: Any) -> str:
    return public_text(str(value).lower() if isinstance(value, bool) else str(value))
