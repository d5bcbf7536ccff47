"""stage=train: fit a model to a dataset directory; goes on from the newest checkpoint of its run folder."""

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
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.stage import input_folder, open_input, place_of
from pipeline.storage import Folder, StorageError
from pipeline.telemetry.events import Events

if TYPE_CHECKING:
    import torch

    from pipeline.training.tasks.base import Task

_MANY_TOKENS = 1024


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
    if rank.is_main:
        _warn_of_cost(task, config, rank)
    about = _about(config, dataset)
    training = Training(task, data, config, rank, run, valid, about)  # what refuses the command leaves the run as it is
    rank.now = {"of": config.steps}
    try:
        with Events(run, rank).around():
            state = training.run()
    except NotFinite as error:
        raise SystemExit(f"error: {error}") from None
    if rank.is_main:
        rank.log.info("%s: finished after %d steps", place, state.step)


def _warn_of_cost(task: Task, config: TrainConfig, rank: Rank) -> None:
    """Models of small images on large ones have very many tokens: seldom what was meant."""
    if config.task != "classify" or config.patch:
        return
    from pipeline.training.logs import forward_flops

    shape = task.model.config
    tokens = (shape.height // shape.patch) * (shape.width // shape.patch)  # type: ignore[union-attr, operator]
    if tokens > _MANY_TOKENS:
        rank.log.warning(
            "model=%s cuts images of %d px into patches of %s px: %d tokens, %.1f GFLOP for each image and step. "
            "patch=16 has %d tokens; resolution= takes smaller images",
            config.model,
            shape.width,  # type: ignore[union-attr]
            shape.patch,  # type: ignore[union-attr]
            tokens,
            3 * forward_flops(task.model, task.example()) / 1e9,
            (shape.height // 16) * (shape.width // 16),  # type: ignore[union-attr, operator]
        )


def _about(config: TrainConfig, dataset: Dataset | None) -> dict[str, Any]:
    """What the model card says of the data."""
    published: dict[str, Any] = {}
    with suppress(ConfigError):  # a data set that is only a name
        published = cli.dataset_settings(config.dataset).get("about") or {}
    about: dict[str, Any] = {name: str(published[name]) for name in ("title", "home", "terms") if name in published}
    digest = {"digest": dataset.require_success()["content_digest"]} if dataset else {}
    return {**about, "dataset": config.dataset, "split": config.split, **digest}


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
