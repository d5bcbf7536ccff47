"""Options of the tools around the main line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.decoding import DecodingConfig
from pipeline.config.options import Options, option
from pipeline.registry import Traits


@dataclass(frozen=True, kw_only=True)
class ToolConfig(Options):
    """Tools that work on one dataset directory: verify, repair, gc."""

    input: str = option(help="dataset directory (it holds plan/ and data/)")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(DecodingConfig):
    """stage=verify: check counts, files and hashes. Lists the problems, and exits with code 1 if there are any."""

    traits: ClassVar = Traits(single=True)
    inherited: ClassVar = {"DecodingConfig": "deep=true"}

    input: str = option("", "dataset directory (it holds plan/ and data/)")
    data_dir: str = option("", "instead of input: check everything below this folder")
    dataset: str = option("", "only <data_dir>/<dataset>", when="data_dir")
    deep: bool = option(
        False,
        "also read every row, decode every image and some latents, and compare with what the previous stage kept",
        when="!trace",
    )
    workers: int = option(
        0,
        "processes that check partitions (0: one for each CPU that this process may use)",
        ge=0,
        le=1024,
        when="!trace",
    )
    json: bool = option(False, "print the findings as JSON")
    trace: str = option(
        "", "do not check; print the path of the sample with this key through all stages below data_dir"
    )
    show: str = option("", "write an image of the sample at each stage to this .png", when="trace")


@dataclass(frozen=True, kw_only=True)
class RepairConfig(ToolConfig, DecodingConfig):
    """stage=repair: verify, then rebuild only the damaged partitions."""

    traits: ClassVar = Traits(single=True)
    inherited: ClassVar = {"DecodingConfig": "deep=true"}

    deep: bool = option(False, "also find damage that needs verify deep=true")
    workers: int = option(
        0, "processes that check partitions (0: one for each CPU that this process may use)", ge=0, le=1024
    )


@dataclass(frozen=True, kw_only=True)
class CompactConfig(ToolConfig):
    """stage=compact: pack the ledgers and records of finished partitions into a few files, to save inodes."""

    input: str = option(help="dataset directory, or a folder above several; unfinished ones are not changed")
    rank_offset: int = option(0, "array jobs: added to the rank of this job's first task", ge=0)
    world_size: int = option(0, "array jobs: ranks of all elements together", ge=0)


@dataclass(frozen=True, kw_only=True)
class TakedownConfig(Options):
    """stage=takedown: permanently remove samples from all finished dataset directories in a folder."""

    traits: ClassVar = Traits(single=True)

    takedown: str = option(
        help="text file with a sample per line: its key, file name, URL, or source file's hash (32 hex digits)",
        path="file",
    )
    data_dir: str = option(help="data_dir, or any folder below it")
    dataset: str = option("", "only <data_dir>/<dataset>")
    count_only: bool = option(False, "only print what would be removed")


@dataclass(frozen=True, kw_only=True)
class GcConfig(ToolConfig):
    """stage=gc: delete the leftovers of crashed attempts and replaced partitions."""

    traits: ClassVar = Traits(single=True)

    older_than: float = option(86400.0, "keep attempts that changed within this many seconds", ge=0)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """stage=report: write a self-contained page about everything in a data directory."""

    traits: ClassVar = Traits(single=True)

    data_dir: str = option(help="folder to describe: data_dir, or any folder below it")
    dataset: str = option("", "describe only <data_dir>/<dataset>")
    output: str = option("", "file to write (default: report.html in the described folder)")
    samples: int = option(24, "images on each contact sheet", ge=0, le=1000)
    gpu_hour_price: float = option(0.0, "price of a GPU hour: the report then shows the cost of training runs", ge=0)


@dataclass(frozen=True, kw_only=True)
class CostConfig(Options):
    """stage=cost: estimate steps, tokens, memory, GPU hours and the price of training with a recipe."""

    traits: ClassVar = Traits(single=True)

    recipe: str = option("microdit", "a name in pipeline/conf/recipe, or your own YAML")
    phase: str = option("", "only this phase")
    channels: int = option(4, "channels of the image latents", ge=1)
    downsample: int = option(8, "pixels per latent", ge=1)
    caption_shape: tuple[int, ...] = option((77, 1024), "length and width of the text states", ge=1, lengths=(2,))
    gpu: str = option("h100", "kind of GPU, which determines its peak", choices=("a100", "h100", "h200", "b200"))
    gpus: int = option(8, "number of GPUs", ge=1)
    mfu: float = option(
        0.2,
        "fraction of the GPUs' bfloat16 peak that training is assumed to reach, if nothing was measured",
        gt=0,
        le=1,
        when="!images_per_second",
    )
    images_per_second: tuple[float, ...] = option(
        (), "measured training speed of one GPU in each phase, instead of mfu", gt=0
    )
    gpu_hour_price: float = option(3.79, "price of a GPU hour", gt=0)


@dataclass(frozen=True, kw_only=True)
class FeideggerConfig(Options):
    """stage=feidegger: write FEIDEGGER's images and German captions into one file, for a sequence model."""

    traits: ClassVar = Traits(single=True)

    data_path: str = option(
        "https://raw.githubusercontent.com/zalandoresearch/feidegger/master/data/FEIDEGGER_release_1.1.json",
        "the release's JSON: URL or file",
        path="file",
    )
    output_dir: str = option(help="folder for the result and the downloaded files")
    image_size: tuple[int, ...] = option((224, 224), "height and width", ge=1, le=65535, lengths=(2,))
    max_length: int = option(128, "tokens of a caption", ge=4)
    batch_size: int = option(64, "images in memory at a time", ge=1)
    num_workers: int = option(2, "processes that decode images", ge=0, le=1024)
    language_model: str = option("bpe", "tokenizer: bpe (learned from the captions), or a pretrained one")
    seed: int = option(0, "seed of the split", ge=0)
    valid_fraction: float = option(0.1, "share of the images that are the val split", ge=0, lt=1)
    test_fraction: float = option(0.1, "share of the images that are the test split", ge=0, lt=1)
    max_failed_fraction: float = option(0.1, "stop if more than this share of the images cannot be loaded", ge=0, le=1)
    allow_private_hosts: bool = option(False, "allow addresses that are not globally routable")


@dataclass(frozen=True, kw_only=True)
class PublishConfig(ToolConfig):
    """stage=publish: copy a finished dataset directory to an object store, completely or not at all."""

    input: str = option(help="finished dataset directory to publish")
    to: str = option(
        help="destination: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or hf://datasets/owner/name"
    )
    overwrite: bool = option(False, "replace another dataset at the destination")
    delete: bool = option(False, "afterwards delete all objects at the destination that do not belong to the dataset")
    count_only: bool = option(False, "upload nothing; only print the number of files, bytes and requests")
    request_price: float = option(
        0.0, "price of 1,000 requests that write; their cost is then printed", ge=0, when="count_only=true"
    )
    storage_price: float = option(
        0.0, "price of a gigabyte stored for a month; the cost is then printed", ge=0, when="count_only=true"
    )
    connections: int = option(8, "concurrent uploads per rank", ge=1, le=256)
    lease: float = option(60.0, "seconds without a heartbeat after which another rank takes over", gt=0)
    rank_offset: int = option(0, "array jobs: added to the rank of this job's first task", ge=0)
    world_size: int = option(0, "array jobs: ranks of all elements together", ge=0)
