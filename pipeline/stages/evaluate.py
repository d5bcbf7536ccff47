"""stage=evaluate: evaluate a trained run, with results that the report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.schema import ConfigError, EvaluateConfig
from pipeline.distributed import Rank
from pipeline.imaging.decoder import ImageDecoder
from pipeline.imaging.worker_pool import WorkerLimits
from pipeline.metrics.scene_accuracy import judge, matches
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.randomness import Permutation
from pipeline.registry import stages
from pipeline.sources.shapes_scene import caption, fixed_prompts, render, sample_scene, unseen_prompts
from pipeline.stages.generate import run_of, set_threads
from pipeline.storage import Folder

if TYPE_CHECKING:
    from pipeline.stages.generate import Painter

_RENDERS = 500
_PROMPTS = 32
_SHUFFLES = 8
Draw = Callable[[list[str], int], npt.NDArray[Any]]
"""(prompts, seed) → images, uint8 (n, h, w, 3)."""


@stages.register("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    with errors_as_one_line():
        run = run_of(config)
        set_threads(config.threads)
        metric = config.metric or metric_of(config.checkpoint or run)
        result = _METRICS[metric](config, run)
        with Folder.open(run) as folder:
            folder.write_json("fidelity.json" if metric == "fidelity" else "evaluation.json", result)
    for score in result["scores"]:
        print(f"{score['name']}: {score['right']} of {score['of']}")
    for name, value in result.get("values", {}).items():
        print(f"{name}: {value:.4g}")
    for key, reason in result.get("failed", {}).items():
        print(f"left out: {key}: {reason}")


def metric_of(checkpoint: str | Path) -> str:
    """The default metric for a run's task.

    Raises:
        ConfigError: the task has no default metric.
    """
    from pipeline.training.checkpoint import open_checkpoint

    if open_checkpoint(checkpoint, parts=("none",)).facts["task"] != "classify":
        raise ConfigError(f"metric=...: what to measure; known: {', '.join(_METRICS)}")
    return "classes"


def _evaluate_classes(config: EvaluateConfig, run: Path) -> dict[str, Any]:
    from pipeline.stages.evaluate_classes import evaluate_classes

    return evaluate_classes(config, run)


def evaluate_shapes(config: EvaluateConfig, run: Path) -> dict[str, Any]:
    """Evaluate images of fixed prompts and of combinations held out from training; also how reliable the judge is."""
    from pipeline.stages.generate import Manner, load_painter, sample_images

    painter = load_painter(config.checkpoint or run, Rank(device=config.device).device, precision=config.precision)

    downsample, model = painter.autoencoder.downsample, painter.model.config
    height, width = config.size or (model.height * downsample, model.width * downsample)

    def draw(prompts: list[str], seed: int) -> npt.NDArray[Any]:
        return sample_images(painter, prompts, seed, Manner.of(config), (height, width))

    prompts = fixed_prompts(_PROMPTS, config.objects)
    images = draw(prompts, config.seed)
    held_out = unseen_prompts(config.objects)
    right = [matches(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    held_out_images = draw(held_out, config.seed + 1)
    unseen = [matches(image, prompt) for image, prompt in zip(held_out_images, held_out, strict=True)]
    chance = [matches(p, c) for order in _shuffled(prompts) for p, c in zip(images, order, strict=True)]
    one = config.objects == 1
    scores = [_score("prompts: colour and shape" if one else "prompts: both colours, both shapes, relation", right)]
    if one:
        sizes = [matches(image, prompt, size=True) for image, prompt in zip(images, prompts, strict=True)]
        scores.append(_score("prompts: size as well", sizes))
    scores += [
        _score("combinations never trained on", unseen),
        _score(f"judge: prompts shuffled (chance is 1 in {15 if one else 420})", chance),
        *judge_scores(painter, (height, width), config.objects),
    ]
    wrong = [
        {"prompt": prompt, "judged": str(judge(image))}
        for image, prompt, good in zip(images, prompts, right, strict=True)
        if not good
    ]
    about = {"metric": "shapes", "step": painter.step, "seed": config.seed, "size": [height, width]}
    return {**about, "scores": scores, "wrong": wrong}


def evaluate_fidelity(config: EvaluateConfig, run: Path) -> dict[str, Any]:
    """FID and KID between two dataset directories of images, and the CLIP score of the generated images."""
    from pipeline.metrics.fidelity import clip_score, distances

    if not config.generated:
        raise ConfigError(
            "generated=: the dataset directory of images to evaluate; stage=generate output=... makes one"
        )
    drawn = _images_of(config.generated)
    device = Rank(device=config.device).device
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    with closing(ImageDecoder(WorkerLimits.of(config))) as decoder:
        if config.reference:
            real = _images_of(config.reference)
            values |= distances(
                real, drawn, config.features, config.seed, decoder=decoder, failed=failed, device=device
            )
        if config.clip:
            values["clip_score"] = clip_score(drawn, config.clip, decoder=decoder, failed=failed, device=device)
    if not values:
        raise ConfigError("metric=fidelity needs reference= (for FID and KID), clip= (for the CLIP score), or both")
    names = {"generated": config.generated, "reference": config.reference, "features": config.features}
    return {
        "metric": "fidelity",
        "images": len(drawn),
        **names,
        "clip": config.clip,
        "scores": [],
        "values": values,
        "failed": failed,
    }


def _images_of(place: str) -> RandomAccess:
    dataset = Dataset.open(place)
    dataset.require_success()
    dataset.require_columns("jpg", "caption")
    return RandomAccess(dataset)


_METRICS: dict[str, Callable[[EvaluateConfig, Path], dict[str, Any]]] = {
    "shapes": evaluate_shapes,
    "fidelity": evaluate_fidelity,
    "classes": _evaluate_classes,
}


def judge_scores(painter: Painter, size: tuple[int, int], objects: int = 1) -> list[dict[str, Any]]:
    """How reliable the judge is: its scores on real renders of this ``size``, and on renders reconstructed by the
    autoencoder."""
    import torch

    from pipeline.encoders.base import to_pixels

    scenes = [sample_scene(-1, index, objects, holdout=False) for index in range(_RENDERS)]
    renders = [render(scene, size) for scene in scenes]
    some = renders[:_PROMPTS]
    with torch.inference_mode():
        vae = painter.autoencoder
        pixels = torch.from_numpy(np.stack(some)).to(vae.device)
        decoded = to_pixels(vae.decode(vae.encode(vae.preprocessing.normalise(pixels))))
    captions = [caption(scene) for scene in scenes]
    sharp = [matches(image, text, size=objects == 1) for image, text in zip(renders, captions, strict=True)]
    soft = [matches(image, text) for image, text in zip(decoded, captions[:_PROMPTS], strict=True)]
    return [_score("judge: real renders", sharp), _score("judge: decoded latents of real renders", soft)]


def _shuffled(prompts: list[str]) -> Iterator[list[str]]:
    """The prompts in random orders, to estimate chance level: one of 15 colour and shape pairs is right by chance."""
    for seed in range(_SHUFFLES):
        yield [prompts[place] for place in Permutation(len(prompts), seed)]


def _score(name: str, right: list[bool]) -> dict[str, Any]:
    return {"name": name, "right": sum(right), "of": len(right)}


if __name__ == "__main__":
    main(config_for("evaluate"))
