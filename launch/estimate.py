"""Estimates of the time, CPU and GPU hours, disk space and inodes of stages, and of the resources to request from
SLURM.

The amount of work is known from the plan if there is one, otherwise from the input or the previous stage. The cost of a
sample is in ``rates.yaml``, corrected by measurements from earlier runs below ``data_dir``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import pack
from launch.quantities import clock, mebibytes, minutes
from launch.script import Script
from launch.site import Limits, Room, Site
from pipeline.config.schema import ConfigError, traits_of
from pipeline.partitions.stage import input_folder
from pipeline.storage import StorageError
from pipeline.telemetry.units import duration

if TYPE_CHECKING:
    from launch.job import Job
    from pipeline.partitions.dataset import Dataset

_NETWORKS = ("vae", "image_resolutions", "text_encoder", "image_features", "features_resolution")
"""Options that say which networks a stage has, and what for."""
RATES = Path(__file__).parent / "rates.yaml"
INODES = 4
"""Inodes per partition: its folder, record, ledger and one data file."""
WITHIN = 4.0  # target duration of a proposal in hours
_FULL = 0.85  # share of the time in which CPUs are busy if a stage runs on several ranks
_MOST_RUNS = 20  # maximum number of earlier runs to read
_REFERRING = ("dedup", "score", "select", "recaption")
"""Stages whose rows refer to samples of their upstream, which later stages read."""
_NETWORK = ("http_archive", "url_list", "huggingface", "torchvision")
"""Sources that fetch samples over a network: their speed does not depend on CPUs, and the number of samples is unknown
before planning."""


@dataclass(frozen=True)
class Work:
    """The amount of work of a stage; -1 if unknown. ``bytes`` are those of the samples, including samples stored
    elsewhere that rows refer to."""

    samples: int = -1
    bytes: float = -1.0
    partitions: int = -1

    @property
    def sample_bytes(self) -> float:
        return max(0.0, self.bytes) / max(1, self.samples)


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a stage with the requested resources.

    Attributes:
        hours: duration; None if unknown.
        output_bytes, inodes: bytes and inodes of its output; -1 if unknown.
        basis: where the numbers come from, or why there are none.
        finished: whether there is nothing left to do.
        proposal: options that would be suitable for the job.
    """

    stage: str
    work: Work
    cpu_hours: float | None = None
    gpu_hours: float | None = None
    hours: float | None = None
    output_bytes: float = -1.0
    inodes: int = -1
    basis: str = ""
    finished: bool = False
    proposal: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


# ---- rates


@cache
def rates() -> dict[str, Any]:
    """The content of ``rates.yaml``."""
    import yaml

    table: dict[str, Any] = yaml.safe_load(RATES.read_text())
    return table


def predicted(stage: str, settings: Mapping[str, Any], sample_bytes: float, gpus: bool) -> float | None:
    """CPU seconds, or GPU seconds with ``gpus``, per sample according to the table; None if it has no such entry."""
    table = rates()
    texts = settings.get("text_encoder", ())
    vision = str(settings.get("image_features", "")) or "embedded"
    networks = {"precompute": [str(settings.get("vae", "")), vision], "texts": texts}.get(stage, [])
    if any(not name.startswith("embedded") for name in networks):
        edges = settings.get("image_resolutions", ()) if stage == "precompute" else ()
        operations = _patches(settings) * table["models"]["patch_tflop"] if stage == "precompute" else 0.0
        operations += sum(table["models"]["vae_tflop_256"] * (edge / 256) ** 2 for edge in edges)
        operations += table["models"]["text_tflop"] * len(texts)
        return float(operations / table["models"]["tflops_of_a_gpu" if gpus else "tflops_of_a_cpu"])
    entry = table["stages"].get(stage)
    if entry is None or gpus:
        return None
    return float(entry["sample"] + entry["megabyte"] * sample_bytes / 1e6)


@dataclass(frozen=True)
class History:
    """Measurements from earlier runs of a stage at this site; medians.

    Attributes:
        runs, gpu_runs: number of runs, and of those on GPUs.
        cpu, gpu: measured CPU and GPU time relative to the table.
    """

    runs: int = 0
    cpu: float = 1.0
    gpu: float = 1.0
    gpu_runs: int = 0
    rank_seconds: float = 0.0
    """Seconds of a rank per sample; for training, seconds of all ranks together per sample."""


def history(data_dir: Path, stage: str) -> History:
    """Read the events of outputs of ``stage`` below ``data_dir``."""
    cpus, gpus, seconds = [], [], []
    for run in _runs(data_dir, stage):
        if run.cpu is not None:
            cpus.append(run.cpu)
        if run.gpu is not None:
            gpus.append(run.gpu)
        seconds.append(run.seconds)
    if not seconds:
        return History()
    middle = statistics.median
    return History(
        len(seconds), middle(cpus) if cpus else 1.0, middle(gpus) if gpus else 1.0, len(gpus), middle(seconds)
    )


@dataclass(frozen=True)
class _Run:
    cpu: float | None
    gpu: float | None
    seconds: float


@cache
def _places(data_dir: Path) -> list[tuple[Path, bool]]:
    """Outputs below ``data_dir``, and whether each is a training run."""
    from launch.monitor.watch import DatasetWork, find

    return [(path, kind is not DatasetWork) for path, kind in find(data_dir)] if data_dir.is_dir() else []


def _runs(data_dir: Path, stage: str) -> Iterator[_Run]:
    seen = 0
    for path, is_run in _places(data_dir):
        if is_run != (stage == "train") or seen == _MOST_RUNS:
            continue
        try:
            run = _train_run(path) if is_run else _dataset_run(path, stage)
        except (OSError, StorageError, ConfigError, KeyError, TypeError, ValueError):
            continue  # skip damaged outputs
        if run is not None:
            seen += 1
            yield run


def _dataset_run(path: Path, stage: str) -> _Run | None:
    from pipeline.partitions.dataset import Dataset
    from pipeline.telemetry.events import last_events

    dataset = Dataset.open(path)
    if dataset.stage != stage:
        return None
    events = [event for event in last_events(path) if event["totals"].get("in") and event.get("cpu")]
    done = sum(event["totals"]["in"] for event in events)
    if done < 20:
        return None
    spent = sum(event["cpu"] for event in events) / done
    seconds = sum(event["time"] - event["begin"] - event.get("waited", 0.0) for event in events) / done
    on_gpu = any(event.get("gpu") for event in events)
    by_table = predicted(stage, dataset.header["config"], input_of(dataset).sample_bytes, on_gpu)
    if not by_table:
        return _Run(None, None, seconds)
    return _Run(None, seconds / by_table, seconds) if on_gpu else _Run(spent / by_table, None, seconds)


def _train_run(path: Path) -> _Run | None:
    from pipeline.telemetry.events import last_events

    events = [event for event in last_events(path) if event.get("done")]
    done = sum(event["done"] for event in events)
    return _Run(None, None, sum(event["time"] - event["begin"] for event in events) / done) if done else None


# ---- amount of work


def input_of(dataset: Dataset) -> Work:
    """The input of a planned dataset."""
    plan = dataset.plans[0].header
    samples = sum(p.header["expected"] for p in dataset.plans) - sum(p.header["supersedes"] for p in dataset.plans)
    if min(p.header["expected"] for p in dataset.plans) < 0:
        samples = dataset.success["counts"]["in"] if dataset.success else -1
    upstream = (plan.get("upstream") or {}).get("path")
    size = -1.0
    if upstream:
        size = _sample_bytes(_opened(upstream))
    if size < 0:
        size = _input_bytes(dataset)
    return Work(samples, size, dataset.partitions)


def _input_bytes(dataset: Dataset) -> float:
    """Bytes of the inputs in its plan, extrapolated from its first partitions; -1 if the plan has no sizes."""
    looked_at = min(dataset.partitions, 50)
    sizes = [i.size for index in range(looked_at) for i in dataset.partition(index).inputs]
    return sum(sizes) * dataset.partitions / looked_at if sizes and min(sizes) >= 0 else -1.0


def _sample_bytes(dataset: Dataset | None) -> float:
    """Bytes of the samples of a finished dataset; -1 if unknown.

    If its rows refer to samples of its upstream, these are the bytes of its share of the upstream's samples.
    """
    if dataset is None or dataset.success is None:
        return -1.0
    counts = dataset.success["counts"]
    if dataset.stage in _REFERRING:
        upstream = _opened((dataset.plans[0].header["upstream"] or {}).get("path"))
        size = _sample_bytes(upstream)
        if upstream is None or upstream.success is None or size < 0:
            return -1.0
        return float(size * counts["kept"] / max(1, upstream.success["counts"]["kept"]))
    if dataset.header["format"] == "reference":
        size = _input_bytes(dataset)
        return size * counts["kept"] / max(1, counts["in"]) if size >= 0 else -1.0
    return float(counts["bytes"])


def _result_of(dataset: Dataset) -> Work:
    assert dataset.success is not None
    return Work(dataset.success["counts"]["kept"], _sample_bytes(dataset), dataset.partitions)


def _opened(path: str | Path | None) -> Dataset | None:
    from pipeline.partitions.dataset import Dataset

    try:
        return Dataset.open(path) if path else None
    except (ConfigError, StorageError, OSError):
        return None


def work_of(job: Job, before: Work | None, walk: bool) -> tuple[Work, str]:
    """The amount of work of a stage, and where it is known from; ``before`` is the output of the previous stage."""
    if (dataset := _opened(job.output)) is not None:
        return input_of(dataset), "its plan"
    if job.stage == "download" or (job.stage == "filter" and job.config.fuse):
        return _source(job) if walk else (Work(), "known when it is planned")
    upstream = _opened(_input_of(job))
    if upstream is not None and upstream.success is not None:
        work = _result_of(upstream)
        return replace(work, partitions=_partitions(job, work)), "its input"
    if before is not None and before.samples >= 0:
        return replace(before, partitions=_partitions(job, before)), "the previous stage, if it keeps all samples"
    return Work(), "known when the previous stage is planned"


def _input_of(job: Job) -> Path | None:
    try:
        return input_folder(job.config, job.stage)
    except ConfigError:
        return None


def _source(job: Job) -> tuple[Work, str]:
    """Plan as the stage will do, unless that needs a network."""
    from launch import local
    from pipeline.stages import get_stage

    if job.config.source in _NETWORK:
        gigabytes = job.config.expected_gb
        return Work(bytes=gigabytes * 1e9 if gigabytes else -1.0), "known when it is planned"
    samples = partitions = 0
    size, known = 0.0, True
    for partition in get_stage(job.stage)(job.config, local.planner()).partitions():
        partitions += 1
        samples += max(0, partition.count)
        sizes = [one.size for one in partition.inputs]
        known = known and bool(sizes) and min(sizes) >= 0
        size += sum(sizes)
    return Work(samples or -1, size if known else -1.0, partitions), "its input"


def _partitions(job: Job, work: Work) -> int:
    """Number of partitions into which a stage will divide ``work``; -1 if unknown."""
    if job.stage != "shard":
        return work.partitions
    if job.config.partition_size:
        found: int = ceil(work.samples / job.config.partition_size)
        return found
    each = min(max(work.bytes / 32, 32 * 2**20), 256 * 2**20)
    return max(1, ceil(work.bytes / each)) if work.bytes > 0 else -1


def output_bytes(job: Job, work: Work) -> float:
    """Bytes that the stage will write; -1 if unknown."""
    config, each = job.config, work.sample_bytes
    if work.samples < 0:
        return work.bytes if job.stage == "download" else -1.0
    table = rates()["bytes"]
    if job.stage in ("precompute", "texts"):
        latents = sum(_latent_bytes(config, edge) for edge in getattr(config, "image_resolutions", ()))
        latents += _feature_bytes(config) if job.stage == "precompute" else 0.0
        text = table["text_states"] if any(name != "embedded" for name in config.text_encoder) else table["embedded"]
        return work.samples * float(latents + text * len(config.text_encoder))
    if refers(job):
        return work.samples * float(table["reference"])
    if work.bytes < 0:
        return -1.0
    if job.stage == "download":
        return work.bytes
    if job.stage == "filter" and config.max_image_size:
        found: float = work.samples * min(each, table["jpeg_per_pixel"] * 1.5 * config.max_image_size**2)
        return found
    return work.samples * float(table["reference"]) if job.stage == "features" else work.bytes


def refers(job: Job) -> bool:
    """Whether the stage's output refers to samples that are stored elsewhere."""
    if job.stage == "download":
        return bool(job.config.source == "image_folder" and not job.config.copy)
    return job.stage in _REFERRING


def _latent_bytes(config: Any, edge: int) -> float:
    channels = 16 if str(config.vae) == "embedded16" else 4
    number = 4 if config.save_dtype == "float32" else 2
    return channels * (edge / 8) ** 2 * number * (2 if config.latent == "moments" else 1)


def _patches(settings: Mapping[str, Any]) -> float:
    """Patches that image features of a sample are of, with edges of 16 pixels (embedded: 8)."""
    if not settings.get("image_features"):
        return 0.0
    edge = 8 if settings["image_features"] == "embedded" else 16
    own = [size / edge for size in settings.get("features_resolution", ())]
    return float(sum(across**2 for across in own or [size / 16 for size in settings["image_resolutions"]]))


def _feature_bytes(config: Any) -> float:
    if not config.image_features:
        return 0.0
    numbers: int = rates()["features"]["embedded" if config.image_features == "embedded" else "patch"]
    number = 4 if config.save_dtype == "float32" else 2
    return _patches(vars(config)) * (numbers * number if config.features_storage == "dense" else numbers + 2)


# ---- the estimate


def estimates(
    jobs: Sequence[Job], site: Site | None = None, rooms: Iterable[Room] = (), walk: bool = True
) -> list[Estimate]:
    """An estimate for each stage of the jobs, in order.

    Args:
        site: limits to check requests against, which become warnings; None: not checked.
        rooms: limits of disk space and inodes to check against.
        walk: list the input of a stage that is not planned yet, which may be millions of files.
    """
    found: list[Estimate] = []
    made: dict[str, Work] = {}
    for job in jobs:
        own: list[Estimate] = []
        for stage in job.parts or (job,):
            dataset = pack.dataset_of(stage)
            estimate = _estimate(stage, made.get(dataset), walk)
            if traits_of(stage.stage).partitioned:
                size = estimate.work.bytes if estimate.finished or refers(stage) else estimate.output_bytes
                made[dataset] = Work(estimate.work.samples, size, estimate.work.partitions)
            own.append(estimate if estimate.finished else replace(estimate, **_advice(stage, estimate, site)))
        own[-1].warnings.extend(_check_time(job, own, site))
        found += own
    return _with_room(found, list(rooms))


def _estimate(job: Job, before: Work | None, walk: bool) -> Estimate:
    dataset = _opened(job.output) if traits_of(job.stage).partitioned else None
    if dataset is not None and dataset.success is not None:
        done = _result_of(dataset)
        stored = float(dataset.success["counts"]["bytes"])
        return Estimate(job.stage, done, 0.0, 0.0, 0.0, stored, 0, "finished", finished=True)
    if job.stage == "train":
        return _training(job)
    if not traits_of(job.stage).partitioned:
        return Estimate(job.stage, Work(), basis="not estimated")
    work, known = work_of(job, before, walk)
    size = output_bytes(job, work)
    inodes = _inodes(job, work, size)
    if work.samples < 0:
        return Estimate(job.stage, work, output_bytes=size, inodes=inodes, basis=f"samples are {known}")
    gpus = pack.uses_gpus(job)
    past = history(_place(job), job.stage)
    settings = {name: getattr(job.config, name, ()) for name in _NETWORKS}
    each = predicted(job.stage, settings, work.sample_bytes, gpus)
    measured = past.gpu_runs if gpus else past.runs
    factor = past.gpu if gpus else past.cpu
    estimate = Estimate(job.stage, work, output_bytes=size, inodes=inodes, basis=_basis(known, measured, factor, each))
    network = getattr(job.config, "source", "") in _NETWORK and job.stage in ("download", "filter")
    workers = _workers(job, work)
    if network:
        hours = work.samples * past.rank_seconds / workers / 3600 if past.runs else None
        return replace(estimate, hours=hours)
    if each is None:
        hours = work.samples * past.rank_seconds / _ranks(job, work) / 3600 if past.runs else None
        return replace(estimate, hours=hours)
    total = work.samples * each * factor / 3600
    if gpus:
        return replace(estimate, gpu_hours=total, hours=total / _ranks(job, work))
    return replace(estimate, cpu_hours=total, hours=total / workers / (_FULL if workers > 1 else 1.0))


def _basis(known: str, runs: int, factor: float, each: float | None) -> str:
    said = f"{runs} earlier run{'s' * (runs > 1)} here" if runs else "not measured here yet"
    if each is None:
        return f"{said}; amount: {known}"
    corrected = f" x {factor:.2g}" if runs else ""
    return f"launch/rates.yaml{corrected} ({said}); amount: {known}"


def _training(job: Job) -> Estimate:
    """An estimate based only on the speed of earlier runs, because models differ too much for a table."""
    past = history(_place(job), "train")
    config = job.config
    if not past.rank_seconds:
        return Estimate(job.stage, Work(), basis="no earlier run to estimate from; stage=cost estimates a recipe")
    if config.epochs:
        return Estimate(job.stage, Work(), basis="epochs= over latents that do not exist yet")
    samples = config.steps * config.batch_size
    ranks = _ranks(job, Work())
    total = samples * past.rank_seconds / 3600
    basis = f"{past.runs} earlier run{'s' * (past.runs > 1)} here, of any model"
    return Estimate(
        job.stage, Work(samples), gpu_hours=total if pack.uses_gpus(job) else None, hours=total / ranks, basis=basis
    )


def _place(job: Job) -> Path:
    """The folder in which to look for earlier runs."""
    data_dir = getattr(job.config, "data_dir", "")
    return Path(data_dir) if data_dir else (job.output or Path.cwd()).parent


def _script(job: Job) -> Script:
    return Script(job.stage, "", "", job.arguments, Path(), job.request)


def _ranks(job: Job, work: Work) -> int:
    """Number of ranks, of a local command or of a job, that have something to do."""
    config = job.request.config
    asked = job.ranks if config.cluster in ("local", "inline") else _script(job).nodes * _script(job).tasks_per_node
    asked *= max(1, config.array)
    return max(1, min(asked, work.partitions) if work.partitions > 0 else asked)


def _workers(job: Job, work: Work) -> int:
    """Number of CPUs that will be busy."""
    return _ranks(job, work) * (job.request.config.cpus_per_task if job.stage == "filter" else 1)


def _inodes(job: Job, work: Work, size: float) -> int:
    if work.partitions < 0:
        return -1
    files = 1
    if shard_bytes := getattr(job.config, "shard_bytes", 0):
        files = max(1, ceil(size / work.partitions / shard_bytes))
    return work.partitions * (INODES - 1 + files)


# ---- proposals and warnings


def _advice(job: Job, estimate: Estimate, site: Site | None) -> dict[str, Any]:
    """Proposal and warnings for one stage."""
    config = job.request.config
    limits = site.limits(config.partition) if site else []
    advice: dict[str, Any] = {"proposal": propose(job, estimate, limits[0] if limits else None)}
    warnings = _check(job, limits, site) if site else []
    asked, parts = _script(job).ranks, estimate.work.partitions
    if traits_of(job.stage).partitioned and 0 < parts < asked and config.cluster not in ("local", "inline"):
        warnings.append(f"{asked} ranks for {parts} partitions: {asked - parts} of them will have nothing to do")
    return {**advice, "warnings": warnings}


def propose(job: Job, estimate: Estimate, limits: Limits | None) -> dict[str, str]:
    """Options with which the stage takes about :data:`WITHIN` hours on the nodes that ``limits`` describes."""
    cpus, gpus = (limits.cpus, limits.gpus) if limits else (0, 0)
    most = min(limits.most_nodes, limits.nodes) if limits else float("inf")
    parts = max(1, estimate.work.partitions)
    if estimate.gpu_hours and job.stage != "train":
        each = gpus or pack.gpu_count(job.request.config.gpus_per_node) or 1
        wanted = min(parts, max(1, ceil(estimate.gpu_hours / WITHIN)))
        nodes = int(min(most, ceil(wanted / each)))
        own = min(each, wanted)
        proposal = {"nodes": str(nodes), "gpus_per_node": str(own), "tasks_per_node": "0"}
        proposal |= {"cpus_per_task": str(max(1, cpus // each))} if cpus else {}
        hours = estimate.gpu_hours / (nodes * own)
    elif estimate.cpu_hours:
        each = cpus or 16
        wanted = min(parts, max(1, ceil(estimate.cpu_hours / WITHIN / _FULL)))
        nodes = int(min(most, ceil(wanted / each)))
        proposal = {"nodes": str(nodes), "tasks_per_node": str(min(each, ceil(wanted / nodes))), "cpus_per_task": "1"}
        if nodes > 1:  # independent jobs start sooner than one that waits for all its nodes at once
            proposal = {"array": str(nodes), **proposal, "nodes": "1"}
        hours = estimate.cpu_hours / min(parts, nodes * int(proposal["tasks_per_node"])) / _FULL
    elif estimate.hours:
        proposal, hours = {}, estimate.hours
    else:
        return {}
    time = 10 * ceil((hours * 60 * 1.5 + 10) / 10)
    return proposal | {"time": clock(min(time, limits.most_minutes if limits else time))}


def _check(job: Job, limits: list[Limits], site: Site) -> list[str]:
    """Warnings if the request exceeds the limits of the partition or the account."""
    config, script = job.request.config, _script(job)
    warnings = []
    known = {limit.partition for limit in site.partitions}
    for name in filter(None, (name.strip() for name in config.partition.split(","))):
        if site.partitions and name not in known:
            warnings.append(f"partition={name}: no such partition; known: {', '.join(sorted(known))}")
    asked = minutes(config.time)
    for limit in limits:
        where = f"partition {limit.partition}"
        if not limit.up:
            warnings.append(f"{where} is not up: the job would wait")
        if asked > limit.most_minutes:
            warnings.append(f"time={config.time}: {where} allows {clock(limit.most_minutes)}")
        if script.nodes > min(limit.most_nodes, limit.nodes):
            warnings.append(f"nodes={script.nodes}: {where} allows {min(limit.most_nodes, limit.nodes):g}")
        each = script.tasks_per_node * config.cpus_per_task
        if limit.cpus and each > limit.cpus:
            said = f"tasks_per_node={script.tasks_per_node} x cpus_per_task={config.cpus_per_task}"
            warnings.append(f"{said}: nodes of {where} have {limit.cpus} CPUs")
        if pack.gpu_count(script.gpus) > limit.gpus:
            warnings.append(f"gpus_per_node={script.gpus}: nodes of {where} have {limit.gpus} GPUs")
        if limit.memory and mebibytes(config.mem) > limit.memory:
            warnings.append(f"mem={config.mem}: nodes of {where} have {limit.memory / 1024:.0f}G")
    for account in site.accounts:
        if config.account in ("", account.name) and asked > account.most_minutes:
            warnings.append(f"time={config.time}: account {account.name} allows {clock(account.most_minutes)}")
        if config.account in ("", account.name) and config.array > account.most_submitted:
            warnings.append(f"array={config.array}: account {account.name} allows {account.most_submitted:g} jobs")
    if config.account and site.accounts and config.account not in {account.name for account in site.accounts}:
        names = ", ".join(sorted({account.name for account in site.accounts}))
        warnings.append(f"account={config.account}: not one of yours ({names})")
    return warnings


def _check_time(job: Job, found: list[Estimate], site: Site | None) -> list[str]:
    """A warning if the time limit is too short for the estimated work, for all steps of a packed job together."""
    config = job.request.config
    hours = sum(estimate.hours or 0.0 for estimate in found)
    limits = site.limits(config.partition) if site else []
    asked = minutes(config.time)
    limit = max(asked, 1.0) if asked else min((limit.default_minutes for limit in limits), default=float("inf"))
    if config.cluster in ("local", "inline") or hours * 60 <= limit:
        return []
    times = ceil(hours * 60 / limit) - 1
    what = f"time={config.time}" if asked else "the partition's default time"
    return [
        f"about {span(hours)} of work, but {what} is {clock(limit)}: the job will be requeued about {times} "
        f"time{'s' * (times > 1)}; more ranks or a longer time= avoid that"
    ]


def _with_room(found: list[Estimate], rooms: list[Room]) -> list[Estimate]:
    """Add warnings at the stage at which disk space or inodes will run out."""
    size = inodes = 0.0
    warned: set[tuple[str, str]] = set()
    result = []
    for estimate in found:
        size += max(0.0, estimate.output_bytes) * (not estimate.finished)
        inodes += max(0, estimate.inodes)
        warnings = list(estimate.warnings)
        for room in rooms:
            if size > room.bytes and (room.of, "bytes") not in warned:
                warned.add((room.of, "bytes"))
                warnings.append(f"{amount(size)} are needed up to here, {room.of} has room for {amount(room.bytes)}")
            if inodes > room.inodes and (room.of, "inodes") not in warned:
                warned.add((room.of, "inodes"))
                warnings.append(
                    f"{inodes:,.0f} files are needed up to here, {room.of} has room for {room.inodes:,.0f}: "
                    "compact=true halves them, larger partitions (partition_size=) need fewer"
                )
        result.append(replace(estimate, warnings=warnings))
    return result


def idle_gpus(jobs: Sequence[Job], found: Sequence[Estimate]) -> str:
    """A sentence about the GPU hours that ``pack=all`` would waste while stages without GPUs run; empty if none."""
    gpus = max(
        (pack.gpu_count(_script(job).gpus) * _script(job).nodes for job in jobs if pack.uses_gpus(job)), default=0
    )
    before = [
        estimate for job, estimate in zip(jobs, found, strict=True) if not pack.uses_gpus(job) and not estimate.finished
    ]
    if not gpus or not before:
        return ""
    names = ", ".join(dict.fromkeys(estimate.stage for estimate in before))
    hours = sum(estimate.hours or 0.0 for estimate in before)
    unknown = [estimate.stage for estimate in before if estimate.hours is None]
    more = f", and as long as {', '.join(unknown)} take" if unknown else ""
    return f"in one job, {gpus} GPUs are idle while {names} run: about {hours * gpus:.1f} GPU hours{more}"


def span(hours: float) -> str:
    """Hours as text: ``40 s``, ``12 min``, ``3 h 05 min``."""
    return duration(max(1.0, hours * 3600))


def amount(size: float) -> str:
    """Bytes as text: ``812 MB``, ``1.5 GB``."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
