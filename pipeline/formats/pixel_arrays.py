"""Converts image files to pixel arrays and back without loss, for the formats of fixed size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.imaging import transform
from pipeline.samples import SampleError

MODES = ("L", "LA", "RGB", "RGBA", "I;16")
"""Pillow modes that both an array of 8 or 16 bits and a PNG can represent."""
_NEAREST = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "I": "I;16"}
_BY_CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_NPY = b"\x93NUMPY"
_LIMITS = transform.Limits()


def natural_mode(data: bytes) -> str:
    """The mode in ``MODES`` that preserves the image best.

    Raises:
        SampleError: it is not a valid image.
    """
    with _opened(data) as image:
        mode = image.mode if image.mode != "P" or "transparency" not in image.info else "PA"
    return "I;16" if mode.startswith("I;16") else mode if mode in MODES else _NEAREST.get(mode, "RGB")


def to_array(data: bytes, mode: str = "RGB", size: tuple[int, int] | None = None) -> npt.NDArray[Any]:
    """Decode an image file or a ``.npy`` to upright pixels: uint8 (h, w, 3) for RGB, (h, w) for L; uint16 for I;16.

    Args:
        mode: one of ``MODES``; RGB is decoded by :func:`pipeline.imaging.transform.decode`, with alpha over white.
        size: (height, width) to resize to, with antialiased bicubic interpolation.

    Raises:
        SampleError: the image is damaged, or its format is not supported.
    """
    if data.startswith(_NPY):
        return from_npy(data)
    try:
        if mode == "RGB":
            pixels = transform.decode(data, transform.probe(data, _LIMITS), _LIMITS)
            return pixels if size is None or pixels.shape[:2] == size else transform.resize(pixels, (size[1], size[0]))
        transform.probe(data, _LIMITS)
    except transform.ImageError as error:
        raise SampleError(error.reason, error.detail) from None
    with _opened(data) as image:
        upright = ImageOps.exif_transpose(image)
        deepened = mode == "I;16" and not upright.mode.startswith("I")
        if deepened:
            upright = upright.convert("L")
        elif upright.mode != mode and mode != "I;16":
            upright = upright.convert(mode)
        if size is not None and upright.size != (size[1], size[0]):
            upright = upright.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        array = np.asarray(upright)
    if mode == "I;16":  # 255 becomes 65535
        return array.astype(np.uint16) * 257 if deepened else array.clip(0, 65535).astype(np.uint16)
    return array


def mask_array(data: bytes, size: tuple[int, int] | None = None) -> npt.NDArray[Any]:
    """Read the values of a dense label, (h, w) or (h, w, c), unchanged; palette images give their indices.

    Args:
        size: (height, width) to resize to, by nearest neighbour.

    Raises:
        SampleError: it is neither an image nor a ``.npy``.
    """
    if data.startswith(_NPY):
        values = from_npy(data)
    else:
        with _opened(data) as image:
            values = np.asarray(image)
        if values.dtype == np.bool_:
            values = values.astype(np.uint8)
    return values if size is None else nearest(values, size)


def nearest(values: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Resize ``values`` (h, w, ...) to ``size`` (height, width) by nearest neighbour, without creating new values."""
    rows, columns = ((np.arange(n) * 2 + 1) * old // (2 * n) for n, old in zip(size, values.shape, strict=False))
    found: npt.NDArray[Any] = values[rows][:, columns]
    return found


def to_bytes(array: npt.NDArray[Any]) -> tuple[bytes, str]:
    """Encode an array without loss; return the file and its format: ``png``, or ``npy`` if PNG cannot hold it."""
    channels = array.shape[2] if array.ndim == 3 else 1
    squeezed = array[:, :, 0] if array.ndim == 3 and channels == 1 else array
    if array.ndim in (2, 3) and (
        (array.dtype == np.uint8 and channels in _BY_CHANNELS) or (array.dtype == np.uint16 and channels == 1)
    ):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(squeezed)).save(file, "PNG", compress_level=1)
        return file.getvalue(), "png"
    return to_npy(array), "npy"


def to_image(array: npt.NDArray[Any]) -> Image.Image:
    """Convert pixels to a PIL image; raises TypeError if PIL has no such mode."""
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def to_npy(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def from_npy(data: bytes) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError) as error:
        raise SampleError("decode_error", str(error)) from None
    return array


def _opened(data: bytes) -> Any:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's plugins raise any exception
        raise SampleError("decode_error", type(error).__name__) from None
    return image
