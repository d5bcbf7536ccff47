"""Preprocessing of decoded images of any size: resize and crop on the CPU, normalise on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.encoders.crop import AnyCrop, Crop
from pipeline.imaging.transform import Pixels


@dataclass(frozen=True)
class Preprocessing:
    """An encoder's image preprocessing.

    Attributes:
        mean, std: of each channel, in [0, 1]; the default maps to [-1, 1].
        mode, squash, shorter, floor: as in :class:`~pipeline.encoders.crop.Crop`.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    mode: str = "bicubic"
    squash: bool = False
    shorter: int = 0
    floor: bool = False

    def __call__(self, images: Sequence[Pixels], resolution: int, device: str | torch.device) -> Tensor:
        """Images uint8 (h, w, 3) of any sizes → float32 (b, 3, resolution, resolution) on ``device``."""
        return self.normalise(fit(images, self.crop(resolution)).to(device))

    def of_one(self, image: Pixels, crop: AnyCrop, device: str | torch.device, key: str = "") -> Tensor:
        """An image uint8 (h, w, 3) → its crop, float32 (1, 3, h, w) on ``device``.

        Raises:
            ImageError: the image fits no bucket.
        """
        return self.normalise(torch.from_numpy(crop.cut(image, key).copy())[None].to(device))

    def crop(self, resolution: int) -> Crop:
        """The crop of an image for the encoder."""
        return Crop(resolution, self.mode, self.squash, self.shorter, self.floor)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (b, h, w, 3) → float32 (b, 3, h, w): contiguous on a CPU, channels-last on a GPU."""
        x = pixels.permute(0, 3, 1, 2)
        x = x.contiguous() if x.device.type == "cpu" else x
        if self.mean == self.std == (0.5, 0.5, 0.5):
            return x.to(torch.float32) / 127.5 - 1.0
        x = x.to(torch.float32) / 255.0
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            x[:, channel].sub_(mean).div_(std)  # floats, not tensors, which would have to be copied to the device
        return x

    def describe(self) -> dict[str, Any]:
        how = "squashed" if self.squash else "smaller edge, centre crop"
        said = f"{self.mode}, antialiased, {f'{self.shorter}, ' if self.shorter else ''}{how}"
        return {"resize": said, "mean": list(self.mean), "std": list(self.std)}


def fit(images: Sequence[Pixels], crop: Crop) -> Tensor:
    """Crop images of any sizes: uint8 (b, edge, edge, 3)."""
    return torch.from_numpy(np.stack([crop.cut(image) for image in images]))
