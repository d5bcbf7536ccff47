"""Images in memory: converts PIL images, arrays and tensors to upright images in a mode that files can store."""

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
"""Modes whose pixels are stored unchanged."""
_CHANNELS = (1, 3, 4)


def upright(image: Image.Image) -> Image.Image:
    """Rotate ``image`` according to its EXIF orientation, as stored images have no EXIF data.

    Raises:
        SampleError: ``bad_image`` if its file is damaged.
    """
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # lazy images are decoded here, and decoders raise almost any exception
        raise SampleError("bad_image", in_words(error)) from None


def storable(image: Image.Image) -> Image.Image:
    """Rotate ``image`` upright, and convert modes that PNG cannot store (CMYK, YCbCr, HSV, LAB) and palettes to RGB.

    Images with transparency become RGBA. 32-bit greyscale images keep their mode.

    Raises:
        SampleError: ``bad_image``.
    """
    turned = upright(image)
    if turned.mode in _KEPT or turned.mode in ("I", "F") or turned.mode.startswith("I;16"):
        return turned
    return turned.convert("RGBA" if turned.has_transparency_data else "RGB")


def pixels_of(value: Any, *, numbers: bool = False) -> npt.NDArray[Any]:
    """Return the pixels, (h, w) or (h, w, c), of an array (h, w[, c]) or of a tensor ([c, ]h, w).

    Booleans become 0 and 255, or, with ``numbers``, 0 and 1.

    Raises:
        SampleError: ``no_image`` for other shapes.
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
    """Encode pixels, uint8 (h, w) or (h, w, c), or an image as PNG, with fast compression."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def image_reader(shape: tuple[int, ...], dtype: np.dtype[Any], most: int) -> Callable[[npt.NDArray[Any]], bytes]:
    """Return a function that converts an item of an array of images into an image file.

    Items of (n, h, w), (n, h, w, c) or (n, c, h, w) arrays of uint8 or bool become PNG files; bytes are unchanged.

    Raises:
        SampleError: ``no_images`` if the array holds something else; ``too_many_bytes`` if an item has more than
            ``most``.
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
