"""Image classification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import ClassifyOptions, ConfigError, TrainConfig
from pipeline.loading import Batches
from pipeline.models.constants import channels
from pipeline.models.vision_mamba import VisionMamba, vision_mamba_config
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.stage import open_input
from pipeline.randomness import keyed_seed
from pipeline.registry import tasks
from pipeline.training.feed import split
from pipeline.training.images import Augmentation, ImageDataset, centre, mixes
from pipeline.training.loggers import forward_flops
from pipeline.training.tasks.base import Batch, Keys, Task

_MEASURED = 2048  # images that mean and deviation are computed from
_MANY_TOKENS = 1024
_RESOLUTION = 224
_MODEL = ("patch", "stem", "blocks", "mixer", "pool", "depth", "d_state", "d_conv", "expand", "heads")
"""Settings of the model that default to those of its size if they are empty ("" or 0)."""


@tasks.register("classify", ClassifyOptions)
class Classify(Task):
    """A :class:`VisionMamba` that learns labels.

    Raises:
        ConfigError: the data have more classes than ``classes=``, or a setting of the model is invalid.
    """

    name = "classify"
    metric = "valid_accuracy"
    higher_is_better = True
    model: VisionMamba

    @classmethod
    def input(cls, config: TrainConfig) -> Dataset:
        """Images with labels; by default the output of stage=shard."""
        return open_input(config, "train")

    @classmethod
    def from_config(
        cls, config: TrainConfig, dataset: Dataset | None, device: str | torch.device = "cpu"
    ) -> tuple[Task, Batches, Batches | None]:
        assert dataset is not None
        dataset.require_columns("jpg", "label")
        config = replace(config, resolution=config.resolution or _RESOLUTION)
        images = ImageDataset(RandomAccess(dataset), round(config.resolution * config.enlarge))
        return cls(config, images), *split(images, config.valid_fraction, config.seed)

    def __init__(self, config: TrainConfig, data: ImageDataset) -> None:
        self.config = config
        self.size, self.edge = config.resolution or data.size, data.size
        self.classes = _classes(config, data)
        self.names = [data.names.get(number, str(number)) for number in range(self.classes)]
        some = data.batch(np.linspace(0, len(data) - 1, min(len(data), _MEASURED)).astype(np.int64))["images"].double()
        self.mean = [round(float(m), 4) for m in some.mean((0, 2, 3)) / 255]
        self.std = [round(max(float(s), 1.0) / 255, 4) for s in some.std((0, 2, 3))]
        settings = {name: getattr(config, name) for name in _MODEL if getattr(config, name)}
        settings |= {name: getattr(config, name) for name in ("dropout", "drop_path", "mlp_ratio", "scan_backend")}
        torch.manual_seed(keyed_seed(config.seed, "weights"))
        self.model = VisionMamba(vision_mamba_config(config.model, (3, self.size, self.size), self.classes, **settings))
        self._augmented = Augmentation(config, self.size)
        self._mixing = config.mixup > 0 or config.cutmix > 0

    def remarks(self, config: TrainConfig) -> list[str]:
        """Warn of models for small images on large ones, whose many tokens are rarely intended."""
        shape = self.model.config
        tokens = (shape.height // shape.patch) * (shape.width // shape.patch)
        if config.patch or tokens <= _MANY_TOKENS:
            return []
        return [
            f"model={config.model} cuts images of {shape.width} px into patches of {shape.patch} px: {tokens} tokens, "
            f"{3 * forward_flops(self.model, self.example()) / 1e9:.1f} GFLOP for each image and step. patch=16 has "
            f"{(shape.height // 16) * (shape.width // 16)} tokens; resolution= takes smaller images"
        ]

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        if keys.step < 0:
            return {**batch, "images": centre(batch["images"], self.size)}
        batch = {**batch, "images": self._augmented(batch["images"], keys)}
        return {**batch, **mixes(keys, self.config, *batch["images"].shape[2:])} if self._mixing else batch

    def losses(self, network: nn.Module, batch: Batch, keys: Keys) -> Tensor:
        """Cross-entropy with smoothed labels, (b,); for mixed samples with both labels."""
        images = normalised(batch["images"], self.mean, self.std)
        targets = (batch["labels"][:, None] == torch.arange(self.classes, device=images.device)).float()
        if "keep" in batch:
            images, targets = _mixed(images, targets, batch["keep"], batch["box"])
        logits = network(images).float()
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.config.label_smoothing)

    def measure(self, network: nn.Module, batch: Batch, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
        """``valid_loss``, without smoothing, and ``valid_accuracy``."""
        logits = network(normalised(batch["images"], self.mean, self.std)).float()
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")
        weights = torch.ones_like(losses)
        return {
            "valid_loss": (losses, weights),
            "valid_accuracy": ((logits.argmax(1) == batch["labels"]).float(), weights),
        }

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Weight decay applies to matrices, but not to vectors, decay rates of scans, or positions."""
        return parameter.dim() > 1 and not name.endswith(("log_rate", "positions", "token"))

    def example(self) -> tuple[Any, ...]:
        return (torch.zeros(1, 3, self.model.config.height, self.model.config.width),)

    def facts(self) -> dict[str, Any]:
        return {"model": self.model.config.to_dict(), "classes": self.names}

    def preprocessing(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "std": self.std,
            "size": self.size,
            "edge": self.edge,
            "resize": "bicubic",
            "crop": "centre",
            "scale": 1 / 255,
        }


def normalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Normalise uint8 (b, 3, h, w) to float32 with zero mean and unit deviation."""
    means, deviations = (channels(tuple(values), torch.float32, images.device) for values in (mean, std))
    return (images.float() / 255 - means) / deviations


def _mixed(images: Tensor, targets: Tensor, keep: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each sample with its neighbour: blended, or with its box replaced by that of the neighbour."""
    partner = torch.arange(len(images), device=images.device) ^ 1
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[2:])
    inside = ((rows >= box[:, :1]) & (rows < box[:, 1:2]))[:, None, :, None] & (
        (columns >= box[:, 2:3]) & (columns < box[:, 3:])
    )[:, None, None]
    cut = (box[:, 1] > box[:, 0])[:, None, None, None]
    share = keep[:, None, None, None]
    pasted = torch.where(inside, images[partner], images)
    blended = share * images + (1 - share) * images[partner]
    return torch.where(cut, pasted, blended), keep[:, None] * targets + (1 - keep[:, None]) * targets[partner]


def _classes(config: TrainConfig, data: ImageDataset) -> int:
    if data.labels is None:
        if not config.classes:
            raise ConfigError("classes=...: how many there are; this dataset is too large to count them")
        return config.classes
    found = int(data.labels.max()) + 1
    if config.classes and config.classes < found:
        raise ConfigError(f"classes={config.classes}: the data has labels up to {found - 1}")
    return config.classes or found
