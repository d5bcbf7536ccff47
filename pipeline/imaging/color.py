"""Colour profiles: converts images to sRGB, which all later steps assume.

The conversion is relative colorimetric with black point compensation, as in browsers. A profile is ignored if it is
damaged, longer than `MAX_PROFILE`, or for another colour space than that of the pixels. A profile that changes no
colour by more than `_SAME` levels is treated as sRGB.
"""

from __future__ import annotations

from functools import cache, lru_cache
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

MAX_PROFILE = 2**20
"""Maximum bytes of a profile; those embedded by cameras, phones and printers have up to about 600 KiB."""
_SAME = 3
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def converts(profile: bytes, mode: str) -> bool:
    """Whether the profile changes pixels of Pillow's `mode` (`L`, `RGB`, `CMYK`) compared to sRGB."""
    return _transform(profile, mode) is not None


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert `image` (`L`, `RGB` or `CMYK`) to sRGB, with Pillow's conversion if the profile is ignored."""
    transform = _transform(profile, image.mode)
    return image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform)  # type: ignore[return-value]


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    if not profile or len(profile) > MAX_PROFILE:
        return None
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES.get(mode):
            return None
        transform = ImageCms.buildTransform(
            source,
            _srgb(),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode != "CMYK":
            colours = _grid(mode)
            changed = np.asarray(ImageCms.applyTransform(colours, transform), np.int16)
            if np.abs(changed - np.asarray(colours.convert("RGB"))).max() <= _SAME:
                return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _grid(mode: str) -> Image.Image:
    """One row with all greys, or with colours distributed over the RGB cube."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels: npt.NDArray[np.uint8] = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    return Image.fromarray(np.ascontiguousarray(cube))
