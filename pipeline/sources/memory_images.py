"""Images that are objects in memory: PIL images upright and in a mode that files can hold, arrays, tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pipeline.samples import SampleError

_KEPT = ("1", "L", "LA", "RGB", "RGBA", "I;16")
"""Modes whose pixels are stored as they are."""


def upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF orientation says: what is stored has no EXIF that could say it.

    Raises:
        SampleError: ``bad_image``: its file turns out to be damaged.
    """
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # a lazy image decodes only now, and decoders raise nearly everything
        raise SampleError("bad_image", f"{type(error).__name__}: {str(error)[:200]}") from None


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


def pixels_of(value: Any, *, numbers: bool = False) -> np.ndarray:
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
    return array.astype(np.uint8) * np.uint8(1 if numbers else 255) if array.dtype == np.bool_ else array
