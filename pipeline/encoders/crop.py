"""The crop of an image for an encoder, computed in the process that decodes the image. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

from pipeline.imaging.buckets import Buckets, covering
from pipeline.imaging.headers import ImageError
from pipeline.imaging.transform import Pixels

FILTERS = {
    "nearest": ResizeAlg.nearest(),
    "lanczos": ResizeAlg.convolution(FilterType.lanczos3),
    "bilinear": ResizeAlg.convolution(FilterType.bilinear),
    "bicubic": ResizeAlg.convolution(FilterType.catmull_rom),
    "box": ResizeAlg.convolution(FilterType.box),
}
"""Interpolations by name; all except nearest are antialiased."""
_SUPPORT = 3  # pixels on each side that the widest filter reads, times the scale


@dataclass(frozen=True)
class Crop:
    """Resizes and crops an image of any size to ``edge`` x ``edge`` pixels.

    Sizes and offsets are those of torchvision's ``Resize`` and ``CenterCrop``, and values differ by at most 2 levels.
    (Pillow 13 resizes columns first in some tall images, which makes a difference where noise is clipped in between.)

    Attributes:
        mode: one of :data:`FILTERS`.
        squash: resize to a square regardless of the aspect ratio; else resize the shorter edge and crop the centre.
        shorter: size of the shorter edge before cropping; 0: ``edge``.
        floor: round offsets down, as transformers does; else half to even, as torchvision does.
    """

    edge: int
    mode: str = "bicubic"
    squash: bool = False
    shorter: int = 0
    floor: bool = False

    @property
    def bytes(self) -> int:
        return 3 * self.edge**2

    def cut(self, pixels: Pixels, key: str = "") -> Pixels:
        """uint8 (h, w, 3), or (h, w, 4) whose last channel is ignored → uint8 (edge, edge, 3)."""
        height, width = pixels.shape[:2]
        square = (self.edge, self.edge)
        if self.squash:
            return (
                pixels[:, :, :3] if (height, width) == square else self.resized(pixels, (0, 0, width, height), square)
            )
        short, shorter = min(height, width), self.shorter or self.edge
        across, down = (shorter if edge == short else int(shorter * edge / short) for edge in (width, height))
        left, top = self._offset(across), self._offset(down)
        if shorter == short:
            return pixels[top : top + self.edge, left : left + self.edge, :3]
        x, y = width / across, height / down
        return self.resized(pixels, (left * x, top * y, (left + self.edge) * x, (top + self.edge) * y), square)

    def _offset(self, size: int) -> int:
        return (size - self.edge) // 2 if self.floor else round((size - self.edge) / 2)

    def resized(self, pixels: Pixels, box: tuple[float, float, float, float], size: tuple[int, int]) -> Pixels:
        """Resize the part within ``box`` (left, top, right, bottom) to ``size`` (height, width). Filters also read
        pixels around the box, as if the whole image had been resized before cropping; rows are resized before
        columns."""
        height, width = pixels.shape[:2]
        down, across = size
        left, top, right, bottom = box[0], box[1], min(box[2], width), min(box[3], height)
        margin = int(_SUPPORT * max(1.0, (bottom - top) / down)) + 1
        first, last = max(0, int(top) - margin), min(height, int(bottom) + margin)
        image = self._pass(_image(pixels[first:last]), (across, last - first), (left, 0, right - left, last - first))
        image = self._pass(image, (across, down), (0, top - first, across, bottom - top))
        return np.asarray(image)[:, :, :3]

    def _pass(self, image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
        if [*image.size, *box] == [*size, 0, 0, *size]:
            return image
        sized = Image.new(image.mode, size)
        _resizer().resize_pil(image, sized, ResizeOptions(FILTERS[self.mode], crop_box=CropBox(*box)))
        return sized


@dataclass(frozen=True)
class BucketCrop:
    """Resizes an image of any size to cover its bucket, and crops it.

    Attributes:
        seed: of the crop position, if ``buckets.crop`` is ``random``.
        mode: one of :data:`FILTERS`.
    """

    buckets: Buckets
    seed: int = 0
    mode: str = "bicubic"

    @property
    def bytes(self) -> int:
        """Number of bytes of the largest bucket."""
        return 3 * self.buckets.largest

    def cut(self, pixels: Pixels, key: str = "") -> Pixels:
        """uint8 (h, w, 3), or (h, w, 4) whose last channel is ignored → uint8 with its bucket's height and width.

        Raises:
            ImageError: the image fits no bucket.
        """
        source = pixels.shape[:2]
        place = self.buckets.place_of(source[0], source[1], self.seed, key)
        if place is None:
            raise ImageError("size_mismatch", f"{source[1]}x{source[0]} has no bucket")
        (down, across), (height, width) = place.size, covering(source, place.size)
        if (height, width) == source:
            return pixels[place.top : place.top + down, place.left : place.left + across, :3]
        y, x = source[0] / height, source[1] / width
        box = (place.left * x, place.top * y, (place.left + across) * x, (place.top + down) * y)
        return Crop(0, self.mode).resized(pixels, box, place.size)


def _image(pixels: Pixels) -> Image.Image:
    """Wrap pixels as a Pillow image; four bytes per pixel as CMYK, which Pillow accepts without a copy."""
    if pixels.shape[2] == 4:
        return Image.frombuffer("CMYK", pixels.shape[1::-1], np.ascontiguousarray(pixels), "raw", "CMYK", 0, 1)
    return Image.fromarray(np.ascontiguousarray(pixels))


@cache
def _resizer() -> Resizer:
    return Resizer()
