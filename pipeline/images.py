"""Images, bytes to bytes: probe, decode, filter, resize, encode. No files, no SLURM; torch only where `resize="torch"`.

The size rule (`target_size`): where the smaller edge exceeds `max_image_size` it becomes exactly that, and the larger
edge becomes the exact ratio, rounded half up. Nothing is ever upscaled. `min_image_size` is checked on the original.

The interpolation is bicubic (a = -0.5) with antialiasing, on 8-bit values as they are stored (no gamma). JPEGs are
decoded at 1/2, 1/4 or 1/8 of their size where both edges stay at least 2.5 times the target; the rest is bicubic.

What passes through untouched: an upright, single-frame JPEG, PNG or WebP of 8-bit RGB or grey without alpha whose size
needs no change, and which decodes without a complaint. Everything else is encoded anew, without metadata: alpha (over
white), palettes, CMYK, 16-bit, BMP, TIFF, GIF, AVIF, rotated files, animated ones (their first frame), and JPEGs with
arithmetic coding or odd subsampling, which training decoders may refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from zlib import crc32, decompressobj

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, TiffImagePlugin

from pipeline.headers import (
    DEFAULT_LIMITS,
    FORMATS,
    LOSSLESS_FORMATS,
    ImageError,
    Limits,
    Probe,
    explain,
    is_turbo_jpeg,
    opened,
    png_chunks,
    probe,
)

__all__ = [
    "ENCODE_FORMATS",
    "FORMATS",
    "RESIZERS",
    "Dropped",
    "ImageError",
    "Limits",
    "Pixels",
    "Probe",
    "Result",
    "Rules",
    "decode",
    "encode",
    "probe",
    "process",
    "resize",
    "target_size",
]

Pixels = npt.NDArray[np.uint8]
"""(h, w, 3): RGB, upright, C-contiguous."""

ENCODE_FORMATS = ("jpg", "png", "webp", "auto")
_MAX_EDGE = {"jpeg": 65_500, "webp": 16_383}
"""Pixels per edge that a format can hold."""
_DCT_MARGIN = 2.5
"""A scaled decode must leave this many times the target's edge. Measured against a full decode with bicubic in floats,
on 35 photos of 0.9 to 18 MP: at least 47 dB (mean 55) for 1/2 and 41 dB (mean 54) for 1/4; 38 dB on a picture with
all its detail at the target's scale. (Margin 2: 45, 39 and 36 dB; margin 1: 29 dB. Quality 95 itself costs down to 40.)
"""


class Dropped(Exception):
    """A good image that the rules leave out. `reason` is short snake_case: `too_small`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of an image. All of it is part of the output's identity."""

    min_image_size: int = 256
    """Smaller edge of the upright original in pixels, below which an image is dropped as `too_small`."""
    max_image_size: int = 512
    """Smaller edge of the result in pixels at most; 0 = no limit."""
    encode_format: str = "jpg"
    """Of images that change: `jpg` (4:2:0), `png`, `webp`, or `auto` (PNG if the source is lossless, else JPEG)."""
    encode_quality: int = 95
    """1 to 100, for JPEG and WebP."""
    scaled_decode: bool = True
    """Decode large JPEGs at a fraction of their size where that changes little; False: always in full."""
    resize: str = "pillow"
    """Which bicubic: `pillow`, or `torch` (2 to 7 times as fast, within 2 levels, but importing it takes seconds)."""

    def __post_init__(self) -> None:
        if self.min_image_size < 0 or self.max_image_size < 0:
            raise ValueError("min_image_size and max_image_size must not be negative")
        if not 1 <= self.encode_quality <= 100:
            raise ValueError(f"encode_quality={self.encode_quality} is not in 1..100")
        if self.encode_format not in ENCODE_FORMATS:
            raise ValueError(f"encode_format={self.encode_format} is not one of {', '.join(ENCODE_FORMATS)}")
        if self.resize not in RESIZERS:
            raise ValueError(f"resize={self.resize} is not one of {', '.join(RESIZERS)}")


@dataclass(frozen=True, slots=True)
class Result:
    """An image to keep."""

    data: bytes
    format: str
    """One of `FORMATS`."""
    width: int
    height: int
    source_width: int
    """Of the original, upright; the smaller of the two is a sample's `min_side`."""
    source_height: int
    changed: bool
    """False: `data` is the original, bit for bit."""


def process(data: bytes, rules: Rules, limits: Limits = DEFAULT_LIMITS) -> Result:
    """One image file brought to the rules: a function of its arguments alone. Whatever is kept has been decoded once
    and found good. Raises `ImageError` for a bad file, `Dropped` for a good one that the rules leave out."""
    header = probe(data, limits)
    source = header.upright
    if min(source) < rules.min_image_size:
        raise Dropped("too_small", f"{source[0]}x{source[1]}, min_image_size is {rules.min_image_size}")
    size = target_size(*source, rules.max_image_size)
    if size == source and header.plain and header.orientation == 1:
        decode(data, header, limits, at_least=(1, 1))  # reads all, but need not compute all pixels
        return Result(data, header.format, *source, *source, changed=False)
    format = _encode_format(header, rules)
    if max(size) > _MAX_EDGE.get(format, max(size)):
        raise ImageError("edge_too_long", f"{size[0]}x{size[1]}, {format} holds {_MAX_EDGE[format]} pixels per edge")
    pixels = decode(data, header, limits, at_least=size if rules.scaled_decode and size != source else None)
    # Conversion from the source's ICC profile to sRGB belongs here: after decoding, before resizing.
    if size != source:
        pixels = resize(pixels, size, rules.resize)
    return Result(encode(pixels, format, rules.encode_quality), format, *size, *source, changed=True)


def target_size(width: int, height: int, max_image_size: int) -> tuple[int, int]:
    """(width, height) after resizing: the smaller edge at most `max_image_size` (0: any), the larger one the exact
    ratio, rounded half up. In integers, so that no platform rounds differently."""
    small = min(width, height)
    if max_image_size == 0 or small <= max_image_size:
        return width, height

    def scaled(edge: int) -> int:
        return (2 * edge * max_image_size + small) // (2 * small)

    return scaled(width), scaled(height)


# ---------------------------------------------------------------- decoding


def decode(
    data: bytes, header: Probe, limits: Limits = DEFAULT_LIMITS, at_least: tuple[int, int] | None = None
) -> Pixels:
    """`data` as upright RGB, shape (h, w, 3); the first frame, alpha over white. Raises `ImageError` for whatever is
    wrong with it, also where a decoder would only warn (a cut JPEG filled with grey) or not look (a PNG's checksums).

    With `at_least` (width, height of a target, upright) a JPEG may come smaller: at 1/2, 1/4 or 1/8, both edges still
    `_DCT_MARGIN` times the target. Its data is read and checked to the end all the same: what can be wrong shows while
    the coefficients are read, before any pixel is computed."""
    if header.format == "jpeg" and is_turbo_jpeg(data):
        pixels = _decode_jpeg(data, header, at_least)
    else:
        if header.format == "png":
            _check_png_sums(data)
        pixels = _decode_pillow(data, header, limits)
    return _upright(pixels, header.orientation if header.format != "tiff" else 1)


def _decode_jpeg(data: bytes, header: Probe, at_least: tuple[int, int] | None) -> Pixels:
    """CMYK is taken as inverted: so Adobe writes it, and so browsers and Pillow read it, Adobe's marker or not."""
    scale = 1
    if at_least is not None:
        target = at_least[::-1] if header.orientation >= 5 else at_least
        # Powers of two only: the other scales have no fast IDCT and take longer than a full decode.
        scale = next((s for s in (8, 4, 2) if _scaled_enough(header, s, target)), 1)
    width, height = -(-header.width // scale), -(-header.height // scale)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height, strict=True)
    except MemoryError:
        raise ImageError("out_of_memory") from None
    except ValueError as error:
        raise ImageError(*explain(error)) from error
    return _of_size(pixels, width, height)


def _scaled_enough(header: Probe, scale: int, target: tuple[int, int]) -> bool:
    width, height = -(-header.width // scale), -(-header.height // scale)
    return width >= _DCT_MARGIN * target[0] and height >= _DCT_MARGIN * target[1]


def _decode_pillow(data: bytes, header: Probe, limits: Limits) -> Pixels:
    with opened(data, header.format, limits) as image:
        image.load()
        if header.format == "png":
            _check_png_rows(data, header, image)
        pixels = np.array(_to_rgb(image, header))  # inside: conversions of damaged palettes raise as well
    return _of_size(pixels, *(header.upright if header.format == "tiff" else (header.width, header.height)))


def _of_size(pixels: Pixels, width: int, height: int) -> Pixels:
    if pixels.shape != (height, width, 3):
        raise ImageError("size_mismatch", f"{pixels.shape[1]}x{pixels.shape[0]}, its header says {width}x{height}")
    return pixels


def _check_png_sums(data: bytes) -> None:
    """Checksums of all chunks: Pillow skips those of the pixels, and zlib's own only if the data is read to its end."""
    view = memoryview(data)
    for kind, start, end in png_chunks(data):
        if crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ImageError("decode_error", f"wrong checksum of PNG chunk {kind!r}")


def _check_png_rows(data: bytes, header: Probe, image: Image.Image) -> None:
    """Whether a PNG's data holds all of its rows: Pillow leaves missing ones zero and says nothing. Inflating the data
    again costs half of a decode, so it is done only where the last row is zero, or rows are stored in several passes.
    """
    interlaced = data[28] == 1
    last_row = image.crop((0, header.height - 1, header.width, header.height))
    if not interlaced and np.asarray(last_row).any():
        return
    bits = data[24] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[data[25]]
    missing = 0
    for x, y, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-max(0, header.width - x) // dx), -(-max(0, header.height - y) // dy)
        missing += (1 + (columns * bits + 7) // 8) * rows if columns else 0
    inflate = decompressobj()
    for kind, start, end in png_chunks(data):
        piece = data[start:end] if kind == b"IDAT" else b""
        while piece and missing > 0:
            missing -= len(inflate.decompress(piece, 2**20))
            piece = inflate.unconsumed_tail
    if missing > 0:
        raise ImageError("truncated", "PNG with fewer rows than its header says")


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Passes of an interlaced PNG: first column, first row, columns and rows between."""


def _to_rgb(image: Image.Image, header: Probe) -> Image.Image:
    """Any of Pillow's modes as RGB: alpha over white, more than 8 bits scaled down."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _narrowed(image)
    elif "transparency" in image.info and header.format == "png":
        image.info["transparency"] = _transparent_level(image.info["transparency"], header.mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _transparent_level(level: Any, mode: str) -> Any:
    """The transparent colour of a PNG in the 8-bit values that Pillow made of its pixels; Pillow leaves it unscaled."""
    bits = int(mode.partition(";")[2] or 8)
    if mode.startswith("RGB;"):
        return tuple(value >> 8 for value in level)
    return level * 255 // (2**bits - 1) if mode.startswith("L;") or mode == "1" else level


def _narrowed(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as `L`, or as `LA` where one level is transparent.

    16-bit: the high byte, as Pillow does for 16-bit RGB. Fewer bits in a TIFF are shifted likewise. 32-bit integers and
    floats have no white level: the smallest of 1 (floats only), 255, 65535 and 2^32 - 1 that holds all values is taken.
    """
    values = np.asarray(image)
    level = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        grey = (values >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow minds for 8 bits only
            grey = 255 - grey
    else:
        if not (np.isfinite(values).all() and values.min() >= 0):
            raise ImageError("unsupported_mode", f"mode {image.mode} with negative or infinite values")
        levels = ([1.0] if image.mode == "F" else []) + [255.0, 65535.0, 2.0**32 - 1]
        white = next((white for white in levels if values.max() <= white), None)
        if white is None:
            raise ImageError("unsupported_mode", "floats above 32 bits")
        grey = (values * (255.0 / white) + 0.5).astype(np.uint8)
    if not isinstance(level, int):
        return Image.fromarray(grey)
    alpha = np.where(values == level, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


_TURNS: dict[int, Callable[[npt.NDArray[np.void]], npt.NDArray[np.void]]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.T,
    6: lambda image: image.T[:, ::-1],
    7: lambda image: image[::-1, ::-1].T,
    8: lambda image: image.T[::-1],
}
"""EXIF orientation → the upright view of a stored image (h, w)."""


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    # One item of 3 bytes per pixel: numpy copies that twice as fast as an axis of 3.
    turned = np.ascontiguousarray(_TURNS[orientation](np.ascontiguousarray(pixels).view("V3")[:, :, 0]))
    return turned.view(np.uint8).reshape(*turned.shape, 3)


# ---------------------------------------------------------------- resizing


def resize(pixels: Pixels, size: tuple[int, int], backend: str = "pillow") -> Pixels:
    """`pixels` (h, w, 3) at `size` (width, height) in antialiased bicubic interpolation, by one of `RESIZERS`."""
    return RESIZERS[backend](pixels, size)


def _resize_pillow(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _resize_torch(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """In integers, so that its result depends neither on the CPU's instruction set nor on the number of threads
    (which a worker sets to 1)."""
    import torch  # costs seconds once per process; only workers that ask for it pay

    if not pixels.flags.writeable:  # torch warns
        pixels = pixels.copy()
    stored = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, h, w), channels last in memory
    sized = torch.nn.functional.interpolate(stored, size[::-1], mode="bicubic", antialias=True)
    return np.ascontiguousarray(sized[0].permute(1, 2, 0).numpy())


RESIZERS: dict[str, Callable[[Pixels, tuple[int, int]], Pixels]] = {"pillow": _resize_pillow, "torch": _resize_torch}


# ---------------------------------------------------------------- encoding


def encode(pixels: Pixels, format: str, quality: int = 95) -> bytes:
    """`pixels` (h, w, 3) as `jpeg` (4:2:0: set here because libraries' defaults differ), `png` or `webp`."""
    if format == "jpeg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420"))
    file = BytesIO()
    options = {"quality": quality} if format == "webp" else {}
    Image.fromarray(pixels).save(file, format.upper(), **options)
    return file.getvalue()


def _encode_format(header: Probe, rules: Rules) -> str:
    """What an image that changes is written as: one of `FORMATS`."""
    if rules.encode_format == "auto":
        return "png" if header.format in LOSSLESS_FORMATS else "jpeg"
    return "jpeg" if rules.encode_format == "jpg" else rules.encode_format
