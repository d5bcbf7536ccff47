"""The latents for task=diffuse, from stage=precompute or from a folder written by another program."""

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
"""Settings that say what a folder without a manifest does not."""


@dataclass(frozen=True)
class LatentInfo:
    """Where latents come from: what it takes to make new ones of prompts and images of them.

    ``data``: content digest of the dataset that they were read from. ``moments``: what is stored are means and
    deviations, (2c, h, w); ``image_shape`` is that of a sample. ``buckets``: what the manifest says of them; then
    ``image_shape`` is that of the square whose pixels no bucket exceeds.
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
    """Whether ``place`` is a folder of MDS that no stage has made."""
    return not (place / "plan").is_dir() and (place / "index.json").is_file()


@dataclass(frozen=True)
class StoredLatents:
    """A folder of latents, and what made them.

    Attributes:
        vae, text_encoder: as stage=precompute takes them; empty where nobody has said it.
        data: digest of the content.
    """

    folder: LatentFolder
    vae: str
    text_encoder: str
    data: str

    @classmethod
    def opened(cls, place: Path, config: TrainConfig) -> StoredLatents:
        """The latents at ``place``.

        Raises:
            ConfigError: there are none, they are not finished, or the settings do not fit them.
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
        for name in _OF_OTHERS:  # one command for both stages gives them to both
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
        """The resolution whose latents are learned: as asked for, else the smallest there is.

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
        """What a checkpoint says of where its latents came from."""
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
    """The latents at ``place``, and of the folders that are to be mixed in; what is known of the first.

    Raises:
        ConfigError: they were not made alike.
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
    """Raises ConfigError where samples are taken from all over a folder elsewhere that the cache cannot hold."""
    from pipeline.loading.streaming import RemoteFolder

    if isinstance(folder, RemoteFolder) and (config.mix or config.valid_fraction):
        folder.check_cache(len(folder.starts) - 1)
