"""stage=train: fit a model to a dataset directory; goes on from the newest checkpoint of its run folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cli
from pipeline.cli import config_for
from pipeline.config import TrainConfig, run_folder
from pipeline.distributed import Rank, distributed
from pipeline.loading import Batches
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.stage import input_folder, open_input, place_of
from pipeline.storage import Folder, StorageError
from pipeline.telemetry import Events
from pipeline.workers import available_cpus

if TYPE_CHECKING:
    import torch

    from pipeline.training.tasks.base import Task


@distributed
def main(rank: Rank, config: TrainConfig) -> None:
    if rank.is_main:
        rank.log.info("%s\n%s", type(config).__name__, cli.dump(config))
    dataset = _input(config)
    import torch

    from pipeline.training.loop import NotFinite, Training

    torch.set_num_threads(config.threads or available_cpus(rank.local_world_size))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first use of cuBLAS
        torch.use_deterministic_algorithms(True)
    task, data, valid = learned(config, dataset, rank.device)
    if config.epochs:
        config = replace(config, steps=max(1, round(config.epochs * len(data) / config.batch_size)))
    place = config.output or run_folder(config, config.name or config.task)
    try:
        run = Folder.open(place, create=True)
    except OSError as error:
        raise StorageError(f"output {place} cannot be made: {error.strerror}") from error
    training = Training(task, data, config, rank, run, valid)  # what refuses the command leaves the run as it is
    rank.now = {"of": config.steps}
    try:
        with Events(run, rank).around():
            state = training.run()
    except NotFinite as error:
        raise SystemExit(f"error: {error}") from None
    if rank.is_main:
        rank.log.info("%s: finished after %d steps", place, state.step)


def _input(config: TrainConfig) -> Dataset | None:
    """Latents; for classes, the images; for captions, features or (encoder=) the images; None: what is no dataset
    directory, one HDF5 file of captions or a folder of others' latents."""
    if config.task == "classify":
        return open_input(config, "precompute")
    if config.task == "caption" and config.input.endswith(".h5"):
        return None
    if config.task == "diffuse" and _is_foreign(input_folder(config, "train")):
        return None
    if config.task != "caption" or config.input:
        return open_input(config, "train")
    upstream = "shard" if config.encoder else "features"
    return open_input(replace(config, input=str(place_of(config, upstream))), "train")


def _is_foreign(place: Path) -> bool:
    """Whether ``place`` is a folder of MDS that no stage has made."""
    return not (place / "plan").is_dir() and (place / "index.json").is_file()


def learned(
    config: TrainConfig, dataset: Dataset | None, device: str | torch.device = "cpu"
) -> tuple[Task, Batches, Batches | None]:
    """The task, what it is trained on, and what it is measured on meanwhile.

    Args:
        device: where encoders compute that are no part of what is trained.
    """
    if config.start_from and not Path(config.start_from).exists():
        config = replace(config, start_from=str(run_folder(config, config.start_from)))
    if config.task == "caption":
        from pipeline.training.tasks.caption import learned as captioning

        return captioning(config, dataset, device)
    from pipeline.training.feed import Chosen, split

    if config.task == "classify":
        assert dataset is not None
        from pipeline.training.images import ImageDataset
        from pipeline.training.tasks.classify import Classify

        dataset.require_columns("jpg", "label")
        config = replace(config, resolution=config.resolution or 224)
        images = ImageDataset(RandomAccess(dataset), round(config.resolution * config.enlarge))
        task: Task = Classify(config, images)
        return task, *split(images, config.valid_fraction, config.seed)
    from pipeline.training.stored_latents import latents_of
    from pipeline.training.tasks.diffuse import EVALUATED, Diffuse

    data, info = latents_of(config, dataset.root.path if dataset else input_folder(config, "train"))
    task = Diffuse(config, data, info)
    if config.valid_fraction:
        return task, *split(data, config.valid_fraction, config.seed)
    return task, data, Chosen(data, config.seed, 0, min(EVALUATED, len(data)))


if __name__ == "__main__":
    main(config_for("train"))
