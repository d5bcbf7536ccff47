"""A perceptual hash: 128 bits, most of which stay the same if an image is resized, recompressed or slightly cropped.

The bits are the signs of the 128 lowest frequencies of the brightness at 32x32 (as in Zauner 2010, "Implementation and
benchmarking of perceptual image hash functions", with zero instead of the median). They are computed with integers, so
that they are the same on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BITS = 128
EDGE = 32
_FREQUENCIES = 16
_FLAT = 4.0  # variance of the brightness below which an image is considered blank

_cosines = np.cos(np.pi / EDGE * (np.arange(EDGE) + 0.5) * np.arange(_FREQUENCIES)[:, None])
_DCT: npt.NDArray[np.int64] = np.rint(_cosines * 4096).astype(np.int64)  # (frequency, position)
_ORDER = np.array(sorted((u + v, u, v) for u in range(_FREQUENCIES) for v in range(_FREQUENCIES))[1 : BITS + 1])


def phash(small: npt.NDArray[np.uint8]) -> str:
    """Compute the hash of an image (32, 32, c), whose first three channels are RGB.

    Returns 32 hexadecimal digits, lowest frequencies first; empty for a nearly blank image.
    """
    red, green, blue = (small[:, :, channel].astype(np.int64) for channel in range(3))
    grey = 299 * red + 587 * green + 114 * blue
    grey = 1024 * grey - grey.sum()  # minus its mean, scaled to stay an integer
    if (grey.astype(np.float64) ** 2).mean() < _FLAT * (1000 * 1024) ** 2:
        return ""
    spectrum = _DCT @ (grey >> 10) @ _DCT.T
    bits = spectrum[_ORDER[:, 1], _ORDER[:, 2]] > 0
    return np.packbits(bits).tobytes().hex()
