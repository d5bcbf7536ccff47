"""stage=evaluate for classifiers: metrics as JSON, plots as PNG, and a page with the worst mistakes."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Environment, PackageLoader

from pipeline.config.schema import ConfigError, EvaluateConfig, StageConfig, dataset_name, stage_folder
from pipeline.distributed import Rank
from pipeline.encoders.base import sent
from pipeline.imaging.decoder import ImageDecoder
from pipeline.imaging.worker_pool import WorkerLimits
from pipeline.metrics.classes import scores
from pipeline.metrics.confusion import confused_pairs, confusion_svg
from pipeline.models.vision_mamba import VisionMamba, VisionMambaConfig
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.stage import open_input
from pipeline.stages.generate import set_precision
from pipeline.stages.report import embed
from pipeline.storage import Folder
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.images import ImageDataset
from pipeline.training.loggers import read_log
from pipeline.training.parallel import autocast
from pipeline.training.tasks.classify import normalised

_BATCH = 256
_SHOWN = 24  # mistakes, and the same number of other samples
_INK, _WARM = "#3b6ea5", "#c8553d"


@dataclass(frozen=True)
class Classifier:
    """A trained model, ready for uint8 images (b, 3, size, size)."""

    model: VisionMamba
    names: list[str]
    mean: list[float]
    std: list[float]
    size: int
    margin: float
    """Images are resized to ``margin * size`` and center-cropped to ``size``."""
    step: int
    precision: str = "float32"

    @torch.inference_mode()
    def probabilities(self, images: torch.Tensor) -> npt.NDArray[Any]:
        """Class probabilities, float32 (b, classes)."""
        device = next(self.model.parameters()).device
        with autocast(self.precision, device):
            logits = self.model(normalised(sent(images, device), self.mean, self.std))
        found: npt.NDArray[Any] = logits.float().softmax(1).cpu().numpy()
        return found


def load_classifier(
    checkpoint: str | Path, device: str | torch.device = "cpu", precision: str = "float32"
) -> Classifier:
    """Load the EMA weights of ``checkpoint``; for a run's folder, of its best checkpoint.

    Raises:
        ConfigError: there is no checkpoint, or it is of another task.
    """
    found = open_checkpoint(checkpoint, "best", parts=("ema",))
    if found.facts["task"] != "classify":
        raise ConfigError(f"checkpoint={checkpoint}: its task is {found.facts['task']}, expected classify")
    model = VisionMamba(VisionMambaConfig(**{**found.facts["model"], "scan_backend": "auto"}))
    model.load_state_dict(found.tensors["ema"])
    how = found.facts["preprocessing"]
    return Classifier(
        model.to(device).eval(),
        list(found.facts["classes"]),
        how["mean"],
        how["std"],
        how["size"],
        how["edge"] / how["size"],
        found.step,
        set_precision(precision, device),
    )


def evaluate_classes(config: EvaluateConfig, run: Path) -> dict[str, Any]:
    """Evaluate a run on the test set (``input=``, else split=test of the dataset); write the page to ``output=``, else
    to the run's ``evaluation/``."""
    classifier = load_classifier(config.checkpoint or run, Rank(device=config.device).device, config.precision)
    dataset = test_set(config)
    dataset.require_columns("jpg", "label")
    with closing(ImageDecoder(WorkerLimits.of(config))) as decoder:
        data = ImageDataset(RandomAccess(dataset), classifier.size, classifier.margin, decoder)
        return _evaluated(classifier, data, dataset, Path(config.output) if config.output else run / "evaluation", run)


def _evaluated(classifier: Classifier, data: ImageDataset, dataset: Dataset, output: Path, run: Path) -> dict[str, Any]:
    parts = [data.batch(np.arange(i, min(i + _BATCH, len(data)))) for i in range(0, len(data), _BATCH)]
    probabilities = np.concatenate([classifier.probabilities(part["images"]) for part in parts])
    labels = np.concatenate([part["labels"].numpy() for part in parts])
    judged = np.flatnonzero(labels >= 0)  # images that cannot be decoded have label -1: they are excluded and reported
    if not len(judged) or len(judged) + len(data.failed) != len(labels):
        raise ConfigError(f"input={dataset.root.path}: has no images that can be decoded, or labels below 0")
    probabilities, labels = probabilities[judged], labels[judged]
    if labels.max() >= len(classifier.names):
        raise ConfigError(
            f"input={dataset.root.path}: has label {labels.max()}, but the model knows {len(classifier.names)} classes"
        )
    result = {
        "metric": "classes",
        "step": classifier.step,
        "data": str(dataset.root.path),
        "names": classifier.names,
        "failed": data.failed,
        **scores(probabilities, labels),
    }
    with Folder.open(output, create=True) as folder:
        _write(folder, result, probabilities, labels, data, judged, read_log(run))
    right = round(result["accuracy"] * len(labels))
    return {**result, "scores": [{"name": "test images: class", "right": right, "of": len(labels)}], "wrong": []}


def test_set(config: EvaluateConfig) -> Dataset:
    """The dataset at ``input=``, else the shards of ``split`` of the dataset."""
    if config.input:
        return open_input(config, "precompute")
    if not config.data_dir or not config.dataset:
        raise ConfigError("input=...: the dataset directory to evaluate the model on")
    split = config.split
    place = StageConfig(dataset=dataset_name(config.dataset), data_dir=config.data_dir, split=split)
    if not stage_folder(place, "shard").parent.is_dir():
        raise ConfigError(f"split={split}: {stage_folder(place, 'shard').parent} is not there; input= names a test set")
    return open_input(place, "precompute")


def _write(
    folder: Folder,
    result: dict[str, Any],
    probabilities: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    data: ImageDataset,
    judged: npt.NDArray[Any],
    log: list[dict[str, Any]],
) -> None:
    names = result["names"]
    confusion = np.array(result["confusion"])
    plots = {
        "confusion_matrix.png": _matrix(confusion, names, "samples"),
        "confusion_matrix_normalised.png": _matrix(
            confusion / np.maximum(confusion.sum(1, keepdims=True), 1), names, "share of the class"
        ),
        "calibration.png": _calibration(result),
        "training_curves.png": _curves(log),
    }
    for name, image in plots.items():
        folder.write_atomic(name, image)
    folder.write_json("evaluation.json", result)
    predicted = probabilities.argmax(1)
    own = probabilities[np.arange(len(labels)), labels]
    mistakes = [int(i) for i in np.argsort(own) if predicted[i] != labels[i]][:_SHOWN]
    spread = [int(i) for i in np.linspace(0, len(labels) - 1, min(len(labels), _SHOWN))]

    def shown(positions: list[int]) -> list[dict[str, Any]]:
        if not positions:
            return []
        images = data.batch(judged[positions])["images"].numpy()
        return [
            {
                "image": embed(image.transpose(1, 2, 0)),
                "label": names[labels[i]],
                "predicted": names[predicted[i]],
                "right": bool(labels[i] == predicted[i]),
                "confidence": float(probabilities[i, predicted[i]]),
            }
            for i, image in zip(positions, images, strict=True)
        ]

    environment = Environment(loader=PackageLoader("pipeline.stages", "templates"), autoescape=True)
    classes = list(zip(names, result["classes"], strict=True))
    matrix, left_out = confusion_svg(confusion, names)
    page = environment.get_template("evaluation.html").render(
        result=result,
        weak=sorted((c for c in classes if c[1]["support"] and c[1]["recall"] < 1), key=lambda c: c[1]["recall"])[:8],
        pairs=confused_pairs(confusion, names),
        confusion=matrix,
        confusion_left_out=left_out,
        classes=classes,
        plots=list(plots),
        mistakes=shown(mistakes),
        samples=shown(spread),
    )
    folder.write_atomic("evaluation.html", page.encode())


# ---- plots


def _axes(width: float = 5.0, height: float = 4.0) -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return file.getvalue()


def _matrix(values: npt.NDArray[Any], names: list[str], label: str) -> bytes:
    size = min(16.0, 3 + 0.35 * len(names))
    figure, axes = _axes(size + 1, size)
    image = axes.imshow(values, cmap="Blues")
    figure.colorbar(image, label=label)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in np.argwhere(values > 0):
            value = values[row, column]
            colour = "white" if value > values.max() / 2 else "black"
            text = f"{value:.2f}" if values.dtype.kind == "f" else str(value)
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    return _png(figure)


def _calibration(result: dict[str, Any]) -> bytes:
    figure, axes = _axes()
    bins = result["calibration"]
    axes.plot([0, 1], [0, 1], color="#999", linewidth=0.8)
    axes.scatter(
        [b["confidence"] for b in bins],
        [b["accuracy"] for b in bins],
        s=[20 + 200 * b["count"] / result["samples"] for b in bins],
        color=_INK,
    )
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_title(f"expected calibration error {result['ece']:.3f}")
    return _png(figure)


def _curves(log: list[dict[str, Any]]) -> bytes:
    figure, axes = _axes()
    for name, colour in (("loss", _INK), ("valid_loss", _WARM)):
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=name, marker="." if len(points) < 3 else None)
    accuracy = [(line["step"], line["valid_accuracy"]) for line in log if line.get("valid_accuracy") is not None]
    if accuracy:
        right = axes.twinx()
        right.plot(
            *zip(*accuracy, strict=True), color="#555", linestyle="--", marker="." if len(accuracy) < 3 else None
        )
        right.set_ylabel("accuracy on the validation set (dashed)")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend(frameon=False)
    return _png(figure)
