"""Options of stage=caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.decoding import DecodingConfig
from pipeline.config.options import option
from pipeline.config.run import DeviceConfig, StageConfig
from pipeline.registry import Traits


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(DeviceConfig, StageConfig, DecodingConfig):
    """stage=caption: describe images with a trained run: those at image_path=, or those of a dataset."""

    traits: ClassVar = Traits(upstream=("shard",), partitioned=True, gpus=True)
    inherited: ClassVar = {"StageConfig": "!image_path"}

    checkpoint: str = option("", "run folder, checkpoint, or export folder (default: the dataset's run)", identity=True)
    name: str = option("", "name of the run folder, as in stage=train", when="!checkpoint")
    image_path: str = option("", "image, folder of images, URL of an image, or dataset directory")
    split_file: str = option("", "only the images that this file assigns to split=", when="image_path", path="file")
    question: str = option(
        "",
        "the question to answer, for runs with prompt=question (default: the questions of the dataset)",
        identity=True,
    )
    beams: int = option(1, "width of the beam search; 1 is greedy", identity=True, ge=1)
    length_penalty: float = option(
        1.0, "rank beams by log probability / length ** length_penalty", identity=True, ge=0, when="beams!=1"
    )
    top_p: float = option(
        0.0,
        "sample from the most probable tokens whose probabilities add up to this (0: no sampling)",
        identity=True,
        ge=0,
        le=1,
    )
    temperature: float = option(1.0, "sampling temperature", identity=True, gt=0, when="top_p")
    min_length: int = option(1, "minimum number of tokens of a text", identity=True, ge=0)
    max_length: int = option(0, "maximum number of tokens of a text (0: as in training)", identity=True, ge=0)
    precision: str = option(
        "bfloat16",
        "precision of the network on a GPU (CPUs use float32)",
        identity=True,
        choices=("float32", "bfloat16"),
    )
    batch_size: int = option(32, "images per forward pass", identity=True, ge=1)
    tokenization: str = option(
        "words",
        "tokenization for scoring; words: any language; ptb: English, as for published scores (needs Java)",
        choices=("words", "ptb"),
        when="image_path",
    )
    workers: int = option(
        -1,
        "decoding processes per rank (-1: one without a GPU, else its CPUs but one; 0: none, unprotected)",
        ge=-1,
        le=1024,
        when="!image_path",
    )
    column: str = option("generated", "column that holds the new captions", identity=True, when="!image_path")
    shard_bytes: int = option(
        2**26, "largest size of one data file", identity=True, ge=1, le=2**32 - 1, when="!image_path"
    )
    threads: int = option(1, "CPU threads per rank", ge=1, le=1024)

    @property
    def upstreams(self) -> tuple[str, ...]:
        return () if self.image_path else self.traits.upstream
