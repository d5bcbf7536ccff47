"""A perceptual hash: 128 bits that stay mostly the same when an image is resized, recompressed or cropped a little.

The signs of the 128 lowest frequencies of an image's brightness, shrunk to 32x32 (as in Zauner 2010, "Implementation
and benchmarking of perceptual image hash functions", with zero for the median). In integers, so that every machine
finds the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BITS = 128
EDGE = 32
_FREQUENCIES = 16
_FLAT = 4.0  # mean of the squared deviations from the mean brightness, below which an image shows nothing to compare

_cosines = np.cos(np.pi / EDGE * (np.arange(EDGE) + 0.5) * np.arange(_FREQUENCIES)[:, None])
_DCT: npt.NDArray[np.int64] = np.rint(_cosines * 4096).astype(np.int64)  # (frequency, position)
_ORDER = np.array(sorted((u + v, u, v) for u in range(_FREQUENCIES) for v in range(_FREQUENCIES))[1 : BITS + 1])


def phash(small: npt.NDArray[np.uint8]) -> str:
    """The hash of an image (32, 32, 3) or more channels, of which the first three are RGB, as 32 hexadecimal digits,
    lowest frequencies first; empty for one that shows next to nothing."""
    red, green, blue = (small[:, :, channel].astype(np.int64) for channel in range(3))
    grey = 299 * red + 587 * green + 114 * blue
    grey = 1024 * grey - grey.sum()  # without its mean; an integer again
    if (grey.astype(np.float64) ** 2).mean() < _FLAT * (1000 * 1024) ** 2:
        return ""
    spectrum = _DCT @ (grey >> 10) @ _DCT.T
    bits = spectrum[_ORDER[:, 1], _ORDER[:, 2]] > 0
    return np.packbits(bits).tobytes().hex()
