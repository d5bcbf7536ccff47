"""Antialiased resizing of pixels by one of several equivalent implementations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

Pixels = npt.NDArray[np.uint8]
"""(h, w, 3) RGB, or (h, w, 4) RGBX, whose last byte is unused; C-contiguous."""
Size = tuple[int, int]
"""Width and height in pixels."""
INTERPOLATIONS = ("bicubic", "lanczos", "bilinear", "area")


def resize(
    pixels: Pixels,
    size: Size,
    backend: str = "fast",
    box: tuple[float, float, float, float] | None = None,
    interpolation: str = "bicubic",
) -> Pixels:
    """Resize `pixels` (h, w, c), or the part within `box` (left, top, right, bottom in possibly fractional pixels).

    Args:
        size: (width, height) in pixels.
        backend: one of `RESIZERS`.
        interpolation: one of `INTERPOLATIONS`, antialiased.
    """
    backend = "pillow" if interpolation == "area" else backend  # other backends treat box edges differently
    width, height = pixels.shape[1::-1]
    # Pillow's CMYK is four plain bytes per pixel; it uses such an array without a copy.
    image = Image.frombuffer("CMYK", (width, height), pixels, "raw", "CMYK", 0, 1) if pixels.shape[2] == 4 else None
    sized = RESIZERS[backend](image or Image.fromarray(pixels), size, box or (0, 0, width, height), interpolation)
    return np.asarray(sized)


Box = tuple[float, float, float, float]


_FILTERS = {
    "bicubic": (FilterType.catmull_rom, Image.Resampling.BICUBIC),
    "lanczos": (FilterType.lanczos3, Image.Resampling.LANCZOS),
    "bilinear": (FilterType.bilinear, Image.Resampling.BILINEAR),
    "area": (FilterType.box, Image.Resampling.BOX),
}


def _resize_pillow(image: Image.Image, size: Size, box: Box, interpolation: str) -> Image.Image:
    return image.resize(size, _FILTERS[interpolation][1], box)


def _resize_fast(image: Image.Image, size: Size, box: Box, interpolation: str) -> Image.Image:
    """Uses integers, so results do not depend on the CPU's instruction set; one thread, on Pillow's buffers."""
    left, top, right, bottom = box
    sized = Image.new(image.mode, size)
    algorithm = ResizeAlg.convolution(_FILTERS[interpolation][0])
    options = ResizeOptions(algorithm, crop_box=CropBox(left, top, right - left, bottom - top))
    _resizer().resize_pil(image, sized, options)
    return sized


@cache
def _resizer() -> Resizer:
    return Resizer()


RESIZERS: dict[str, Callable[[Image.Image, Size, Box, str], Image.Image]] = {
    "fast": _resize_fast,
    "pillow": _resize_pillow,
    "simd": _resize_pillow,
}
