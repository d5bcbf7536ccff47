"""Run stages or submit them to SLURM: ``python launch/submit.py stage=<stage[,stage...]|all> key=value ...``.

Settings of stages are given as for ``python -m pipeline.stages.<stage>``; a key applies to every stage that has it, a
qualified key (``train.batch_size=64``) only to that stage. A stage starts when the previous one has finished.

    python launch/submit.py stage=all dataset=shapes data_dir=/data ranks=2                      # on this machine
    python launch/submit.py stage=all dataset=mine.yaml data_dir=/data cluster=slurm nodes=4 tasks_per_node=16
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.interpreter import ensure

if __name__ == "__main__":
    ensure(sys.path[0])

from launch import local, notify, precheck
from launch.finished import finished_at
from launch.job import Job as Job
from launch.job import output_of
from launch.outcome import show
from launch.request import PRESETS, Launch, Request, read
from launch.script import is_single
from launch.submission import Submission
from pipeline.config import cli
from pipeline.config.schema import (
    CURATION,
    MAIN_LINE,
    STAGES,
    ConfigError,
    LaunchConfig,
    public_text,
    traits_of,
)
from pipeline.distributed import EXIT_STOPPED
from pipeline.registry import stages
from pipeline.telemetry.units import counted

ALL = (*MAIN_LINE, "generate", "evaluate", "report")


def jobs_of(launch: LaunchConfig, settings: dict[str, str], requests: Mapping[str, Request] | None = None) -> list[Job]:
    """The jobs for ``launch.stage`` with these settings, each of which reads the output of the one before it.

    Raises:
        ConfigError: a stage or key is unknown, or a value is missing or wrong.
    """
    names = whole_line(settings) if launch.stage == "all" else launch.stage.split(",")
    for name in names:
        if name not in STAGES:
            raise ConfigError(f"stage={launch.stage}: no stage {name!r}; {cli.nearest(name, [*STAGES, 'all'])}")
    for key, value in settings.items():
        stage = key.rpartition(".")[0]
        if stage in STAGES and stage not in names:
            raise ConfigError(f"{key}={value} has no effect: stage {stage} is not run (stage={launch.stage})")
    if len(names) > 1 and settings.get("output"):
        raise ConfigError("output= is for a single stage; give data_dir= for several")
    if {"download", "filter"} <= set(names) and _own(settings, "filter", names).get("fuse") == "true":
        names.remove("download")
    run_id = uuid.uuid4().hex
    jobs: list[Job] = []
    unused = _Unused(settings)
    for number, (name, own) in enumerate(_steps(names, settings)):
        keys = {f.name for f in fields(cli.options_of(name, own))}
        runs = [job for job in jobs if job.stage == "train"]
        before = [job for job in jobs if job.stage != "train"]  # all phases of a recipe train on the same latents
        if "input" in keys and number and (before or name != "train"):
            own.pop("input", None)
            if (source := _source(name, before)) is not None:
                own["input"] = str(source)
        if traits_of(name).reads_run and runs and runs[-1].config.name and not own.get("checkpoint"):
            own.setdefault("name", runs[-1].config.name)
        unused.drop_from(own, name)
        if "run_id" in keys:
            own.setdefault("run_id", run_id)
        arguments = tuple(f"{key}={value}" for key, value in own.items())
        config = cli.load(name, arguments)
        if launch.stage == "all" and name == "evaluate" and not config.metric:
            continue  # there is no metric for this dataset
        ranks = 1 if is_single(name, arguments) else launch.ranks
        request = (requests or {}).get(name, Request(launch))
        jobs.append(Job(name, config, arguments, ranks, output_of(name, config), request))
    unused.require_none()
    return jobs


def whole_line(settings: Mapping[str, str]) -> list[str]:
    """The stages of ``stage=all``; stages of curation are included if a setting requests them."""
    curation = [stage for stage in CURATION if cli.asked_for(stage, dict(settings), ALL)]
    after = ALL.index("filter") + 1
    return [*ALL[:after], *curation, *ALL[after:]]


def _source(stage: str, before: list[Job]) -> Path | None:
    """The output of the jobs ``before`` that ``stage`` reads: the last one that it reads by default, else the last one
    that contains images; None if it reads no other stage's output."""
    upstream = traits_of(stage).upstream
    usual = [job for job in before if job.stage in upstream]
    others = [job for job in before if job.stage != "score"]
    return (usual or others)[-1].output if upstream and (usual or others) else None


def per_dataset(settings: dict[str, str]) -> list[dict[str, str]]:
    """The settings of each dataset of ``dataset=a,b``."""
    names = [name.strip() for name in settings.get("dataset", "").strip("[]").split(",") if name.strip()]
    if len(names) < 2:
        return [settings]
    if settings.get("input") or settings.get("output"):
        raise ConfigError("input= and output= are for one dataset; give data_dir= for several")
    if len(set(names)) < len(names):
        raise ConfigError(f"dataset={settings['dataset']}: a dataset is named twice")
    return [{**settings, "dataset": name} for name in names]


class _Unused:
    """Passes settings for all stages only to stages in which they have an effect, of which there must be at least one.

    A setting for a single stage (``train.lr=``) must have an effect there, which the stage's config checks.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._plain = {key for key in settings if "." not in key}
        self._used: set[str] = set()
        self._why: dict[str, str] = {}

    def drop_from(self, own: dict[str, str], stage: str) -> None:
        """Remove the settings that have no effect in a stage from its settings ``own``."""
        for key, why in cli.ineffective(stage, own).items():
            if key in self._plain:
                del own[key]
                self._why.setdefault(key, why)
        self._used |= own.keys()

    def require_none(self) -> None:
        """Raises ConfigError for a setting that has no effect in any stage."""
        for key, why in self._why.items():
            if key not in self._used:
                raise ConfigError(why)


def _steps(names: list[str], settings: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each stage with its settings; training with a recipe is repeated for each phase, unless a phase is named."""
    for name in names:
        own = _own(settings, name, names)
        phases = cli.phases_of(own["recipe"]) if name == "train" and own.get("recipe") and not own.get("phase") else []
        for phase in phases:
            yield name, {**own, "phase": phase}
        if not phases:
            yield name, own


def _own(settings: dict[str, str], stage: str, chosen: list[str]) -> dict[str, str]:
    """The settings that ``stage`` has; a key that no stage of ``chosen`` has raises ConfigError."""
    known = {f.name for name in chosen for f in fields(cli.options_of(name, settings))}
    for key in settings:
        if "." not in key and key not in known:
            others = [name for name in STAGES if key in {f.name for f in fields(cli.options_of(name, settings))}]
            if others:
                raise ConfigError(f"{key!r} is a setting of {', '.join(others)}, not of {', '.join(chosen)}")
            hint = cli.nearest(key, known | {f.name for f in fields(LaunchConfig)})
            raise ConfigError(f"unknown key {key!r} for stage {', '.join(chosen)}; {hint}")
    return {key: str(value) for key, value in cli.select(settings, stage, "").items()}


def describe(job: Job) -> str:
    """The text of a dry run about a job: its size, as far as it is known, and its command."""
    ranks = f"{job.ranks} rank{'s' * (job.ranks > 1)}"
    return f"{job.stage}: {size_of(job)}; {ranks}; {job.output or ''}\n    {public_text(' '.join(job.command))}"


def size_of(job: Job) -> str:
    """The amount of work as text, as far as it is known."""
    from pipeline.partitions.dataset import Dataset, Unfinished
    from pipeline.stages import get_stage

    if not traits_of(job.stage).partitioned:
        return "one process" if is_single(job.stage, job.arguments) else "one run"
    try:
        dataset = Dataset.open(job.output or "")
        state = f"finished: {dataset.success['counts']['kept']} samples kept" if dataset.success else "begun"
        return f"{counted(dataset.partitions, 'partition')}, {state}"
    except Unfinished:
        pass
    try:
        partitions = samples = 0
        for partition in get_stage(job.stage)(job.config, local.planner()).partitions():
            partitions, samples = partitions + 1, samples + max(partition.count, 0)
        return f"{counted(partitions, 'partition')}, {samples or 'unknown'} samples"
    except Unfinished:
        return "size known when the previous stage has finished"


def main(argv: list[str]) -> int:
    with cli.errors_as_one_line():
        return _run(argv)


def _run(argv: list[str]) -> int:
    if cli.wants_help(argv):
        print(cli.help_text(LaunchConfig, f"{cli.program('submit')} stage=<stage>"))
        print(
            f"\nstages: {', '.join(STAGES)}; all means {','.join(ALL)}, and, if there is a "
            f"setting for them, {', '.join(CURATION)} after filter"
        )
        print(f"presets: {', '.join(sorted(path.stem for path in PRESETS.glob('*.yaml')))}")
        print(f"keys of a stage, such as filter: {cli.program('filter')} --help")
        return 0
    launch = read(argv)
    jobs = [job for own in per_dataset(launch.settings) for job in jobs_of(launch.config, own, launch.requests)]
    if launch.kind == "slurm":
        from launch import slurm
        from launch.pack import packed

        jobs = packed(jobs, launch.config.pack)
        return slurm.rehearse(jobs) if launch.config.dry_run else slurm.submit(jobs)
    return rehearse(jobs) if launch.config.dry_run else run_here(jobs, launch)


def rehearse(jobs: list[Job]) -> int:
    """Print what would be done, and errors with which a stage would stop at its start; returns 2 if there are any."""
    from launch.forecast import print_for_here

    refused = 0
    coming: set[str] = set()
    for job in jobs:
        print(describe(job))
        try:
            precheck.check(job, coming)
        except ConfigError as error:
            refused += 1
            print(f"    would stop: {error}")
        coming |= {str(job.output)} if job.output else set()
    print_for_here(jobs)
    return 2 if refused else 0


def run_here(jobs: list[Job], launch: Launch) -> int:
    """Run the jobs on this machine, one after the other; returns the first exit code that is not 0."""
    for url in {job.request.config.notify for job in jobs} - {""}:
        notify.require_url(url)
    precheck.check_inputs(jobs)
    spans: list[tuple[float, float]] = []
    before: list[float | None] = []
    with Submission(next((job.output for job in jobs if job.output), None), [job.stage for job in jobs]) as submission:
        for number, job in enumerate(jobs, 1):
            submission.at(number)
            begin = time.time()
            before.append(finished_at(job))
            print(f"[{number}/{len(jobs)}] {': '.join(filter(None, (job.stage, str(job.output or ''))))}", flush=True)
            try:
                code = inline(job) if launch.kind == "inline" else local.run(job)
            except ConfigError as error:
                _tell(job, 2, f"error: {error}")
                raise
            _tell(job, code)
            if code:
                return code
            spans.append((begin, time.time()))
    show(jobs, spans, before)
    return 0


def _tell(job: Job, code: int, why: str = "") -> None:
    """Send the message that ``notify=`` requests; a failure to send it is only printed."""
    if url := job.request.config.notify:
        stopped = code in (EXIT_STOPPED, 130)
        event = "finished" if not code else "cancelled" if stopped else "failed"
        reason = why or ("stopped; the same command resumes" if stopped else f"exit code {code}" if code else "")
        if problem := notify.send(
            url, notify.message(event, name=job.stage, work=str(job.output or ""), reason=reason)
        ):
            print(problem, file=sys.stderr)


def inline(job: Job) -> int:
    """Run the job in this process, as one rank."""
    try:
        code = import_module(stages.module(job.stage)).main(job.config)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
