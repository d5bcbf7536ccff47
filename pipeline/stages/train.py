"""stage=train: train a model on a dataset directory; resumes from the newest checkpoint in its run folder."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import cli
from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, TrainConfig, run_folder
from pipeline.distributed import Rank, distributed
from pipeline.imaging.worker_pool import available_cpus
from pipeline.loading import Batches
from pipeline.partitions.dataset import Dataset
from pipeline.registry import stages, tasks
from pipeline.storage import Folder, StorageError
from pipeline.telemetry.events import Events

if TYPE_CHECKING:
    import torch

    from pipeline.training.tasks.base import Task


@stages.register("train", TrainConfig)
@distributed
def main(rank: Rank, config: TrainConfig) -> None:
    if rank.is_main:
        rank.log.info("%s\n%s", type(config).__name__, cli.dump(config))
    kind: type[Task] = tasks.get(config.task)
    dataset = kind.input(config)
    import torch

    from pipeline.training.loop import Training

    torch.set_num_threads(config.threads or available_cpus(rank.local_world_size))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first use of cuBLAS
        torch.use_deterministic_algorithms(True)
    task, data, valid = task_and_data(config, dataset, rank.device)
    if config.epochs:
        config = replace(config, steps=max(1, round(config.epochs * len(data) / config.batch_size)))
    place = config.output or run_folder(config, config.name or config.task)
    try:
        run = Folder.open(place, create=True)
    except OSError as error:
        raise StorageError(f"output {place} cannot be made: {error.strerror}") from error
    if rank.is_main:
        for remark in task.remarks(config):
            rank.log.warning("%s", remark)
    about = _about(config, dataset)
    training = Training(task, data, config, rank, run, valid, about)  # raises before the run is changed
    rank.now = {"of": config.steps}
    with Events(run, rank).around():
        state = training.run()
    if rank.is_main:
        rank.log.info("%s: finished after %d steps", place, state.step)


def _about(config: TrainConfig, dataset: Dataset | None) -> dict[str, Any]:
    """Facts about the data for the model card."""
    published: dict[str, Any] = {}
    with suppress(ConfigError):  # the name of a dataset without settings
        published = cli.dataset_settings(config.dataset).get("about") or {}
    about: dict[str, Any] = {name: str(published[name]) for name in ("title", "home", "terms") if name in published}
    digest = {"digest": dataset.require_success()["content_digest"]} if dataset else {}
    return {**about, "dataset": config.dataset, "split": config.split, **digest}


def task_and_data(
    config: TrainConfig, dataset: Dataset | None, device: str | torch.device = "cpu"
) -> tuple[Task, Batches, Batches | None]:
    """The task, its training data and its validation data.

    Args:
        device: of encoders that are used but not trained.
    """
    if config.start_from and not Path(config.start_from).exists():
        config = replace(config, start_from=str(run_folder(config, config.start_from)))
    kind: type[Task] = tasks.get(config.task)
    return kind.from_config(config, dataset, device)


if __name__ == "__main__":
    main(config_for("train"))
