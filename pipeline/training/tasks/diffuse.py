"""Text to image: flow matching on latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.loading import LatentDataset, order
from pipeline.models.dit import DiT, dit_config
from pipeline.randomness import generator, keyed_seed
from pipeline.training.tasks.base import Batch, Keys, Task

_TIME_SHIFT = 0.7
"""Time is sigmoid(N + 0.7): more often noisy than not, because what a picture shows is decided there."""
_MEASURED = 1024  # samples that the normalisation is measured on
EVALUATED = 256  # samples that the loss is measured on, where no validation set is kept out
_QUARTERS = 4
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are evenly spread


@dataclass(frozen=True)
class LatentInfo:
    """Where latents come from: what it takes to make new ones of prompts and pictures of them.

    ``data``: content digest of the dataset that they were read from.
    """

    autoencoder: str
    text_encoder: str
    resolution: int
    image_shape: tuple[int, int, int]
    caption_shape: tuple[int, int]
    data: str = ""


@dataclass(frozen=True)
class Normalisation:
    """Brings stored latents to zero mean per channel and unit mean square over all of them, and back.

    One scale for all channels: how loud they are relative to each other is the autoencoder's choice.
    """

    mean: tuple[float, ...]
    scale: float

    @classmethod
    def measure(cls, latents: Tensor) -> Normalisation:
        """Of (n, c, h, w)."""
        exact = latents.double()
        mean = exact.mean((0, 2, 3))
        scale = (exact - mean[None, :, None, None]).square().mean().sqrt()
        return cls(tuple(round(m, 6) for m in mean.tolist()), round(max(float(scale), 1e-6), 6))

    def apply(self, latents: Tensor) -> Tensor:
        return (latents - self._means(latents)) / self.scale

    def invert(self, x: Tensor) -> Tensor:
        return x * self.scale + self._means(x)

    def _means(self, like: Tensor) -> Tensor:
        return torch.tensor(self.mean, dtype=like.dtype, device=like.device)[None, :, None, None]


class Diffuse(Task):
    """A :class:`DiT` that learns the velocity from pictures' latents to noise, given text states."""

    name = "diffuse"
    model: DiT

    def __init__(self, config: TrainConfig, data: LatentDataset, info: LatentInfo) -> None:
        self.info = info
        self.drop = config.caption_drop
        self.normalisation = Normalisation.measure(_first(data, config.seed, _MEASURED)["image_latents"])
        torch.manual_seed(keyed_seed(config.seed, "weights"))
        self.model = DiT(dit_config(config.model, info.image_shape, info.caption_shape))

    def losses(self, network: nn.Module, batch: dict[str, Tensor], keys: Keys) -> Tensor:
        """Mean squared error of the velocity, (b,), at a random time, some captions dropped."""
        x = self.normalisation.apply(batch["image_latents"])
        t, noise, drop = draw(keys, tuple(x.shape[1:]), self.drop)
        return velocity_losses(
            network, x, t.to(x.device), noise.to(x.device), batch["caption_latents"], drop.to(x.device)
        )

    def measure(self, network: nn.Module, batch: Batch, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
        """``valid_loss`` at evenly spread times, fixed noise, and ``loss_t1`` ... ``loss_t4``, that of each quarter
        of time, clean to noisy."""
        x = self.normalisation.apply(batch["image_latents"])
        _, noise, keep = draw(keys, tuple(x.shape[1:]), 0.0)
        t = torch.from_numpy((keys.slots * _GOLDEN % 1).astype(np.float32)).to(x.device)
        losses = velocity_losses(network, x, t, noise.to(x.device), batch["caption_latents"], keep.to(x.device))
        quarter = (t * _QUARTERS).long()
        parts = {f"loss_t{q + 1}": (losses, (quarter == q).float()) for q in range(_QUARTERS)}
        return {"valid_loss": (losses, torch.ones_like(losses)), **parts}

    def facts(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "normalisation": asdict(self.normalisation),
            "latents": asdict(self.info),
        }


def velocity_losses(network: nn.Module, x: Tensor, t: Tensor, noise: Tensor, text: Tensor, drop: Tensor) -> Tensor:
    """Flow matching: ||network((1 - t) x + t noise, t) - (noise - x)||^2, mean over a sample's elements: (b,)."""
    time = t[:, None, None, None]
    velocity = network((1 - time) * x + time * noise, t, text, drop)
    return (velocity - (noise - x)).square().flatten(1).mean(1)


def _first(data: LatentDataset, seed: int, most: int) -> dict[str, Tensor]:
    """The first samples of the first epoch: a fixed random choice."""
    count = min(most, len(data))
    return data.batch(order(seed, 0, len(data))[np.arange(count)])


def draw(keys: Keys, shape: tuple[int, ...], drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """Times (b,), noise (b, *shape) and whether the caption is dropped (b,) bool, each sample's from its own key."""
    noise = np.empty((len(keys.slots), *shape), np.float32)
    times = np.empty(len(keys.slots), np.float32)
    dropped = np.empty(len(keys.slots), np.bool_)
    for i, slot in enumerate(keys.slots):
        random = generator(keys.seed, "diffuse", keys.step, int(slot))
        times[i] = 1 / (1 + np.exp(-random.standard_normal() - _TIME_SHIFT))
        dropped[i] = random.random() < drop
        random.standard_normal(dtype=np.float32, out=noise[i])
    return torch.from_numpy(times), torch.from_numpy(noise), torch.from_numpy(dropped)
