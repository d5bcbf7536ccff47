"""Latents for task=diffuse, from stage=precompute or from a folder written by another program."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.options import nearest
from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.loading import Batches
from pipeline.loading.latent_folder import IMAGE, Expected, LatentFolder
from pipeline.loading.latents import TrainingLatents, caption_weights_for, open_latents
from pipeline.partitions.dataset import Dataset
from pipeline.storage import digest
from pipeline.stores import canonical, is_url
from pipeline.training.mixture import Mixed, parse_caption_weights, parse_mix

_OF_OTHERS = ("vae", "text_encoder", "caption_shape", "latent_shape", "latent_dtype")
"""Settings for what only a manifest would say."""


@dataclass(frozen=True)
class LatentInfo:
    """How latents were made, as needed to encode prompts and to decode new latents.

    Attributes:
        data: content digest of the dataset that they were read from.
        moments: whether means and deviations, (2c, h, w), are stored; ``image_shape`` is that of a sample.
        buckets: their description in the manifest; ``image_shape`` is then that of a square whose area no bucket
            exceeds.
    """

    autoencoder: str
    text_encoder: str
    resolution: int
    image_shape: tuple[int, int, int]
    caption_shape: tuple[int, int]
    data: str = ""
    moments: bool = False
    buckets: dict[str, Any] | None = None


def is_foreign(place: Path) -> bool:
    """Whether ``place`` is an MDS folder that was not written by a stage."""
    return not (place / "plan").is_dir() and (place / "index.json").is_file()


@dataclass(frozen=True)
class StoredLatents:
    """A folder of latents, and how they were made.

    Attributes:
        vae, text_encoder: as for stage=precompute; empty if unknown.
        data: digest of the content.
    """

    folder: LatentFolder
    vae: str
    text_encoder: str
    data: str

    @classmethod
    def opened(cls, place: Path, config: TrainConfig) -> StoredLatents:
        """Open the latents at ``place``.

        Raises:
            ConfigError: there are none, they are not finished, or the settings do not match.
        """
        if is_foreign(place):
            expected = Expected(tuple(config.caption_shape), tuple(config.latent_shape), config.latent_dtype)
            if config.show and not config.vae:
                raise ConfigError(
                    f"show={config.show}: {place} does not name the autoencoder of its latents: give vae="
                )
            folder = LatentFolder(place, expected)
            return cls(folder, config.vae, config.text_encoder, digest((place / "index.json").read_bytes()))
        dataset = Dataset.open(place)
        made_with = {
            **dataset.header["config"],
            "text_encoder": [*dataset.header["config"].get("text_encoder", ()), ""][0],
        }
        for name in _OF_OTHERS:  # accepted if equal, as one command may run both stages
            if getattr(config, name) and getattr(config, name) != made_with.get(name):
                raise ConfigError(f"{name}= is for latents without a manifest, but {place} has one: leave it out")
        content = dataset.require_success()["content_digest"]
        if not any(name.startswith(IMAGE) for name in dataset.schema):
            raise ConfigError(f"{place} holds no latents: run stage=precompute first")
        settings = dataset.header["config"]
        far = canonical(place) if is_url(place) else place
        folder = open_latents(far, None, config.cache, config.cache_limit)
        return cls(folder, settings["vae"], settings["text_encoder"][0], content)

    @property
    def resolutions(self) -> list[int]:
        names = (name[len(IMAGE) :] for name in self.folder.layout.shapes if name.startswith(IMAGE))
        return sorted(int(name) for name in names if name.isdigit())

    def resolution(self, wanted: int) -> int:
        """The resolution to train on: as requested, else the smallest.

        Raises:
            ConfigError: there are no such latents.
        """
        there = self.resolutions
        if not there:
            raise ConfigError(f"{self.folder.name} holds no latents: run stage=precompute first")
        if wanted and wanted not in there:
            raise ConfigError(f"resolution={wanted}: {self.folder.name} has {nearest(str(wanted), map(str, there))}")
        return wanted or there[0]

    def info(self, resolution: int) -> LatentInfo:
        """How the latents were made, for checkpoints."""
        layout, column = self.folder.layout, f"{IMAGE}{resolution}"
        length, width = layout.shapes["caption_latents"]
        return LatentInfo(
            self.vae,
            self.text_encoder,
            resolution,
            layout.image_shape(column),
            (length, width),
            self.data,
            layout.latent == "moments",
            layout.buckets[column].describe() if column in layout.buckets else None,
        )


def latents_of(config: TrainConfig, place: Path) -> tuple[Batches, LatentInfo]:
    """The latents at ``place`` mixed with those of ``mix=``, and how the first ones were made.

    Raises:
        ConfigError: they were not made in the same way.
    """
    first = StoredLatents.opened(place, config)
    _check_cache(first.folder, config)
    resolution = first.resolution(config.resolution)
    info = first.info(resolution)
    parts = [(first.folder, 1.0)]
    for other, weight in parse_mix(config.mix):
        part = StoredLatents.opened(other, config)
        _check_cache(part.folder, config)
        theirs = part.info(part.resolution(resolution))
        if replace(info, data="") != replace(theirs, data=""):
            raise ConfigError(f"mix={other}: {replace(theirs, data='')}, but {place}: {info}")
        parts.append((part.folder, weight))
    weights = caption_weights_for(parse_caption_weights(config.caption_weights), [folder for folder, _ in parts])
    how = (resolution, "draw" if config.draw_captions else "first", weights, config.seed)
    data: list[tuple[Batches, float]] = [(TrainingLatents(folder, *how), weight) for folder, weight in parts]
    return (data[0][0] if len(data) == 1 else Mixed(data, config.seed)), info


def _check_cache(folder: LatentFolder, config: TrainConfig) -> None:
    """Raises ConfigError if samples are read from all over a remote folder that the cache cannot hold."""
    from pipeline.loading.streaming import RemoteFolder

    if isinstance(folder, RemoteFolder) and (config.mix or config.valid_fraction):
        folder.check_cache(len(folder.starts) - 1)
