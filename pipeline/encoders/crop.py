"""The crop of an image for an encoder, computed in the process that decodes the image. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

from pipeline.imaging.buckets import Buckets, Size, covering
from pipeline.imaging.headers import ImageError
from pipeline.imaging.patches import PatchGrid
from pipeline.imaging.transform import Pixels

FILTERS = {
    "nearest": ResizeAlg.nearest(),
    "lanczos": ResizeAlg.convolution(FilterType.lanczos3),
    "bilinear": ResizeAlg.convolution(FilterType.bilinear),
    "bicubic": ResizeAlg.convolution(FilterType.catmull_rom),
    "box": ResizeAlg.convolution(FilterType.box),
}
"""Interpolations by name; all except nearest are antialiased."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, in pixels."""
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

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes of crops."""
        return ((self.edge, self.edge),)

    def box(self, source: Size, key: str = "") -> tuple[Box, Size]:
        """The part to crop from an image of size ``source``, and the size to resize it to."""
        height, width = source
        square = (self.edge, self.edge)
        if self.squash:
            return (0, 0, width, height), square
        short, shorter = min(height, width), self.shorter or self.edge
        across, down = (shorter if edge == short else int(shorter * edge / short) for edge in (width, height))
        left, top = self._offset(across), self._offset(down)
        x, y = width / across, height / down
        return (left * x, top * y, (left + self.edge) * x, (top + self.edge) * y), square

    def cut(self, pixels: Pixels, key: str = "") -> Pixels:
        """uint8 (h, w, 3), or (h, w, 4) whose last channel is ignored → uint8 (edge, edge, 3)."""
        return _cut(pixels, *self.box(pixels.shape[:2]), self.mode)

    def _offset(self, size: int) -> int:
        return (size - self.edge) // 2 if self.floor else round((size - self.edge) / 2)


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

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes of crops."""
        return self.buckets.sizes

    def box(self, source: Size, key: str = "") -> tuple[Box, Size]:
        """The part to crop from an image of size ``source``, and the size of its bucket.

        Raises:
            ImageError: the image fits no bucket.
        """
        place = self.buckets.place_of(source[0], source[1], self.seed, key)
        if place is None:
            raise ImageError("size_mismatch", f"{source[1]}x{source[0]} has no bucket")
        (down, across), (height, width) = place.size, covering(source, place.size)
        y, x = source[0] / height, source[1] / width
        return (place.left * x, place.top * y, (place.left + across) * x, (place.top + down) * y), place.size

    def cut(self, pixels: Pixels, key: str = "") -> Pixels:
        """uint8 (h, w, 3), or (h, w, 4) whose last channel is ignored → uint8 with its bucket's height and width.

        Raises:
            ImageError: the image fits no bucket.
        """
        return _cut(pixels, *self.box(pixels.shape[:2], key), self.mode)


@dataclass(frozen=True)
class PatchCrop:
    """The input of an image encoder, whole patches of the part of an image that latents are made of.

    Attributes:
        latents: the crop of the latents.
        mode: one of :data:`FILTERS`.
    """

    latents: Crop | BucketCrop
    grid: PatchGrid
    mode: str = "bicubic"

    @property
    def bytes(self) -> int:
        """Number of bytes of the largest crop."""
        return 3 * max(math.prod(self.grid.pixels(size)) for size in self.latents.sizes)

    def cut(self, pixels: Pixels, key: str = "") -> Pixels:
        """uint8 (h, w, 3), or (h, w, 4) whose last channel is ignored → uint8, whole patches.

        Raises:
            ImageError: the image fits no bucket.
        """
        box, size = self.latents.box(pixels.shape[:2], key)
        return _cut(pixels, box, self.grid.pixels(size), self.mode)


AnyCrop = Crop | BucketCrop | PatchCrop


def _cut(pixels: Pixels, box: Box, size: Size, mode: str) -> Pixels:
    """Crop ``box`` and resize it to ``size``."""
    left, top, right, bottom = map(int, box)
    if all(float(edge).is_integer() for edge in box) and (bottom - top, right - left) == size:
        return pixels[top:bottom, left:right, :3]
    return _resized(pixels, box, size, mode)


def _resized(pixels: Pixels, box: Box, size: Size, mode: str) -> Pixels:
    """Resize the part within ``box`` to ``size`` (height, width). Filters also read pixels around the box, as if the
    whole image had been resized before cropping; rows are resized before columns."""
    height, width = pixels.shape[:2]
    down, across = size
    left, top, right, bottom = box[0], box[1], min(box[2], width), min(box[3], height)
    margin = int(_SUPPORT * max(1.0, (bottom - top) / down)) + 1
    first, last = max(0, int(top) - margin), min(height, int(bottom) + margin)
    image = _pass(_image(pixels[first:last]), (across, last - first), (left, 0, right - left, last - first), mode)
    return np.asarray(_pass(image, (across, down), (0, top - first, across, bottom - top), mode))[:, :, :3]


def _pass(image: Image.Image, size: tuple[int, int], box: Box, mode: str) -> Image.Image:
    if [*image.size, *box] == [*size, 0, 0, *size]:
        return image
    sized = Image.new(image.mode, size)
    _resizer().resize_pil(image, sized, ResizeOptions(FILTERS[mode], crop_box=CropBox(*box)))
    return sized


def _image(pixels: Pixels) -> Image.Image:
    """Wrap pixels as a Pillow image; four bytes per pixel as CMYK, which Pillow accepts without a copy."""
    if pixels.shape[2] == 4:
        return Image.frombuffer("CMYK", pixels.shape[1::-1], np.ascontiguousarray(pixels), "raw", "CMYK", 0, 1)
    return Image.fromarray(np.ascontiguousarray(pixels))


@cache
def _resizer() -> Resizer:
    return Resizer()
