"""Options of stage=generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.options import NEVER, option
from pipeline.config.run import DeviceConfig, StageConfig
from pipeline.registry import Traits


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DeviceConfig, StageConfig):
    """stage=generate: generate images for prompts with a trained run; with output=, many images on several ranks."""

    traits: ClassVar = Traits(single=True, partitioned_with="output", gpus=True, reads_run=True)
    inherited: ClassVar = {"StageConfig": "output", "variant": NEVER}

    checkpoint: str = option("", "run folder, or one checkpoint in it (default: the dataset's run)")
    name: str = option("", "name of the run folder, as in stage=train", when="!checkpoint")
    prompts: tuple[str, ...] = option(
        (), "captions to generate images from, or the path of a text file with one prompt per line", identity=True
    )
    images_per_prompt: int = option(1, "number of images for each prompt, from different noise", identity=True, ge=1)
    seeds: tuple[int, ...] = option(
        (),
        "one image of each prompt from each of these, the same whatever else is drawn; instead of seed= and "
        "images_per_prompt=",
        identity=True,
        ge=0,
    )
    size: tuple[int, ...] = option(
        (),
        "height and width of the images in pixels (default: the square that the run was trained on)",
        identity=True,
        ge=1,
        le=65536,
        lengths=(0, 2),
    )
    sizes: tuple[str, ...] = option(
        (), "the same for each prompt, as 832x1216 (height x width), in place of size=", identity=True, when="!size"
    )
    vae: str = option(
        "",
        "decode with this autoencoder, which must have compatible latents, instead of the one used in training",
        identity=True,
    )
    sampler: str = option(
        "euler", "sampler that turns noise into an image", identity=True, choices=("euler", "heun", "dpm++")
    )
    steps: int = option(20, "number of steps of the sampler", identity=True, ge=1)
    guidance: float = option(1.5, "classifier-free guidance scale (1: none)", identity=True, ge=0)
    precision: str = option(
        "bfloat16",
        "precision of the network on a GPU (CPUs use float32)",
        identity=True,
        choices=("float32", "bfloat16"),
    )
    batch_size: int = option(32, "images generated at a time", identity=True, ge=1, when="output")
    partition_size: int = option(256, "images in a partition", identity=True, ge=1, when="output")
    threads: int = option(
        0, "CPU threads (0: all cores; with output= results depend on it in the last bit)", ge=0, le=1024
    )
