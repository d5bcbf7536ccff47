"""Scores that are computed from the pixels of an image on the CPU.

Each is a function from a :class:`View`, which caches shared intermediate results, to a number. Scores of detail use a
common scale, with the longer edge at most :data:`EDGE` pixels, so that images of different sizes can be compared.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.curation.scorers.base import scorer
from pipeline.imaging.headers import Probe
from pipeline.imaging.transform import Pixels

EDGE = 512
"""Maximum longer edge, in pixels, at which detail is measured."""
Grey = npt.NDArray[np.float32]

_BLACK, _WHITE = 3, 252
_SHADES = 4  # bits per channel that distinguish colours in flat_share
_NEUTRAL = 10  # maximum difference of a grey pixel's channels, in levels; JPEG adds a few
_PARTS = 8  # parts per edge
_NOISE = 25.0  # variance of luma, in squared levels, of camera and JPEG noise
_UNIFORM = 6.0  # maximum standard deviation, in levels, of a row of a border
_SEAM = 24.0  # minimum difference between the two sides of a seam, in levels
_MARGIN = 0.1  # share of an edge that is not searched for seams because of frames


class View:
    """An image, uint8 (h, w, 3), its encoded bytes and its header."""

    def __init__(self, pixels: Pixels, data: bytes, header: Probe) -> None:
        self.pixels = pixels
        self.data = data
        self.header = header

    @cached_property
    def small(self) -> Pixels:
        """The image averaged over squares, so that its longer edge is at most :data:`EDGE`: uint8 (h', w', 3)."""
        factor = -(-max(self.pixels.shape[:2]) // EDGE)
        return self.pixels if factor == 1 else np.asarray(Image.fromarray(self.pixels).reduce(factor))

    @cached_property
    def levels(self) -> Pixels:
        """Luma (ITU-R BT.601) of :attr:`small`, uint8 (h', w')."""
        return np.asarray(Image.fromarray(self.small).convert("L"))

    @cached_property
    def grey(self) -> Grey:
        """Luma of :attr:`small`, float32 (h', w') in 0..255."""
        return self.levels.astype(np.float32)

    @cached_property
    def laplacian(self) -> Grey:
        """Laplacian of :attr:`grey`, float32 (h' - 2, w' - 2); empty if that has fewer than three rows or columns."""
        grey = self.grey
        if min(grey.shape) < 3:
            return np.empty((0, 0), np.float32)
        found: Grey = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
        return found

    @cached_property
    def histogram(self) -> npt.NDArray[np.int64]:
        """Number of pixels at each luma level, (256,)."""
        return np.bincount(self.levels.ravel(), minlength=256)

    @cached_property
    def steps(self) -> tuple[Grey, Grey]:
        """Absolute differences of adjacent luma values: across (h', w' - 1) and down (h' - 1, w')."""
        return np.abs(np.diff(self.grey, axis=1)), np.abs(np.diff(self.grey, axis=0))


@scorer("pixels")
def sharpness(view: View) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000)."""
    return float(view.laplacian.var()) if view.laplacian.size else 0.0


@scorer("pixels")
def local_sharpness(view: View) -> float:
    """Maximum, over 8 x 8 parts of the image, of the variance of the Laplacian divided by that of luma (plus noise):
    small only if nothing in the image is in focus, independent of contrast."""
    height, width = (edge // _PARTS for edge in view.laplacian.shape)
    if not (height and width):
        return 0.0
    shape = (_PARTS, height, _PARTS, width)
    detail, luma = (
        values[: height * _PARTS, : width * _PARTS].reshape(shape).var((1, 3))
        for values in (view.laplacian, view.grey[1:-1, 1:-1])
    )
    return float((detail / (luma + _NOISE)).max())


@scorer("pixels")
def contrast(view: View) -> float:
    """Standard deviation of luma, in 0..0.5 (RMS contrast)."""
    mean = _mean(view)
    variance = (view.histogram * (np.arange(256) - 255 * mean) ** 2).sum() / view.histogram.sum()
    return float(np.sqrt(variance) / 255)


@scorer("pixels")
def brightness(view: View) -> float:
    """Mean of luma, in 0..1."""
    return _mean(view)


@scorer("pixels")
def clipped(view: View) -> float:
    """Share of black or white pixels, in 0..1: large if the image is under- or overexposed."""
    counts = view.histogram
    return float((counts[:_BLACK].sum() + counts[_WHITE + 1 :].sum()) / counts.sum())


@scorer("pixels")
def entropy(view: View) -> float:
    """Entropy of the luma histogram, in bits: 0 for a single level, 8 for a uniform distribution."""
    share = view.histogram[view.histogram > 0] / view.histogram.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


@scorer("pixels")
def flat_share(view: View) -> float:
    """Share of the most common of 4,096 colours, in 0..1: large in screenshots, drawings and placeholders."""
    coarse = (view.small >> (8 - _SHADES)).astype(np.int32)
    codes = coarse[..., 0] << 2 * _SHADES | coarse[..., 1] << _SHADES | coarse[..., 2]
    return float(np.bincount(codes.ravel()).max() / codes.size)


@scorer("pixels")
def border(view: View) -> float:
    """Share of the image in uniform rows or columns at its edges (letterboxes, frames), in 0..1."""
    grey = view.grey
    top, bottom = _uniform(grey)
    if top + bottom >= len(grey):
        return 1.0
    left, right = _uniform(grey[top : len(grey) - bottom].T)
    inner = (len(grey) - top - bottom) * max(0, grey.shape[1] - left - right)
    found: float = 1.0 - inner / grey.size
    return found


@scorer("pixels")
def seam(view: View) -> float:
    """Largest share of a row or column in the image that is a straight edge, in 0..1: close to 1 in collages, where two
    images meet."""
    across, down = view.steps
    return max(_longest_seam(across), _longest_seam(down.T))


@scorer("pixels")
def colourfulness(view: View) -> float:
    """Colourfulness (Hasler and Süsstrunk, Measuring colourfulness in natural images, SPIE 2003): 0 for grey, over 100
    for vivid colours."""
    red, green, blue = (view.small[..., channel].astype(np.float32) for channel in range(3))
    first, second = red - green, (red + green) / 2 - blue
    spread = np.hypot(first.std(), second.std())
    return float(spread + 0.3 * np.hypot(first.mean(), second.mean()))


@scorer("pixels")
def grey_share(view: View) -> float:
    """Share of pixels without colour, in 0..1."""
    red, green, blue = (view.small[..., channel] for channel in range(3))
    largest, smallest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return float((largest - smallest <= _NEUTRAL).mean())


@scorer("pixels")
def aspect(view: View) -> float:
    """Width divided by height."""
    found: float = view.pixels.shape[1] / view.pixels.shape[0]
    return found


@scorer("pixels")
def min_edge(view: View) -> float:
    """The shorter edge, in pixels."""
    return float(min(view.pixels.shape[:2]))


@scorer("pixels")
def jpeg_quality(view: View) -> float:
    """Quality setting, 1..100, estimated from a JPEG's luma quantization table; NaN for other formats.

    Applies the inverse of libjpeg's jpeg_quality_scaling() to the mean ratio to libjpeg's base table.
    """
    if view.header.format != "jpeg":
        return float("nan")
    table = _quantization(view.data)
    if table is None:
        return float("nan")
    scale = 100 * float(table.mean()) / float(_BASE.mean())
    quality = (200 - scale) / 2 if scale <= 100 else 5000 / scale
    return float(min(100.0, max(1.0, quality)))


def _mean(view: View) -> float:
    return float((view.histogram * np.arange(256)).sum() / view.histogram.sum() / 255)


def _uniform(grey: Grey) -> tuple[int, int]:
    """Number of uniform and similar rows at the top and at the bottom."""
    plain = grey.std(axis=1) < _UNIFORM
    if not (plain[0] or plain[-1]):
        return 0, 0
    means = grey.mean(axis=1)
    counts = []
    for side in (slice(None), slice(None, None, -1)):
        alike = plain[side] & (np.abs(means[side] - means[side][0]) < _UNIFORM)
        counts.append(len(alike) if alike.all() else int(np.argmin(alike)))
    return counts[0], counts[1]


def _longest_seam(steps: Grey) -> float:
    """The largest share of a column of ``steps`` (h, w) that is an edge, minus that of nearby columns."""
    width = steps.shape[1]
    margin = max(2, round(_MARGIN * width))
    if width < 2 * margin + 3 or not len(steps):
        return 0.0
    strong = (steps > _SEAM).mean(axis=0)
    around = np.minimum(strong[:-4], strong[4:])
    alone = strong[2:-2] - around
    return float(max(0.0, alone[margin - 2 : width - margin - 2].max()))


_BASE = np.array(
    [
        *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57),
        *(69, 56, 14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64),
        *(81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
    ],
    np.float64,
)
"""Table K.1 of ITU-T T.81; the order is irrelevant, as only the mean is used."""


def _quantization(data: bytes) -> npt.NDArray[np.float64] | None:
    """Quantization table 0 of a JPEG (64,); None if there is none before the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            return None
        if marker == 0xDB:
            start, end = at + 4, at + 2 + length
            while start < end:
                wide, number = data[start] >> 4, data[start] & 15
                size = 128 if wide else 64
                values = np.frombuffer(data[start + 1 : start + 1 + size], ">u2" if wide else "u1")
                if number == 0 and len(values) == 64:
                    return values.astype(np.float64)
                start += 1 + size
        at += 2 + length
    return None
