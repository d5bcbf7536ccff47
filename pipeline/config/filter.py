"""Options of stage=filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.decoding import DecodingConfig
from pipeline.config.options import both, groups_of, option, part_of
from pipeline.config.run import StageConfig, seed_option
from pipeline.config.sources import SEEDED, SourceConfig, SourceOptions
from pipeline.registry import Traits


@dataclass(frozen=True, kw_only=True)
class FilterConfig(SourceOptions, StageConfig, DecodingConfig):
    """stage=filter: convert every image to an upright RGB image of limited size, or record why it is left out."""

    traits: ClassVar = Traits(upstream=("download",), partitioned=True)
    inherited: ClassVar = dict.fromkeys(groups_of(SourceOptions), "fuse=true") | {
        "DecodingConfig": "workers!=0",
        "wait": "fuse=false",
    }

    fuse: bool = option(
        False,
        "read samples directly from their source; without stage=download and without storing raw data",
        identity=True,
    )

    keep_raw: bool = option(
        True,
        "false: once the result is verified, remove what stage=download has stored, except its ledgers",
        when="fuse=false",
    )
    min_image_size: int = option(256, "drop images whose shorter edge is below this", identity=True, ge=0)
    max_image_size: int = option(
        512,
        "reduce larger images to this size, as resize_mode says (0: keep sizes)",
        identity=True,
        ge=0,
        le=65535,
    )
    resize_mode: str = option(
        "keep_ratio",
        "keep_ratio: by the shorter edge; keep_ratio_largest: by the longer; center_crop, border: to squares; no",
        identity=True,
        choices=("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"),
    )
    max_image_area: int = option(0, "drop images with more pixels than this (0: no limit)", identity=True, ge=0)
    max_aspect_ratio: float = option(
        0.0,
        "drop images whose longer edge is more than this many times the shorter edge (0: no limit)",
        identity=True,
        ge=1,
        also=(0,),
    )
    encode_format: str = option(
        "jpg",
        "format of images that had to be changed; auto: png if the original is lossless, otherwise jpg",
        identity=True,
        choices=("jpg", "png", "webp", "auto"),
    )
    encode_quality: int = option(
        95,
        "JPEG and WebP quality of images that had to be changed",
        identity=True,
        ge=1,
        le=100,
        when="encode_format=jpg|webp|auto",
    )
    skip_reencode: bool = option(True, "keep the bytes of images that need no change", identity=True)
    validate: str = option(
        "full",
        "full: images that keep their bytes are decoded once to check them; header: only their headers are checked",
        identity=True,
        choices=("full", "header"),
        when="skip_reencode=true",
    )
    background: str = option("white", "colour behind transparent pixels and of borders: name or #rrggbb", identity=True)
    icc: str = option(
        "srgb",
        "srgb: convert colours from the embedded profile; ignore: ignore the profile",
        identity=True,
        choices=("srgb", "ignore"),
    )
    upscale: bool = option(
        False,
        "also enlarge smaller images to max_image_size (those below min_image_size are dropped first)",
        identity=True,
        when="resize_mode!=no and max_image_size",
    )
    interpolation: str = option(
        "bicubic",
        "interpolation when sizes change; area: averages over boxes",
        identity=True,
        choices=("bicubic", "lanczos", "bilinear", "area"),
        when="resize_mode!=no and max_image_size",
    )
    resize: str = option(
        "fast",
        "which implementation resizes; simd: pillow-simd, if it is installed instead of Pillow",
        identity=True,
        choices=("fast", "pillow", "simd"),
    )
    blur_column: str = option(
        "",
        "column with boxes to blur, such as faces: [[left, top, right, bottom], ...] as fractions of the image",
        identity=True,
    )
    max_pixels: int = option(
        100_000_000, "refuse images that claim more pixels than this, before decoding", identity=True, ge=1
    )
    max_frames: int = option(10_000, "refuse animations that claim more frames than this", identity=True, ge=1)
    max_caption_length: int = option(4096, "truncate captions to this many characters", identity=True, ge=1)
    min_caption_length: int = option(0, "leave out captions with fewer characters", identity=True, ge=0)
    caption_checks: tuple[str, ...] = option(
        (),
        "kinds of captions to leave out, as [empty,url,repetitive]; a sample without any other caption is dropped",
        identity=True,
        choices=("empty", "url", "repetitive"),
    )
    scores: tuple[str, ...] = option(
        (), "drop samples that do not meet these conditions on columns, as [nsfw<0.5,aesthetic>=5]", identity=True
    )
    keep_keys: str = option(
        "", "file of keys (text, table, parquet or .npy): drop all other samples", identity=True, path="file"
    )
    deny_keys: str = option(
        "", "file of keys (text, table, parquet or .npy): drop these samples", identity=True, path="file"
    )
    key_column: str = option(
        "",
        "the column or field that these files list, as uid or url (default: key)",
        identity=True,
        when="keep_keys or deny_keys",
    )
    workers: str = option(
        "auto",
        "processes that decode images, per rank (auto: one per CPU; 0: decode in the rank itself, unprotected)",
        choices=("auto",),
        ge=0,
        le=1024,
    )

    seed: int = seed_option(when=both("fuse=true", SEEDED))

    @property
    def upstreams(self) -> tuple[str, ...]:
        return () if self.fuse else self.traits.upstream

    def source_config(self) -> SourceConfig:
        """The config of the source that ``fuse=true`` reads, with ``copy`` set so that rows contain the image bytes."""
        return part_of(self, SourceConfig, copy=True)
