"""pack=true: runs several stages, or the stages of several datasets, as the steps of one job.

Each step uses as much of the job as its stage requests. Settings of the whole job (partition, account, environment, …)
must be the same for all steps; stages with different ones become separate jobs.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.quantities import clock, mebibytes, minutes
from launch.request import Request
from launch.script import Script
from pipeline.config.schema import ConfigError, LaunchConfig, traits_of
from pipeline.registry import stages

if TYPE_CHECKING:
    from launch.job import Job

_SIZES = ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "gpu_type", "gpu_bind", "mem", "time")
"""Keys that may differ between the steps of a job."""
_NOT_SHARED = ("stage", "cluster", "ranks", "dry_run", "pack", "array", "array_parallelism", *_SIZES)
_LOCKSTEP_WAIT, _WAIT = 1800, 60  # seconds, see job.sh
_Key = tuple[str, tuple[tuple[str, Any], ...]]


def packed(jobs: list[Job], mode: str) -> list[Job]:
    """Join the ``jobs`` that can run in one allocation into a job with ``parts``; the order of each chain is kept.

    Args:
        mode: the option ``pack``: ``false``, ``true`` or ``all``.

    Raises:
        ConfigError: with ``all``, the stages cannot be in one job; or a job is an array.
    """
    if mode == "false":
        return jobs
    for job in jobs:
        if job.request.config.array:
            raise ConfigError(
                f"pack={mode}: array={job.request.config.array} splits stage {job.stage} into independent jobs: "
                "choose one of the two"
            )
    if mode == "all":
        _require_alike(jobs)
        return [_joined(jobs)]
    return [_joined(group) for group in _groups(jobs)]


def _groups(jobs: Iterable[Job]) -> list[list[Job]]:
    """Groups of successive jobs that may share an allocation; several datasets are grouped stage by stage."""
    groups: list[tuple[_Key, list[Job]]] = []
    place, dataset = 0, ""
    for job in jobs:
        if dataset_of(job) not in ("", dataset):
            place, dataset = 0, dataset_of(job)
        key = _key(job)
        found = next((number for number in range(place, len(groups)) if groups[number][0] == key), len(groups))
        if found == len(groups):
            groups.append((key, []))
        groups[found][1].append(job)
        place = found
    return [group for _, group in groups]


def dataset_of(job: Job) -> str:
    """The dataset that a job works on; empty if the stage has no such setting."""
    return str(getattr(job.config, "dataset", ""))


def share_data(one: Job, two: Job) -> bool:
    """Whether two stages may work on the same dataset."""
    return dataset_of(one) == dataset_of(two) or "" in (dataset_of(one), dataset_of(two))


def uses_gpus(job: Job) -> bool:
    """Whether the stage requests GPUs and computes on them."""
    return traits_of(job.stage).gpus and bool(_script(job).gpus)


def _key(job: Job) -> _Key:
    shared = {f.name: getattr(job.request.config, f.name) for f in fields(LaunchConfig) if f.name not in _NOT_SHARED}
    return _gpu_kind(job), tuple(sorted({**shared, **job.request.options}.items()))


def _gpu_kind(job: Job) -> str:
    """The kind of GPUs that the stage requests, regardless of their number; empty if it uses none."""
    config = job.request.config
    return f"GPUs {config.gpu_type} {config.gpu_bind}".strip() if uses_gpus(job) else ""


def _require_alike(jobs: list[Job]) -> None:
    kinds = sorted({_gpu_kind(job) for job in jobs} - {""})
    if len(kinds) > 1:
        raise ConfigError(f"pack=all: {' and '.join(kinds)} are asked for: one job has one kind; use pack=true")
    first = dict(_key(jobs[0])[1])
    for job in jobs[1:]:
        other = dict(_key(job)[1])
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"pack=all: stage {jobs[0].stage} has {name}={first.get(name, '')}, stage {job.stage} "
                    f"{name}={other.get(name, '')}: one job has one of it; give them the same, or pack=true"
                )


def _joined(jobs: list[Job]) -> Job:
    if len(jobs) == 1:
        return jobs[0]
    outputs = [str(job.output) for job in jobs if job.output]
    return replace(
        jobs[0],
        stage=",".join(dict.fromkeys(job.stage for job in jobs)),
        arguments=tuple(str(job.output or " ".join(job.arguments)) for job in jobs),
        output=Path(os.path.commonpath(outputs)) if outputs else None,
        request=_request(jobs),
        parts=tuple(jobs),
    )


def _request(jobs: list[Job]) -> Request:
    """The resources of the joint job: on each node, as much as its largest step uses."""
    scripts = [_script(job) for job in jobs]
    widest = max(scripts, key=lambda s: s.tasks_per_node * s.request.config.cpus_per_task)
    gpus = [script.gpus for job, script in zip(jobs, scripts, strict=True) if uses_gpus(job)]
    idle = [job.stage for job, script in zip(jobs, scripts, strict=True) if script.gpus and not uses_gpus(job)]
    if idle and not gpus:
        print(
            f"pack: {', '.join(dict.fromkeys(idle))}: no GPUs are asked for, as these stages use none "
            "(<stage>.gpus_per_node= asks for one stage alone)",
            file=sys.stderr,
        )
    gpu = next((job.request.config for job in jobs if uses_gpus(job)), None)
    times = [script.request.config.time for script in scripts]
    config = replace(
        widest.request.config,
        nodes=max(script.nodes for script in scripts),
        tasks_per_node=widest.tasks_per_node,
        gpus_per_node=max(map(gpu_count, gpus), default=0),
        gpu_type=gpu.gpu_type if gpu else "",
        gpu_bind=gpu.gpu_bind if gpu else "",
        mem=max((script.request.config.mem for script in scripts), key=mebibytes),
        time=times[0] if len(set(times)) == 1 else _sum(times),
    )
    return Request(config, jobs[0].request.options)


def _script(job: Job) -> Script:
    return Script(job.stage, "", "", job.arguments, Path(), job.request)


def gpu_count(gpus: Any) -> int:
    """The number of GPUs in ``8`` or ``a100:8``."""
    number = str(gpus or 0).rpartition(":")[2]
    return int(number) if number.isdigit() else 1


def _sum(times: list[str]) -> str:
    """The sum of the steps' time limits; empty, for the partition's default, if a step has none."""
    return clock(sum(map(minutes, times))) if all(times) else ""


# ---- the script


@dataclass(frozen=True)
class PackedScript(Script):
    """The script of a packed job."""

    steps: tuple[Script, ...] = ()

    def _run(self) -> list[str]:
        lines: list[str] = []
        for number, step in enumerate(self.steps, 1):
            config = step.request.config
            command = [f"python -m {stages.module(step.stage)}", *map(shlex.quote, step.arguments)]
            lockstep = traits_of(step.stage).lockstep
            lines += [
                f"# step {number}: {step.stage}",
                f"step_size {step.nodes} {step.tasks_per_node} {config.cpus_per_task}",
                f"WAIT={_LOCKSTEP_WAIT if lockstep else _WAIT}",
                " \\\n  ".join([f"{'run_together' if lockstep else 'run'} {command[0]}", *command[1:]]),
                "",
            ]
        return lines[:-1]


def script_of(job: Job, name: str, comment: str, logs: Path) -> PackedScript:
    """The script of a packed job; it also contains steps whose output is finished, which end at once."""
    steps = tuple(replace(_script(part), logs=logs) for part in job.parts)
    arguments = tuple(argument for part in job.parts for argument in part.arguments)  # for the folders they name
    return PackedScript(job.stage, name, comment, arguments, logs, job.request, steps=steps)


def comment(places: list[str]) -> str:
    """A single text for the outputs of several stages: ``/data/shapes/train/{filter,shard-mds}``."""
    common = os.path.commonpath(places) if places else ""
    rest = [os.path.relpath(place, common) for place in places]
    return f"{common}/{{{','.join(rest)}}}" if len(rest) > 1 else common


def places(comment: str) -> list[str]:
    """The outputs in a job's comment; the inverse of :func:`comment`."""
    common, brace, rest = comment.partition("/{")
    if not brace or not rest.endswith("}"):
        return [comment]
    return [f"{common}/{name}" for name in rest[:-1].split(",")]
