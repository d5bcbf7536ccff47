"""Contact sheets of images."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def png(image: npt.NDArray[Any]) -> bytes:
    """Encode an image, uint8 (h, w, 3), as PNG."""
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def grid(images: npt.NDArray[Any], columns: int = 0) -> npt.NDArray[Any]:
    """Arrange images (n, h, w, 3) in a grid, roughly square or with ``columns`` columns, two white pixels apart."""
    n, h, w, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 2) - 2, columns * (w + 2) - 2, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (h + 2), number % columns * (w + 2)
        sheet[top : top + h, left : left + w] = image
    return sheet


def on_one_canvas(images: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Centre images, uint8 (h, w, 3) of any sizes, on white canvases of equal size: (n, h, w, 3)."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    canvas = np.full((len(images), height, width, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
        canvas[number, top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas
