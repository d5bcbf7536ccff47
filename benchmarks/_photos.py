"""Photos of several sizes, for benchmarks of the image path."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

SIZES = {"0.7 MP": (1024, 683), "1 MP": (1224, 816), "4 MP": (2464, 1642), "12 MP": (4240, 2828)}
EDGE = 512
"""Size that images are resized to: the shorter edge in pixels."""


@cache
def originals(folder: str) -> list[Path]:
    """JPEG files below `folder`, without symbolic links."""
    return sorted(path for path in Path(folder).rglob("*.jp*g") if path.is_file() and not path.is_symlink())


def photos(folder: str, size: tuple[int, int], most: int) -> Iterator[bytes]:
    """JPEGs (quality 90, 4:2:0), cropped to the aspect ratio of `size` and resized to it; photos of a folder are only
    downscaled.

    Without a folder, uses scikit-learn's two photos, upscaled if necessary, which makes them softer than real ones.
    """
    if folder:
        opened = (Image.open(path) for path in originals(folder))
        images = [image for image in opened if image.width >= size[0] and image.height >= size[1]]
    else:
        from sklearn.datasets import load_sample_images

        images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    step = max(1, len(images) // most)
    for image in images[::step][:most]:
        scale = min(image.width / size[0], image.height / size[1])
        box = (0, 0, size[0] * scale, size[1] * scale)
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=box))
        yield simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "420")
