"""Options of stage=shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.options import option
from pipeline.config.run import StageConfig, seed_option
from pipeline.registry import Traits, formats

FORMATS = ("mds", "tar", "parquet", "ipc", "memmap", "hdf5")
"""Storage formats that stage=shard writes."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig(StageConfig):
    """stage=shard: cut the kept samples, or a folder of images, into even partitions of a storage format."""

    traits: ClassVar = Traits(upstream=("recaption", "dedup-semantic", "select", "dedup", "filter"), partitioned=True)

    format: str = option("mds", "storage format", identity=True, choices=FORMATS, names=formats)
    shuffle: bool = option(False, "shuffle the whole dataset by a permutation keyed by the seed", identity=True)
    partition_size: int = option(0, "samples per partition (0: a 32nd of the data, 32 to 256 MiB)", identity=True, ge=0)
    shard_bytes: int = option(
        2**26,
        "largest size of one data file (tar: one file for each partition)",
        identity=True,
        ge=1,
        le=2**32 - 1,
        when="format!=tar",
    )
    shape: tuple[int, ...] = option(
        (),
        "resize images to [height,width]; masks by nearest neighbor",
        identity=True,
        ge=1,
        le=65535,
        lengths=(0, 2),
    )
    im_mode: str = option(
        "",
        "convert images to this mode: RGB, L, RGBA, LA or I;16",
        identity=True,
        choices=("", "RGB", "L", "RGBA", "LA", "I;16"),
    )
    encode: str = option(
        "",
        "re-encode images in this format (empty: keep their bytes)",
        identity=True,
        choices=("", "png", "jpeg", "webp"),
    )
    quality: int = option(95, "quality of re-encoded images", identity=True, ge=1, le=100, when="encode=jpeg|webp")
    compression: str = option("", "compress each image", identity=True, choices=("", "gzip"), when="format=hdf5")
    captions: str = option(
        "none",
        "folders of images: auto, txt, folder, none, or a captions .json/.jsonl/.csv file",
        identity=True,
        path="file",
        words=("auto", "txt", "folder", "none"),
    )
    labels: str = option(
        "",
        "folders of images: file of image names and classes, if there are no class folders",
        identity=True,
        path="file",
    )
    seed: int = seed_option(when="shuffle")
    classes: str = option(
        "",
        "folders of images: class names in order: a converted dataset, a folder, a .json or .txt",
        identity=True,
        path="file or folder",
    )

    @property
    def default_variant(self) -> str:
        return self.format
