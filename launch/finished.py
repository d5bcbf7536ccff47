"""Whether a stage is already finished: ``python -m launch.finished pipeline.stages.<stage> key=value ...``.

The exit code is 0 if so, otherwise 1. slurm/pipeline.sh calls it, and does not submit finished stages.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from launch.job import Job
from pipeline.config.schema import ConfigError, dataset_name, traits_of
from pipeline.distributed import Rank
from pipeline.partitions.dataset import SUCCESS, Dataset
from pipeline.partitions.planning import require_same
from pipeline.partitions.stage import input_folder
from pipeline.storage import StorageError
from pipeline.telemetry.events import last_events

_DAMAGE = (ConfigError, StorageError, OSError, KeyError, TypeError)
_FILES = {"generate": ("samples/samples.json",), "evaluate": ("evaluation/evaluation.json", "evaluation.json")}
"""What a stage that writes no dataset directory writes last, into the folder of its run."""


def makes_data(stage: str) -> bool:
    """Whether a stage writes a dataset directory."""
    return traits_of(stage).partitioned


def already_done(job: Job) -> bool:
    """Whether the job's output is finished, and was made with these settings from the current state of its input.

    False in case of doubt: the stage itself then reports the problem.
    """
    if job.parts:
        return all(map(already_done, job.parts))
    if not (makes_data(job.stage) and traits_of(job.stage).upstream) or not finished_as_asked(job):
        return False  # the first stage must check its source again
    return made_from_input(job, job.output)


def made_from_input(job: Job, output: Path | None) -> bool:
    """Whether ``output`` is finished, and made from the input of ``job`` as that is now, with whatever settings."""
    try:
        dataset, upstream = Dataset.open(output or ""), Dataset.open(input_folder(job.config, job.stage))
        known = dataset.plans[-1].header["upstream"]["content_digest"]
        return dataset.success is not None and known == upstream.require_success()["content_digest"]
    except _DAMAGE:
        return False


def finished_as_asked(job: Job) -> bool:
    """Whether the job's output is finished, and was made with these settings."""
    from pipeline.stages import get_stage

    if job.config.overwrite or job.config.retry_failed:
        return False
    try:
        dataset = Dataset.open(job.output or "")
        require_same(dataset, get_stage(job.stage)(job.config, Rank()))
        return dataset.success is not None
    except _DAMAGE:
        return False


def finished_at(job: Job) -> float | None:
    """When the job's result was finished, in seconds since the epoch; None if there is no finished result."""
    if job.stage == "report":
        folder = Path(job.config.data_dir, dataset_name(job.config.dataset))
        return _modified(Path(job.config.output or folder / "report.html"))
    if job.output is None:
        return None
    if traits_of(job.stage).lockstep:
        return _trained(job.output)
    if job.stage in _FILES and not getattr(job.config, "output", ""):
        return next(filter(None, (_modified(job.output / name) for name in _FILES[job.stage])), None)
    with suppress(*_DAMAGE):
        if Dataset.open(job.output).success is not None:
            return _modified(job.output / SUCCESS)
    return None


def _trained(run: Path) -> float | None:
    """When a finished training run wrote its last checkpoint."""
    newest = max(last_events(run), key=lambda event: event["time"], default={})
    if newest.get("event") != "finish":
        return None
    times = (_modified(path) for path in (run / "checkpoints").glob("step_*/checkpoint.json"))
    return max(filter(None, times), default=None)


def _modified(path: Path) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def main(argv: list[str]) -> int:
    try:
        return 0 if already_done(Job.of(argv[0].rpartition(".")[2], argv[1:])) else 1
    except ConfigError:
        return 1  # the job will report the error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
