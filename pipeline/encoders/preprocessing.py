"""From decoded pictures of any size to what networks take, on the device where the networks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Picture = np.ndarray | Tensor
"""uint8 (h, w, 3), RGB."""


@dataclass(frozen=True)
class Preprocessing:
    """How an encoder wants its pictures.

    Attributes:
        mean, std: of each channel, in [0, 1]; the default gives [-1, 1].
        mode: bicubic or bilinear, antialiased.
        squash: resize to a square whatever the shape; else the smaller edge counts and the centre is cut out.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    mode: str = "bicubic"
    squash: bool = False

    def __call__(self, pictures: Sequence[Picture], resolution: int, device: str | torch.device) -> Tensor:
        """Pictures → float32 (b, 3, resolution, resolution) on ``device``."""
        return self.normalise(fit(pictures, resolution, device, self.mode, squash=self.squash))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (b, 3, h, w) → float32 (b, 3, h, w)."""
        if self.mean == self.std == (0.5, 0.5, 0.5):
            return pixels.to(torch.float32) / 127.5 - 1.0
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (pixels.to(torch.float32) / 255.0 - mean) / std

    def describe(self) -> dict[str, Any]:
        return {
            "resize": f"{self.mode}, antialiased, {'squashed' if self.squash else 'smaller edge, centre crop'}",
            "mean": list(self.mean),
            "std": list(self.std),
        }


def fit(
    pictures: Sequence[Picture],
    resolution: int,
    device: str | torch.device,
    mode: str = "bicubic",
    *,
    squash: bool = False,
) -> Tensor:
    """Bring the smaller edge to r = ``resolution`` (antialiased) and cut out the centre: uint8 (b, 3, r, r).

    Sizes and offsets are those of torchvision's ``Resize(resolution)`` and ``CenterCrop``; values differ from Pillow's
    by 2 levels at most.
    """
    fitted = torch.empty((len(pictures), 3, resolution, resolution), dtype=torch.uint8, device=device)
    for place, picture in zip(fitted, pictures, strict=True):
        pixels = (picture if isinstance(picture, Tensor) else _tensor(picture)).to(device, non_blocking=True)
        place.copy_(_fit(pixels.permute(2, 0, 1)[None], resolution, mode, squash)[0])
    return fitted


def _tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture if picture.flags.writeable else picture.copy())


def _fit(pixels: Tensor, resolution: int, mode: str, squash: bool) -> Tensor:
    height, width = pixels.shape[-2:]
    if squash:
        return _resize(pixels, (resolution, resolution), mode)
    short, long = min(height, width), max(height, width)
    longer = int(resolution * long / short)
    height, width = (resolution, longer) if height <= width else (longer, resolution)
    top, left = round((height - resolution) / 2.0), round((width - resolution) / 2.0)
    return _resize(pixels, (height, width), mode)[..., top : top + resolution, left : left + resolution]


def _resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """uint8 (1, 3, h, w) at another size, rounded to 8 bits; CPUs do it in integers, GPUs in float32."""
    if pixels.shape[-2:] == size:
        return pixels
    if pixels.device.type == "cpu":
        return F.interpolate(pixels, size, mode=mode, antialias=True)
    return resize_in_floats(pixels, size, mode)


def resize_in_floats(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """uint8 (1, 3, h, w) at another size, on any device; rounded to 8 bits after each direction, as Pillow does it."""
    for step in ((pixels.shape[-2], size[1]), size):
        exact = F.interpolate(pixels.float(), step, mode=mode, antialias=True)
        pixels = exact.round_().clamp_(0, 255).to(torch.uint8)
    return pixels
