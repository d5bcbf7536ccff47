"""Options of stage=evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.decoding import DecodingConfig
from pipeline.config.options import NEVER, option
from pipeline.config.run import DeviceConfig, RunConfig
from pipeline.registry import Traits


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DeviceConfig, RunConfig, DecodingConfig):
    """stage=evaluate: evaluate a trained run; writes evaluation.json into its folder."""

    traits: ClassVar = Traits(single=True, gpus=True, reads_run=True)
    inherited: ClassVar = {"variant": NEVER, "DecodingConfig": "metric!=shapes"}

    checkpoint: str = option("", "run folder, or one checkpoint in it (default: the dataset's run)")
    name: str = option("", "name of the run folder, as in stage=train", when="!checkpoint")
    metric: str = option(
        "",
        "what to measure; shapes: whether images show what the prompt describes; fidelity: FID, KID, CLIP score; "
        "classes: of task=classify",
        choices=("", "shapes", "fidelity", "classes"),
    )
    split: str = option("test", "split of the dataset that metric=classes evaluates on")
    generated: str = option(
        "", "dataset directory with the images to evaluate (stage=generate output=...)", when="metric=fidelity"
    )
    reference: str = option("", "dataset directory with real images, for FID and KID", when="metric=fidelity")
    features: str = option(
        "",
        "TorchScript file that computes features, such as inception-2015-12-05.pt; pixels: average colours",
        when="metric=fidelity and reference",
        path="file",
        words=("pixels",),
    )
    clip: str = option("", "<model>:<weights> of open_clip, for the CLIP score", when="metric=fidelity")
    objects: int = option(1, "number of objects in the prompts, 1 or 2", ge=1, le=2, when="metric=shapes")
    size: tuple[int, ...] = option(
        (),
        "height and width of the images in pixels (default: the square that the run was trained on)",
        ge=1,
        le=65536,
        lengths=(0, 2),
        when="metric=shapes",
    )
    sampler: str = option(
        "euler", "sampler that turns noise into an image", choices=("euler", "heun", "dpm++"), when="metric=shapes"
    )
    steps: int = option(20, "number of steps of the sampler", ge=1, when="metric=shapes")
    guidance: float = option(1.5, "classifier-free guidance scale (1: none)", ge=0, when="metric=shapes")
    precision: str = option(
        "bfloat16",
        "precision of the network on a GPU (CPUs use float32)",
        choices=("float32", "bfloat16"),
        when="metric!=fidelity",
    )
    threads: int = option(0, "CPU threads (0: all cores)", ge=0, le=1024)
