"""Pictures of what a run has made, as files."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image


def png(picture: np.ndarray) -> bytes:
    """uint8 (h, w, 3) as a PNG file."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def grid(pictures: np.ndarray, columns: int = 0) -> np.ndarray:
    """(n, h, w, 3) → one picture, about square or with so many columns, with two white pixels between."""
    n, h, w, _ = pictures.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 2) - 2, columns * (w + 2) - 2, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (h + 2), number % columns * (w + 2)
        sheet[top : top + h, left : left + w] = picture
    return sheet
