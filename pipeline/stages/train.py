"""stage=train: fit a model to a dataset directory; goes on from the newest checkpoint of its run folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cli
from pipeline.cli import config_for, nearest
from pipeline.config import ConfigError, TrainConfig, run_folder
from pipeline.distributed import Rank, distributed
from pipeline.loading import Batches
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.stage import open_input, place_of
from pipeline.storage import Folder, StorageError
from pipeline.telemetry import Events

if TYPE_CHECKING:
    from pipeline.training.tasks.base import Task

_LATENTS = "latents_"


@distributed
def main(rank: Rank, config: TrainConfig) -> None:
    if rank.is_main:
        rank.log.info("%s\n%s", type(config).__name__, cli.dump(config))
    dataset = _input(config)
    import torch

    from pipeline.training.loop import train

    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // rank.local_world_size))
    task, data, valid = learned(config, dataset)
    if config.epochs:
        config = replace(config, steps=max(1, round(config.epochs * len(data) / config.batch_size)))
    place = config.output or run_folder(config, config.name or config.task)
    try:
        run = Folder.open(place, create=True)
    except OSError as error:
        raise StorageError(f"output {place} cannot be made: {error.strerror}") from error
    rank.now = {"of": config.steps}
    with Events(run, rank).around():
        state = train(task, data, config, rank, run, valid)
    if rank.is_main:
        rank.log.info("%s: finished after %d steps", place, state.step)


def _input(config: TrainConfig) -> Dataset | None:
    """Latents; for classes, the pictures; for captions, features or (encoder=) the pictures; None: one HDF5 file."""
    if config.task == "classify":
        return open_input(config, "precompute")
    if config.task == "caption" and config.input.endswith(".h5"):
        return None
    if config.task != "caption" or config.input:
        return open_input(config, "train")
    upstream = "shard" if config.encoder else "features"
    return open_input(replace(config, input=str(place_of(config, upstream))), "train")


def learned(config: TrainConfig, dataset: Dataset | None) -> tuple[Task, Batches, Batches | None]:
    """The task, what it is trained on, and what it is measured on meanwhile."""
    if config.start_from and not Path(config.start_from).exists():
        config = replace(config, start_from=str(run_folder(config, config.start_from)))
    if config.task == "caption":
        from pipeline.training.tasks.caption import learned as captioning

        return captioning(config, dataset)
    assert dataset is not None
    from pipeline.training.feed import Chosen, split

    if config.task == "classify":
        from pipeline.training.images import ImageDataset
        from pipeline.training.tasks.classify import Classify

        dataset.require_columns("jpg", "label")
        config = replace(config, resolution=config.resolution or 224)
        images = ImageDataset(RandomAccess(dataset), round(config.resolution * config.enlarge))
        task: Task = Classify(config, images)
        return task, *split(images, config.valid_fraction, config.seed)
    from pipeline.training.tasks.diffuse import EVALUATED, Diffuse

    resolution = resolution_of(dataset, config.resolution)
    data = latents_of(config, dataset, resolution)
    task = Diffuse(config, data, latent_info(dataset, resolution))
    if config.valid_fraction:
        return task, *split(data, config.valid_fraction, config.seed)
    return task, data, Chosen(data, config.seed, 0, min(EVALUATED, len(data)))


def latents_of(config: TrainConfig, dataset: Dataset, resolution: int) -> Batches:
    """The latents of the data set, and of those that are to be mixed in.

    Raises:
        ConfigError: they were not made alike.
    """
    from pipeline.latents.loading import LatentFolder, TrainingLatents
    from pipeline.training.mixture import Mixed, parse_mix

    parts: list[tuple[Batches, float]] = []
    for place, weight in [(dataset.root.path, 1.0), *parse_mix(config.mix)]:
        part = dataset if place == dataset.root.path else Dataset.open(place)
        part.require_success()
        ours, theirs = (latent_info(one, resolution_of(one, resolution)) for one in (dataset, part))
        if replace(ours, data="") != replace(theirs, data=""):
            raise ConfigError(f"mix={place}: {replace(theirs, data='')}, but {dataset.root.path}: {ours}")
        parts.append((TrainingLatents(LatentFolder(part.root.path), resolution), weight))
    return parts[0][0] if len(parts) == 1 else Mixed(parts, config.seed)


def resolution_of(dataset: Dataset, wanted: int) -> int:
    """The resolution whose latents are learned: as asked for, else the smallest there is.

    Raises:
        ConfigError: the dataset has no such latents.
    """
    there = sorted(int(name[len(_LATENTS) :]) for name in dataset.schema if name.startswith(_LATENTS))
    if not there:
        raise ConfigError(f"{dataset.root.path} holds no latents: run stage=precompute first")
    if wanted and wanted not in there:
        raise ConfigError(f"resolution={wanted}: {dataset.root.path} has {nearest(str(wanted), map(str, there))}")
    return wanted or there[0]


def latent_info(dataset: Dataset, resolution: int) -> Any:
    """What a checkpoint says of where its latents came from."""
    from pipeline.training.tasks.diffuse import LatentInfo

    extra = dataset.header["extra"]
    settings = dataset.header["config"]
    channels, *edges = extra["shapes"][f"{_LATENTS}{resolution}"]
    moments = extra.get("latent") == "moments"
    return LatentInfo(
        settings["vae"],
        settings["text_encoder"][0],
        resolution,
        (channels // 2 if moments else channels, *edges),
        tuple(extra["shapes"]["caption_latents"]),
        dataset.require_success()["content_digest"],
        moments,
    )


if __name__ == "__main__":
    main(config_for("train"))
