"""What a command says when it ends: what was made, where, what became of the samples, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.local import last_logged
from pipeline.config.schema import public_text
from pipeline.partitions.dataset import Dataset, Unfinished
from pipeline.partitions.finalize import common_failures
from pipeline.storage import StorageError
from pipeline.telemetry.units import duration
from pipeline.training.uploads import problem

if TYPE_CHECKING:
    from launch.submit import Job

_NEXT = {
    "download": "filter",
    "filter": "shard",
    "dedup": "shard",
    "shard": "precompute",
    "precompute": "train",
    "features": "train",
    "generate": "report",
    "evaluate": "report",
    "caption": "report",
}
_AFTER_TRAINING = {"diffuse": "generate", "classify": "evaluate", "caption": "caption"}
_REASONS = 3


def summary(jobs: Sequence[Job], seconds: float) -> list[str]:
    """Lines about all that was made, and the command that is mostly next."""
    lines = [f"done in {duration(seconds)}:"]
    for job in jobs:
        lines += [f"  {job.stage:<11} {said}" for said in _made(job)]
    if following := next_command(jobs[-1]):
        lines.append(f"next: {following}")
    return lines


def _made(job: Job) -> list[str]:
    place = job.output
    if job.stage == "report":
        folder = Path(job.config.data_dir, job.config.dataset)
        return [f"{Path(job.config.output or folder / 'report.html').absolute()}"]
    if place is None:
        return []
    if job.stage == "train":
        last = last_logged(place)
        loss = f", loss {last['loss']:.4g}" if isinstance(last.get("loss"), float) else ""
        export = f"; model in {place / 'export'}" if (place / "export").is_dir() else ""
        return [f"{place}: step {last.get('step', '?')}{loss}{export}", *filter(None, [problem(place)])]
    try:
        dataset = Dataset.open(place)
        return _of_dataset(dataset, dataset.require_success())
    except (Unfinished, StorageError, OSError):
        return [f"{place}"]


def _of_dataset(dataset: Dataset, success: dict[str, Any]) -> list[str]:
    counts = success["counts"]
    said = f"{dataset.root.path}: {counts['kept']} of {counts['in']} samples kept"
    reasons = success.get("reasons") or {}
    if counts["dropped"]:
        said += f", {counts['dropped']} dropped ({_commonest(reasons, 'dropped')})"
    lines = [said + (f", {counts['failed']} failed" if counts["failed"] else "")]
    if counts["failed"]:
        lines.append(f"  failed: {common_failures(dataset)}")
        if counts.get("retryable"):
            lines.append(f"  retry_failed=true tries {counts['retryable']} of them again")
    return lines


def _commonest(reasons: dict[str, int], outcome: str) -> str:
    found = {name.partition(":")[2]: n for name, n in reasons.items() if name.startswith(outcome)}
    most = sorted(found.items(), key=lambda reason: -reason[1])
    more = f", {len(most) - _REASONS} more reasons" if len(most) > _REASONS else ""
    return ", ".join(f"{count} {name}" for name, count in most[:_REASONS]) + more


def next_command(job: Job) -> str:
    """The command that mostly follows; empty if none does, or it cannot be told."""
    task = getattr(job.config, "task", "diffuse")
    stage = _AFTER_TRAINING[task] if job.stage == "train" else _NEXT.get(job.stage, "")
    if not stage:
        return ""
    config = job.config
    if not (config.data_dir and config.dataset):
        if stage in ("generate", "evaluate", "caption", "report") or job.output is None:
            return ""
        place = job.output.parent / stage
        more = ["task=caption"] if job.stage == "features" else []
        return shlex.join(["python", "-m", f"pipeline.stages.{stage}", f"input={job.output}", f"output={place}", *more])
    words = [f"stage={stage}", f"dataset={config.dataset}", f"data_dir={config.data_dir}"]
    if stage != "report":
        words += [
            f"{name}={value}" for name in ("split", "subset") if (value := getattr(config, name)) not in ("", "train")
        ]
    if job.stage == "train" and config.name:
        words.append(f"name={config.name}")
    if job.stage == "features":
        words.append("task=caption")
    return public_text(shlex.join(["python", "launch/submit.py", *words]))
