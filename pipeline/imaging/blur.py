"""Blurs boxes of an image, such as faces, as in Yang et al. 2022, "A Study of Face Obfuscation in ImageNet".

Each box is extended on all sides by a tenth of its longer edge and replaced with a Gaussian blur of the image. Sigma is
a tenth of the longest edge of all boxes. The mask is blurred in the same way, so that no edges are visible.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from pipeline.imaging.headers import ImageError
from pipeline.imaging.resize import Pixels

Boxes = tuple[tuple[float, float, float, float], ...]
"""Left, top, right and bottom of each box, as fractions of the upright image's width and height."""
_MARGIN, _SIGMA = 0.1, 0.1
_MOST = 10_000
_COUNT = struct.Struct("<I")
_BOX = struct.Struct("<4d")


def boxes_of(value: Any) -> Boxes:
    """Parse the boxes in a column's value: a list of lists of four numbers, or its JSON.

    Raises:
        ImageError: ``no_boxes`` for null, ``bad_boxes`` if it is not a list of boxes.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ImageError("bad_boxes", repr(value[:80])) from None
    if value is None:
        raise ImageError("no_boxes", "null: an image without anything to blur has an empty list")
    if not isinstance(value, list | tuple) or len(value) > _MOST:
        raise ImageError("bad_boxes", f"expected a list of [left, top, right, bottom], got {type(value).__name__}")
    return tuple(map(_box, value))


def _box(value: Any) -> tuple[float, float, float, float]:
    numbers = list(value) if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise ImageError("bad_boxes", f"expected [left, top, right, bottom], got {str(value)[:80]}")
    left, top, right, bottom = map(float, numbers)
    if not (left <= right and top <= bottom and min(left, top) >= -1 and max(right, bottom) <= 2):  # false for NaN
        raise ImageError("bad_boxes", f"{str(value)[:80]}: expected left <= right, top <= bottom, as fractions of 1")
    return left, top, right, bottom


def blurred(pixels: Pixels, boxes: Boxes) -> Pixels:
    """Return ``pixels``, uint8 (h, w, 3), with ``boxes`` blurred; the same array if there are none."""
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    longest = 0.0
    for left, top, right, bottom in boxes:
        edge = max((right - left) * width, (bottom - top) * height)
        longest = max(longest, edge)
        columns = _span(left * width, right * width, _MARGIN * edge, width)
        mask[_span(top * height, bottom * height, _MARGIN * edge, height), columns] = 255
    if not mask.any():
        return pixels
    blur = ImageFilter.GaussianBlur(max(1.0, _SIGMA * longest))
    share = np.asarray(Image.fromarray(mask).filter(blur), np.float32)[:, :, None] / 255
    soft = np.asarray(Image.fromarray(pixels).filter(blur), np.float32)
    return (pixels + (soft - pixels) * share + 0.5).astype(np.uint8)


def _span(first: float, last: float, margin: float, edge: int) -> slice:
    """The pixels from ``first`` to ``last`` with a margin, clipped to the image."""
    start = min(max(int(np.floor(first - margin)), 0), edge)
    return slice(start, min(max(int(np.ceil(last + margin)), start), edge))


def packed(boxes: Boxes, data: bytes) -> bytes:
    """Pack boxes and an image into a task for a worker."""
    return b"".join([_COUNT.pack(len(boxes)), *(_BOX.pack(*box) for box in boxes), data])


def unpacked(task: bytes) -> tuple[Boxes, bytes]:
    """Inverse of :func:`packed`."""
    (count,) = _COUNT.unpack_from(task)
    end = _COUNT.size + count * _BOX.size
    return tuple(_BOX.iter_unpack(task[_COUNT.size : end])), task[end:]
