"""stage=repair: verify, then rebuild only the damaged partitions, with the stage and the settings that made them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, RepairConfig
from pipeline.distributed import Rank, distributed
from pipeline.imaging.worker_pool import DEFAULT_WORKER_LIMITS, WorkerLimits
from pipeline.partitions import engine
from pipeline.partitions.attempt import unless_removed
from pipeline.partitions.dataset import Dataset, open_root
from pipeline.partitions.plan import PARTITIONS
from pipeline.partitions.planning import commit_repair
from pipeline.partitions.repair import redo_partitions, repair_headers
from pipeline.partitions.stage import AnyStage
from pipeline.partitions.verify import Finding
from pipeline.registry import stages
from pipeline.stages import stage_that_made
from pipeline.stages.verify import findings_in
from pipeline.storage import Folder, StorageError

Maker = Callable[[Dataset, Rank, bool], AnyStage]
"""(dataset, rank, lenient) → the stage to redo partitions with; ``lenient``: accept any fraction of failed samples."""


def repair(
    folder: str | Path,
    rank: Rank,
    deep: bool = False,
    workers: int = 1,
    make: Maker | None = None,
    limits: WorkerLimits = DEFAULT_WORKER_LIMITS,
) -> dict[str, Any] | None:
    """Redo the partitions in which :func:`verify` finds faults, and finish the dataset again.

    Args:
        deep: also check the content of partitions whose bytes are as written; redone data may then differ.
        workers: number of verifying processes; 0: one per CPU.
        make: creates the stage if its settings alone do not define it.
        limits: of the processes that decode images, with ``deep``.

    Returns:
        The content of ``_SUCCESS`` afterwards; None if there was nothing to repair.

    Raises:
        ConfigError: there is no dataset directory, or its input has changed.
        StorageError: the plan is damaged beyond repair, or the redone content differs from before.
    """
    try:
        return _repair(folder, rank, deep, workers, make or _by_settings, limits)
    except OSError as error:
        raise StorageError(f"{folder} cannot be repaired: {error}") from error


def _by_settings(dataset: Dataset, rank: Rank, lenient: bool) -> AnyStage:
    if dataset.stage == "shard" and not dataset.header["config"]["input"]:
        raise ConfigError(
            f"{dataset.root.path} was converted from a Python Dataset, which is not stored: "
            "call .repair() of the converter that made it, with the same Dataset and settings"
        )
    return stage_that_made(dataset, rank, lenient=lenient)


def _repair(
    folder: str | Path, rank: Rank, deep: bool, workers: int, make: Maker, limits: WorkerLimits
) -> dict[str, Any] | None:
    root = open_root(folder)
    with unless_removed(root):
        return _repair_at(root, rank, deep, workers, make, limits)


def _repair_at(
    root: Folder, rank: Rank, deep: bool, workers: int, make: Maker, limits: WorkerLimits
) -> dict[str, Any] | None:
    mended = repair_headers(root)
    for name in mended:
        rank.log.info("dataset: %s: its bytes have changed: repaired", name)
    dataset = Dataset(root)
    findings = list(findings_in(dataset, deep, workers, limits=limits))
    for finding in findings:
        rank.log.info("%s", finding)
    if not findings:
        return dataset.success if mended else None
    stage = make(dataset, rank, bool(_expected(dataset)))
    expected = "" if any(finding.inside for finding in findings) else _expected(dataset)
    for plan in dataset.plans:
        if any(finding.file == f"{plan.folder}/{PARTITIONS}" for finding in findings):
            redo_partitions(stage, dataset, plan)
    redo = _to_redo(dataset, findings)
    if (redo or dataset.success) and not commit_repair(dataset, redo, expected):
        raise StorageError(f"{root.path}: another run is working on it: repair again when it has finished")
    after = engine.run(stage)
    came_out = after["generations"][len(dataset.plans) - (0 if redo or dataset.success else 1)]["content_digest"]
    if expected and came_out != expected:
        raise StorageError(
            f"{root.path} was repaired, but its content differs from before: "
            "its input or the software has changed since; outputs made from it are stale"
        )
    return after


def _expected(dataset: Dataset) -> str:
    """The expected content digest; empty if the dataset was never finished."""
    if dataset.success is not None:
        return str(dataset.success["content_digest"])
    newest = dataset.plans[-1].header  # an earlier repair may have been interrupted
    return str(newest["mends"]) if newest["kind"] == "repair" else ""


def _to_redo(dataset: Dataset, findings: list[Finding]) -> set[int]:
    """Partitions to redo. Uncommitted partitions are not included: the stage processes them anyway."""
    bad = {finding.partition for finding in findings if finding.partition >= 0}
    if dataset.success is None:
        bad = {index for index in bad if dataset.root.exists(dataset.path_of(index))}
    return bad


@stages.register("repair", RepairConfig)
@distributed
def main(rank: Rank, config: RepairConfig) -> None:
    after = repair(config.input, rank, config.deep, config.workers, limits=WorkerLimits.of(config))
    rank.log.info("%s: %s", config.input, "repaired" if after else "no damage found, nothing to repair")


if __name__ == "__main__":
    main(config_for("repair"))
