"""The summary at the end of a command: outputs, counts of samples, reasons of failures, and the next command."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.finished import finished_at, made_from_input, makes_data
from launch.job import Job
from launch.local import last_logged
from pipeline.config import cli
from pipeline.config.schema import ConfigError, public_text
from pipeline.partitions.dataset import Dataset, Unfinished
from pipeline.partitions.finalize import common_failures
from pipeline.storage import StorageError
from pipeline.telemetry.events import last_events
from pipeline.telemetry.units import duration
from pipeline.training.uploads import problem

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_NEXT = {
    "download": "filter",
    "filter": "shard",
    "dedup": "shard",
    "score": "select",
    "select": "shard",
    "recaption": "shard",
    "shard": "precompute",
    "texts": "precompute",
    "precompute": "train",
    "features": "train",
    "generate": "report",
    "evaluate": "report",
    "caption": "report",
}
_AFTER_TRAINING = {"diffuse": "generate", "classify": "evaluate", "caption": "caption"}
_REASONS = 3
_LEAST = ("rate", "dropped", "time")
"""Columns that may be omitted if the terminal is too narrow."""


@dataclass(frozen=True)
class Made:
    """The result of one stage."""

    stage: str
    output: Path | None = None
    text: str = ""
    """Text about a result that is not counted in samples."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Samples: ``in``, ``kept``, ``dropped`` and ``failed``."""
    dropped: str = ""
    """The most common reasons for which samples were dropped."""
    notes: tuple[str, ...] = ()
    already: str = ""
    """When it was finished, if that was before the command."""


def show(
    jobs: Sequence[Job], spans: Sequence[tuple[float, float]], before: Sequence[float | None] | None = None
) -> None:
    """Print the results: a table on a terminal, plain lines elsewhere.

    Args:
        spans: Start and end time of each job, in seconds since the epoch.
        before: When each job's result had been finished, if it was there before the job started (default: unknown).
    """
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(table(jobs, spans, before))
        for line in _next_line(jobs):
            print(line)  # not wrapped, so that it can be copied
    else:
        print("\n".join(summary(jobs, spans[-1][1] - spans[0][0], before)))


def summary(jobs: Sequence[Job], seconds: float, before: Sequence[float | None] | None = None) -> list[str]:
    """Lines about all results, and the command that usually comes next."""
    lines = [f"done in {duration(seconds)}:"]
    for made in _all_made(jobs, before):
        lines += [f"  {made.stage:<11} {said}" for said in filter(None, [_line(made), *made.notes])]
    return [*lines, *_next_line(jobs)]


def table(
    jobs: Sequence[Job], spans: Sequence[tuple[float, float]], before: Sequence[float | None] | None = None
) -> RenderableType:
    """The same as a table for a terminal, with the time and the rate of each stage."""
    from rich.console import Group
    from rich.text import Text

    from launch.monitor.status_table import FittingTable, number

    rows: list[dict[str, str | Text]] = []
    notes = []
    for job, made, (began, ended) in zip(jobs, _all_made(jobs, before), spans, strict=True):
        failed = made.counts.get("failed", 0)
        processed = _processed(job.output, began) if made.counts and job.output else 0
        rows.append(
            {
                "stage": made.stage,
                "kept": str(made.counts.get("kept", "")),
                "dropped": str(made.counts.get("dropped", "")),
                "failed": Text(str(failed), "red") if failed else str(made.counts.get("failed", "")),
                "time": duration(ended - began),
                "rate": f"{number(processed / max(ended - began, 0.1))}/s" if processed else "",
                "output": _short(made.output),
            }
        )
        said = [made.text, f"dropped: {made.dropped}" if made.dropped else "", _nothing_to_do(made)]
        said += [note.strip() for note in made.notes]
        notes += [f"{made.stage}: {text}" for text in said if text]
    done = f"done in {duration(spans[-1][1] - spans[0][0])}"
    return Group(done, FittingTable(rows, _LEAST, folded="output"), *map(Text, notes))


def _line(made: Made) -> str:
    said = made.text
    if made.counts:
        said = f"{made.counts['kept']} of {made.counts['in']} samples kept"
        if made.counts["dropped"]:
            said += f", {made.counts['dropped']} dropped ({made.dropped})"
        said += f", {made.counts['failed']} failed" if made.counts["failed"] else ""
    return ": ".join(filter(None, [str(made.output or ""), "; ".join(filter(None, [said, _nothing_to_do(made)]))]))


def _nothing_to_do(made: Made) -> str:
    return f"already finished on {made.already}, nothing to do" if made.already else ""


def _next_line(jobs: Sequence[Job]) -> list[str]:
    following = next_command(jobs[-1])
    return [f"next: {following}"] if following else []


def _short(path: Path | None) -> str:
    """``path`` relative to the current folder if it is below it; otherwise unchanged."""
    return str(path.relative_to(Path.cwd()) if path and path.is_relative_to(Path.cwd()) else path or "")


def _processed(output: Path, began: float) -> int:
    """Samples processed by this run, without those of earlier runs."""
    return sum(event["totals"].get("in", 0) for event in last_events(output) if event["begin"] >= began)


def _all_made(jobs: Sequence[Job], before: Sequence[float | None] | None) -> Iterator[Made]:
    for job, was in zip(jobs, before or [None] * len(jobs), strict=True):
        already = was is not None and was == finished_at(job) and not getattr(job.config, "overwrite", False)
        yield replace(_made(job), already=time.strftime("%Y-%m-%d %H:%M", time.localtime(was)) if already else "")


def _made(job: Job) -> Made:
    place = job.output
    if job.stage == "report":
        folder = Path(job.config.data_dir, job.config.dataset)
        return Made(job.stage, Path(job.config.output or folder / "report.html").absolute())
    if place is None:
        return Made(job.stage)
    if job.stage == "train":
        last = last_logged(place)
        loss = f", loss {last['loss']:.4g}" if isinstance(last.get("loss"), float) else ""
        export = f"; model in {place / 'export'}" if (place / "export").is_dir() else ""
        text = f"step {last.get('step', '?')}{loss}{export}"
        return Made(job.stage, place, text, notes=tuple(filter(None, [problem(place)])))
    try:
        dataset = Dataset.open(place)
        made = _of_dataset(job.stage, dataset, dataset.require_success())
        return replace(made, notes=(*made.notes, *_small_encoders(job)))
    except (Unfinished, StorageError, OSError):
        return Made(job.stage, place)


def _small_encoders(job: Job) -> Iterator[str]:
    """A remark if latents come from the small built-in encoders."""
    names = ("vae", "text_encoder") if job.stage == "precompute" else ()
    small = [f"{name}={value}" for name in names if str(value := getattr(job.config, name)).startswith("embedded")]
    if small:
        yield f"  {' '.join(small)}: small encoders for trying things out; name published ones to train models for use"


def _of_dataset(stage: str, dataset: Dataset, success: dict[str, Any]) -> Made:
    counts = success["counts"]
    notes = []
    if counts["failed"]:
        notes.append(f"  failed: {common_failures(dataset)}")
        if counts.get("retryable"):
            notes.append(f"  retry_failed=true tries {counts['retryable']} of them again")
    dropped = _commonest(success.get("reasons") or {}, "dropped") if counts["dropped"] else ""
    return Made(stage, Path(dataset.root.path), counts=counts, dropped=dropped, notes=tuple(notes))


def _commonest(reasons: dict[str, int], outcome: str) -> str:
    found = {name.partition(":")[2]: n for name, n in reasons.items() if name.startswith(outcome)}
    most = sorted(found.items(), key=lambda reason: -reason[1])
    more = f", {len(most) - _REASONS} more reasons" if len(most) > _REASONS else ""
    return ", ".join(f"{count} {name}" for name, count in most[:_REASONS]) + more


def next_command(job: Job) -> str:
    """The command that usually follows; empty if there is none, or if it depends on more than this job.

    Stages that have their results already, made from those of this job, are passed over.
    """
    while (following := _following(job)) is not None:
        try:
            after = Job.of(*following)
        except ConfigError:
            break  # the command itself says what is missing
        if not _up_to_date(after, job):
            break
        job = after
    if following is None:
        return ""
    stage, words = following
    placed = job.config.data_dir and job.config.dataset
    command = [*cli.program("submit").split(), f"stage={stage}"] if placed else cli.program(stage).split()
    return public_text(shlex.join([*command, *words]))


def _up_to_date(job: Job, source: Job) -> bool:
    """Whether the result of ``job`` is there, and was made from that of ``source`` as it is now."""
    if makes_data(job.stage) and job.output is not None:
        variants = job.output.parent.glob(f"{job.stage}-*") if job.config.dataset else ()
        return any(made_from_input(job, place) for place in (job.output, *variants))
    made, read = finished_at(job), finished_at(source)
    return made is not None and (read is None or made >= read)


def _following(job: Job) -> tuple[str, list[str]] | None:
    """The stage that usually follows, and its settings."""
    task = getattr(job.config, "task", "diffuse")
    stage = _AFTER_TRAINING.get(task, "") if job.stage == "train" else _NEXT.get(job.stage, "")
    if not stage:
        return None
    config = job.config
    more = ["task=caption"] if job.stage == "features" else []
    if not (config.data_dir and config.dataset):
        if stage in ("generate", "evaluate", "caption", "report") or job.output is None:
            return None
        return stage, [f"input={job.output}", f"output={job.output.parent / stage}", *more]
    words = cli.dataset_of(config)
    if stage == "report":
        words = [word for word in words if not word.startswith(("split=", "subset="))]
    if job.stage == "train" and config.name:
        words.append(f"name={config.name}")
    return stage, [*words, *more]
