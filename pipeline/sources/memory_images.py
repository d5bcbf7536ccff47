"""Images in memory: PIL images, arrays and tensors, brought upright and into a mode that files can store."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.samples import SampleError, in_words

_KEPT = ("1", "L", "LA", "RGB", "RGBA", "I;16")
"""Modes whose pixels are stored as they are."""
_CHANNELS = (1, 3, 4)


def upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF orientation says: what is stored has no EXIF that could say it.

    Raises:
        SampleError: ``bad_image``: its file turns out to be damaged.
    """
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # a lazy image decodes only now, and decoders raise nearly everything
        raise SampleError("bad_image", in_words(error)) from None


def storable(image: Image.Image) -> Image.Image:
    """``image`` upright, and as RGB (RGBA where it has transparency) if its mode is one that PNG cannot hold, or whose
    numbers are no colours: CMYK, YCbCr, HSV, LAB, palettes. Greys of 32 bits stay.

    Raises:
        SampleError: ``bad_image``.
    """
    turned = upright(image)
    if turned.mode in _KEPT or turned.mode in ("I", "F") or turned.mode.startswith("I;16"):
        return turned
    return turned.convert("RGBA" if turned.has_transparency_data else "RGB")


def pixels_of(value: Any, *, numbers: bool = False) -> npt.NDArray[Any]:
    """Pixels (h, w) or (h, w, c) of an array (h, w[, c]), or of a tensor (c, h, w) as torch has them. Booleans are
    black and white, or with ``numbers`` 0 and 1.

    Raises:
        SampleError: ``no_image`` for what has another shape.
    """
    if hasattr(value, "detach"):
        array = value.detach().cpu().numpy()
        array = np.ascontiguousarray(array.transpose(1, 2, 0)) if array.ndim == 3 else array
    else:
        array = np.asarray(value)
    if array.ndim not in (2, 3) or array.dtype == object:
        raise SampleError("no_image", f"{type(value).__name__} of shape {array.shape}, {array.dtype}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(1 if numbers else 255)
    found: npt.NDArray[Any] = array
    return found


def png(pixels: npt.NDArray[Any] | Image.Image) -> bytes:
    """Pixels uint8 (h, w) or (h, w, c), or an image, as a PNG file, quickly and without loss."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def image_reader(shape: tuple[int, ...], dtype: np.dtype[Any], most: int) -> Callable[[npt.NDArray[Any]], bytes]:
    """What makes an image file of an item of an array of images: (n, h, w), (n, h, w, c) or (n, c, h, w) of uint8 or
    bool become PNG, bytes stay what they are.

    Raises:
        SampleError: ``no_images``: the array holds something else; ``too_many_bytes``: more than ``most`` an item.
    """
    if len(shape) == 1 and dtype.kind in "SV" and dtype.names is None:
        return lambda item: bytes(item)
    first = len(shape) == 4 and shape[1] in _CHANNELS and shape[3] not in _CHANNELS
    channels = 1 if len(shape) == 3 else (shape[1] if first else shape[3]) if len(shape) == 4 else 0
    if dtype not in (np.uint8, np.bool_) or channels not in _CHANNELS or 0 in shape[1:]:
        raise SampleError(
            "no_images",
            f"an array {shape} of {dtype}; expected (n, h, w), (n, h, w, c) or (n, c, h, w) of uint8, or image files",
            retryable=True,
        )
    if (size := math.prod(shape[1:])) > most:
        raise SampleError("too_many_bytes", f"{size} bytes an image")

    def encoded(item: npt.NDArray[Any]) -> bytes:
        pixels = item.astype(np.uint8) * np.uint8(255) if item.dtype == np.bool_ else item
        pixels = pixels.transpose(1, 2, 0) if first else pixels
        return png(pixels[:, :, 0] if channels == 1 and pixels.ndim == 3 else pixels)

    return encoded
