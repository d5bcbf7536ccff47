"""Colour profiles: from whatever an image was made in to sRGB, which is what everybody downstream assumes.

Relative colorimetric with black point compensation, as browsers do. A profile that is damaged, longer than
`MAX_PROFILE`, or of another colour space than the image's pixels counts for nothing; one that changes no colour by more
than `_SAME` levels is sRGB by another name.
"""

from __future__ import annotations

from functools import cache, lru_cache
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

MAX_PROFILE = 2**20
"""Bytes; the profiles that cameras, phones and printers embed have up to about 600 KiB."""
_SAME = 3
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def converts(profile: bytes, mode: str) -> bool:
    """Whether pixels of Pillow's `mode` (`L`, `RGB`, `CMYK`) with this profile differ from the same numbers in sRGB."""
    return _transform(profile, mode) is not None


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """`image` (`L`, `RGB` or `CMYK`) as RGB in sRGB. Without a use for the profile: Pillow's own conversion."""
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
    """All greys, or colours all over the cube, in one row."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels: npt.NDArray[np.uint8] = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    return Image.fromarray(np.ascontiguousarray(cube))
