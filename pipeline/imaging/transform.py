"""Processes images from bytes to bytes: probe, decode, filter, resize, encode. Uses no files, SLURM or torch.

`geometry` determines sizes; images are enlarged only with `upscale`. `min_image_size`, `max_image_area` and
`max_aspect_ratio` apply to the original.

The interpolation is bicubic (a = -0.5), or another of `INTERPOLATIONS`, with antialiasing, on the stored 8-bit values
(no gamma correction). JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if both edges stay at least twice the target,
and then interpolated. The ICC profile and the EXIF orientation are applied after resizing.

An image keeps its bytes if it is an upright, single-frame JPEG, PNG or WebP with 8-bit RGB or grey pixels without
alpha, in sRGB or without a profile, if it needs no resizing and has no boxes to blur, and if it decodes without
warnings. All others are re-encoded without metadata: alpha (over `background`), palettes, CMYK, 16-bit, BMP, TIFF, GIF,
AVIF, rotated files, animated ones (their first frame), and JPEGs with arithmetic coding or odd subsampling, which
training decoders may reject.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any
from zlib import crc32, decompressobj

import numpy as np
import numpy.typing as npt
import PIL
import simplejpeg
from PIL import Image, ImageColor, TiffImagePlugin

from pipeline.imaging import color
from pipeline.imaging.blur import Boxes, blurred
from pipeline.imaging.headers import (
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
    png_pixels,
    probe,
)
from pipeline.imaging.phash import EDGE, phash
from pipeline.imaging.resize import INTERPOLATIONS, RESIZERS, Pixels, Size, resize

__all__ = [
    "ENCODE_FORMATS",
    "FORMATS",
    "INTERPOLATIONS",
    "RESIZERS",
    "RESIZE_MODES",
    "Dropped",
    "Geometry",
    "ImageError",
    "Limits",
    "Pixels",
    "Probe",
    "Result",
    "Rules",
    "decode",
    "decode_fast",
    "encode",
    "geometry",
    "judge",
    "probe",
    "process",
    "render",
    "resize",
    "target_size",
]

RESIZE_MODES = ("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no")
ENCODE_FORMATS = ("jpg", "png", "webp", "auto")
VALIDATIONS = ("full", "header")
ICC_MODES = ("srgb", "ignore")
_MAX_EDGE = {"jpeg": 65_500, "webp": 16_383}
"""Maximum pixels per edge of a format."""
_DCT_MARGIN = 2
"""Both edges of a scaled decode are at least this multiple of the target's. Measured by `benchmarks/images.py` against
a full decode with bicubic interpolation in floats: 1.5 costs 4 dB, and 1 gives less than 40 dB if details are finer
than the target. """


class Dropped(Exception):
    """A valid image that the rules drop. `reason` is a snake_case identifier such as `too_small`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Rules:
    """How images are processed. All fields are part of the output's identity."""

    min_image_size: int = 256
    """Images whose original has a shorter edge below this, in pixels, are dropped as `too_small`."""
    max_image_size: int = 512
    """Target edge of `resize_mode` for larger images, in pixels; 0: no limit."""
    resize_mode: str = "keep_ratio"
    """One of `RESIZE_MODES`; see `geometry`."""
    max_image_area: int = 0
    """Images whose original has more pixels are dropped as `too_large`; 0: no limit."""
    max_aspect_ratio: float = 0.0
    """Images with a larger ratio of longer to shorter edge are dropped as `too_elongated`; 0: no limit."""
    encode_format: str = "jpg"
    """Format of changed images: `jpg` (4:2:0), `png`, `webp`, or `auto` (PNG if the source is lossless, else JPEG)."""
    encode_quality: int = 95
    """1 to 100, for JPEG and WebP."""
    skip_reencode: bool = True
    """Whether images that need no change keep their bytes; False: re-encode all."""
    validate: str = "full"
    """Whether images that keep their bytes are decoded to check them (`full`) or not (`header`)."""
    background: str = "white"
    """Colour under transparent pixels, and of the border: a CSS name or `#rrggbb`."""
    icc: str = "srgb"
    """Whether images with another profile are converted to `srgb`, or the profile is dropped (`ignore`)."""
    scaled_decode: bool = True
    """Whether to decode large JPEGs at a fraction of their size if that changes little; False: always in full."""
    resize: str = "fast"
    """Resizing backend, one of `RESIZERS`: `fast` (SIMD), `pillow`, or `simd` (pillow-simd instead of Pillow)."""

    interpolation: str = "bicubic"
    """One of `INTERPOLATIONS`, all antialiased."""
    upscale: bool = False
    """Whether smaller images are enlarged to `max_image_size`."""

    def __post_init__(self) -> None:
        for name in ("min_image_size", "max_image_size", "max_image_area", "max_aspect_ratio"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 1 <= self.encode_quality <= 100:
            raise ValueError(f"encode_quality={self.encode_quality} is not in 1..100")
        for name, known in (
            ("encode_format", ENCODE_FORMATS),
            ("resize", RESIZERS),
            ("resize_mode", RESIZE_MODES),
            ("validate", VALIDATIONS),
            ("icc", ICC_MODES),
            ("interpolation", INTERPOLATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {', '.join(known)}")
        if self.resize_mode in ("border", "center_crop") and self.max_image_size == 0:
            raise ValueError(f"resize_mode={self.resize_mode} needs a max_image_size")
        if self.resize == "simd" and ".post" not in PIL.__version__:
            raise ValueError("resize=simd needs pillow-simd instead of Pillow; resize=fast is as fast without it")
        try:
            self.background_rgb  # noqa: B018
        except ValueError:
            raise ValueError(f"background={self.background} is not a colour: give a name or #rrggbb") from None

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        red, green, blue = ImageColor.getrgb(self.background)[:3]
        return red, green, blue


@dataclass(frozen=True, slots=True)
class Result:
    """An image to keep."""

    data: bytes
    format: str
    """One of `FORMATS`."""
    width: int
    height: int
    source_width: int
    """Size of the upright original; the smaller edge is a sample's `min_side`."""
    source_height: int
    changed: bool
    """Whether the image was re-encoded; False: `data` is the original, bit for bit."""
    phash: str = ""
    """The perceptual hash of the whole upright image; empty if it has none or was not decoded."""


def process(data: bytes, rules: Rules, limits: Limits = DEFAULT_LIMITS, boxes: Boxes = ()) -> Result:
    """Apply the rules to an image file and blur `boxes`; the result depends only on the arguments.

    Kept images have been decoded without errors, except with `validate="header"`.

    Raises:
        ImageError: the file is invalid.
        Dropped: the rules drop the image.
    """
    header = probe(data, limits)
    source = header.upright
    _check_source(source, rules)
    shape = geometry(*source, rules)
    if rules.icc == "ignore" and header.icc:
        header = replace(header, icc=b"")
    if shape.unchanged(source) and rules.skip_reencode and _passes_through(header) and not boxes:
        look = ""
        if rules.validate == "full":  # reads all data, but need not compute all pixels
            look = _phash(_decode(data, header, limits, at_least=(EDGE, EDGE))[0])
        return Result(data, header.format, *source, *source, changed=False, phash=look)
    format = _encode_format(header, rules)
    if max(shape.canvas) > _MAX_EDGE.get(format, max(shape.canvas)):
        width, height = shape.canvas
        raise ImageError("edge_too_long", f"{width}x{height}, {format} holds {_MAX_EDGE[format]} pixels per edge")
    pixels = blurred(_whole(data, header, shape.sized, rules, limits), boxes)
    data = encode(_placed(pixels, shape, rules.background_rgb), format, rules.encode_quality)
    return Result(data, format, *shape.canvas, *source, changed=True, phash=_phash(pixels))


def _phash(pixels: Pixels) -> str:
    return phash(resize(pixels, (EDGE, EDGE)))


def judge(
    data: bytes, rules: Rules, limits: Limits = DEFAULT_LIMITS, boxes: Boxes = ()
) -> Result | ImageError | Dropped:
    """`process` for a worker: exceptions are returned instead of raised."""
    try:
        return process(data, rules, limits, boxes)
    except (ImageError, Dropped) as error:
        return error.with_traceback(None)
    except MemoryError:
        return ImageError("out_of_memory")


def render(data: bytes, header: Probe, shape: Geometry, rules: Rules, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """The pixels (h, w, c) to encode: resized, upright, in sRGB, and on the canvas."""
    return _placed(_whole(data, header, shape.sized, rules, limits), shape, rules.background_rgb)


def _whole(data: bytes, header: Probe, size: Size, rules: Rules, limits: Limits) -> Pixels:
    """The whole image at `size`, upright and in sRGB."""
    resized = size != header.upright
    pixels, scale = _decode(data, header, limits, size if rules.scaled_decode and resized else None, rules)
    if resized:
        pixels = _resize_stored(pixels, scale, header, size, rules)
    pixels = _upright(pixels, _turn(header))
    if header.icc and header.mode in _BY_PROFILE and color.converts(header.icc, _BY_PROFILE[header.mode]):
        pixels = _converted(pixels, header.icc, _BY_PROFILE[header.mode])
    return pixels


def _check_source(size: Size, rules: Rules) -> None:
    width, height = size
    small, large = sorted(size)
    if small < rules.min_image_size:
        raise Dropped("too_small", f"{width}x{height}, min_image_size is {rules.min_image_size}")
    if rules.max_image_area and width * height > rules.max_image_area:
        raise Dropped("too_large", f"{width}x{height}, max_image_area is {rules.max_image_area}")
    if rules.max_aspect_ratio and large > rules.max_aspect_ratio * small:
        raise Dropped("too_elongated", f"{width}x{height}, max_aspect_ratio is {rules.max_aspect_ratio:g}")


def _passes_through(header: Probe) -> bool:
    if not header.plain or header.orientation != 1:
        return False
    return not (header.icc and color.converts(header.icc, _BY_PROFILE.get(header.mode, "RGB")))


# ---------------------------------------------------------------- sizes


@dataclass(frozen=True, slots=True)
class Geometry:
    """The size of a resized upright image, and of the canvas on which it is centred, cropped or padded."""

    sized: Size
    canvas: Size

    @property
    def offset(self) -> tuple[int, int]:
        """Position (x, y) of the resized image's corner on the canvas: half of the padding, or minus half of the
        cropped pixels, rounded towards 0."""
        (width, height), (across, down) = self.sized, self.canvas
        return _half(across - width), _half(down - height)

    def unchanged(self, source: Size) -> bool:
        return self.sized == self.canvas == source


def _half(free: int) -> int:
    return free // 2 if free >= 0 else -(-free // 2)


def geometry(width: int, height: int, rules: Rules) -> Geometry:
    """Apply `rules` to the size of an upright image. With m = `max_image_size`:

    - `keep_ratio`: a shorter edge above m becomes m; the longer one follows the ratio.
    - `keep_ratio_largest`: a longer edge above m becomes m; the shorter one follows the ratio, and is at least 1.
    - `center_crop`: as `keep_ratio`, then cropped to the central square.
    - `border`: as `keep_ratio_largest`, then centred on a square with edge m in the background colour.
    - `no`: unchanged.

    With `upscale`, an edge below m becomes m, too. Ratios are rounded half up with integers, so that all platforms
    round alike.
    """
    most = rules.max_image_size
    if rules.resize_mode == "no" or most == 0:
        return Geometry((width, height), (width, height))
    if rules.resize_mode in ("keep_ratio", "center_crop"):
        sized = target_size(width, height, most, upscale=rules.upscale)
        square = min(sized)
        return Geometry(sized, (square, square) if rules.resize_mode == "center_crop" else sized)
    sized = _scaled(width, height, most, max(width, height), rules.upscale)
    return Geometry(sized, (most, most) if rules.resize_mode == "border" else sized)


def target_size(width: int, height: int, max_image_size: int, *, upscale: bool = False) -> Size:
    """(width, height) after resizing with `keep_ratio`: the shorter edge is at most `max_image_size` (0: no limit), or
    exactly that with `upscale`."""
    return _scaled(width, height, max_image_size, min(width, height), upscale)


def _scaled(width: int, height: int, most: int, edge: int, upscale: bool) -> Size:
    """The size at which `edge`, one of the two, is at most `most` (0: no limit), or exactly that with `upscale`."""
    if most == 0 or (edge <= most and not upscale):
        return width, height
    return max(1, (2 * width * most + edge) // (2 * edge)), max(1, (2 * height * most + edge) // (2 * edge))


def _placed(pixels: Pixels, shape: Geometry, background: tuple[int, int, int]) -> Pixels:
    """The upright resized image (h, w, c) on its canvas."""
    if shape.canvas == shape.sized:
        return pixels
    (x, y), (across, down), (width, height) = shape.offset, shape.canvas, shape.sized
    cut = pixels[max(0, -y) : max(0, -y) + down, max(0, -x) : max(0, -x) + across, :3]
    canvas = np.empty((down, across, 3), np.uint8)
    canvas[:] = background
    canvas[max(0, y) : max(0, y) + height, max(0, x) : max(0, x) + width] = cut
    return canvas


# ---------------------------------------------------------------- decoding


def decode(data: bytes, header: Probe, limits: Limits = DEFAULT_LIMITS, at_least: Size | None = None) -> Pixels:
    """Decode the first frame to upright RGB, (h, w, 3): alpha over white, and colours as stored.

    With `at_least` (the upright target size), the result may be smaller; see `_decode`.

    Raises:
        ImageError: the file is invalid, even if a decoder would only warn (a truncated JPEG, filled with grey) or not
            check (the checksums of a PNG).
    """
    return np.ascontiguousarray(_upright(_decode(data, header, limits, at_least)[0], _turn(header))[:, :, :3])


def decode_fast(data: bytes, header: Probe, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Like :func:`decode` at full size, but (h, w, 4) with an unused last byte if the decoder returns that, because
    removing it takes as long as decoding a JPEG."""
    return _upright(_decode(data, header, limits)[0], _turn(header))


def _decode(
    data: bytes, header: Probe, limits: Limits, at_least: Size | None = None, rules: Rules | None = None
) -> tuple[Pixels, int]:
    """Decode an image to (h, w, c) as stored, not rotated upright; return it with the denominator of its scale.

    With `at_least` (the upright target size), a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, rounded up, with
    both edges at least `_DCT_MARGIN` times the target. Its data are still read and checked to the end: errors show
    while reading the coefficients, before pixels are computed."""
    if header.format == "jpeg" and is_turbo_jpeg(data) and not _is_managed_cmyk(header):
        return _decode_jpeg(data, header, at_least)
    if header.format == "png":
        _check_png_sums(data)
    return _decode_pillow(data, header, limits, rules), 1


def _is_managed_cmyk(header: Probe) -> bool:
    return header.mode == "CMYK" and color.converts(header.icc, "CMYK")


def _decode_jpeg(data: bytes, header: Probe, at_least: Size | None) -> tuple[Pixels, int]:
    """CMYK is treated as inverted, with or without Adobe's marker, as Adobe writes and browsers and Pillow read it."""
    scale = 1
    if at_least is not None:
        target = at_least[::-1] if header.orientation >= 5 else at_least
        # Powers of two only: other scales have no fast IDCT and take longer than a full decode.
        scale = next((s for s in (8, 4, 2) if _scaled_enough(header, s, target)), 1)
    width, height = -(-header.width // scale), -(-header.height // scale)
    try:
        pixels = _decoded_jpeg(data, width, height)
    except MemoryError:
        raise ImageError("out_of_memory") from None
    except ValueError as error:
        raise ImageError(*explain(error)) from error
    return _of_size(pixels, width, height), scale


_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
"""libjpeg's message about bytes between the image data and the end marker, which cameras add as padding."""


def _decoded_jpeg(data: bytes, width: int, height: int) -> Pixels:
    """Decode to RGBX. Raises ValueError for all warnings of the decoder, except about padding before the end marker:
    the file must then decode without warnings when the padding is removed."""

    def decode(data: bytes) -> Pixels:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGBX", min_width=width, min_height=height, strict=True)
        return pixels

    try:
        return decode(data)
    except ValueError as error:
        found = _EXTRANEOUS.search(str(error))
        end = data.rfind(b"\xff\xd9")
        if not found or end < int(found[1]):
            raise
        return decode(data[: end - int(found[1])] + b"\xff\xd9")


def _scaled_enough(header: Probe, scale: int, target: Size) -> bool:
    return header.width >= _DCT_MARGIN * scale * target[0] and header.height >= _DCT_MARGIN * scale * target[1]


def _decode_pillow(data: bytes, header: Probe, limits: Limits, rules: Rules | None) -> Pixels:
    background = rules.background_rgb if rules else (255, 255, 255)
    with opened(png_pixels(data) if header.format == "png" else data, header.format, limits) as image:
        image.load()
        if header.format == "png":
            _check_png_rows(data, header, image)
        pixels = np.array(_to_rgb(image, header, background))  # inside the block: converting a damaged palette raises
    return _of_size(pixels, *(header.upright if header.format == "tiff" else (header.width, header.height)))


def _of_size(pixels: Pixels, width: int, height: int) -> Pixels:
    if pixels.shape[:2] != (height, width):
        raise ImageError("size_mismatch", f"{pixels.shape[1]}x{pixels.shape[0]}, its header says {width}x{height}")
    return pixels


def _check_png_sums(data: bytes) -> None:
    """Verify the checksums of all chunks: Pillow does not verify those of the pixels, and zlib verifies its own only at
    the end of the data."""
    view = memoryview(data)
    for kind, start, end in png_chunks(data):
        if crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ImageError("decode_error", f"wrong checksum of PNG chunk {kind!r}")


def _check_png_rows(data: bytes, header: Probe, image: Image.Image) -> None:
    """Raise `ImageError` if a PNG lacks rows, which Pillow silently leaves zero.

    Inflating the data again costs half of a decode, so it is only done if the last row is zero or the image is
    interlaced.
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
"""Passes of an interlaced PNG: first column, first row, column step and row step."""


def _to_rgb(image: Image.Image, header: Probe, background: tuple[int, int, int]) -> Image.Image:
    """Convert any Pillow mode to RGB: alpha over the background, more than 8 bits scaled down, CMYK by profile."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _narrowed(image)
    elif "transparency" in image.info and header.format == "png":
        image.info["transparency"] = _transparent_level(image.info["transparency"], header.mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        under = Image.new("RGB", image.size, background)
        under.paste(image, mask=image.getchannel("A"))
        return under
    if image.mode == "CMYK":
        return color.to_srgb(image, header.icc)
    return image if image.mode == "RGB" else image.convert("RGB")


def _transparent_level(level: Any, mode: str) -> Any:
    """Scale the transparent colour of a PNG to 8 bits; Pillow scales only the pixels."""
    bits = int(mode.partition(";")[2] or 8)
    if mode.startswith("RGB;"):
        return tuple(value >> 8 for value in level)
    return level * 255 // (2**bits - 1) if mode.startswith("L;") or mode == "1" else level


def _narrowed(image: Image.Image) -> Image.Image:
    """Convert 16-bit, 32-bit and float grey images to `L`, or to `LA` if one level is transparent.

    16-bit values are reduced to the high byte, as Pillow does for 16-bit RGB; TIFFs with fewer bits are shifted
    likewise. 32-bit integers and floats have no defined white level: it is the smallest of 1 (floats only), 255, 65535
    and 2^32 - 1 that no value exceeds.
    """
    values = np.asarray(image)
    level = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        grey = (values >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow handles for 8 bits only
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
"""Functions that return the upright view of a stored image (h, w), by EXIF orientation."""


def _turn(header: Probe) -> int:
    """The orientation that remains to be applied to decoded pixels: Pillow has already rotated TIFF images."""
    return 1 if header.format == "tiff" else header.orientation


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    # One item per pixel: NumPy copies this twice as fast as an axis of 3.
    channels = pixels.shape[2]
    items = np.ascontiguousarray(pixels).view(f"V{channels}")[:, :, 0]
    turned = np.ascontiguousarray(_TURNS[orientation](items))
    return turned.view(np.uint8).reshape(*turned.shape, channels)


_BY_PROFILE = {"L": "L", "I;16": "L", "L;2": "L", "L;4": "L", "1": "L", "LA": "L", "LA;16": "L"} | dict.fromkeys(
    ("RGB", "RGBA", "RGB;16", "RGBA;16", "P", "P;1", "P;2", "P;4"), "RGB"
)
"""Pillow's mode that the profile refers to, by the mode of the file. (CMYK is converted while decoding.)"""


def _converted(pixels: Pixels, icc: bytes, mode: str) -> Pixels:
    """Convert RGB pixels (h, w, c), decoded from `mode`, to sRGB (h, w, 3)."""
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if mode == "L" else pixels[:, :, :3]))
    return np.asarray(color.to_srgb(image, icc))


# ---------------------------------------------------------------- resizing


def _resize_stored(pixels: Pixels, scale: int, header: Probe, size: Size, rules: Rules) -> Pixels:
    """Resize an image as stored, decoded at 1/`scale` of its size, to `size` (upright).

    If `scale` does not divide the size, only a part of the last row and column lies in the image; treating them as
    complete would shift the image by up to a pixel, which costs 6 dB. All orientations give the same pixels, because an
    image stored sideways is resized along the other axis first.
    """
    backend, kind = rules.resize, rules.interpolation
    width, height = header.upright if header.format == "tiff" else (header.width, header.height)
    box = (0, 0, width / scale, height / scale)
    if _turn(header) < 5:
        return resize(pixels, size, backend, box, kind)
    across, down = size[::-1]
    if backend == "fast":  # resizes columns first; Pillow resizes rows first
        return resize(
            resize(pixels, (across, pixels.shape[0]), backend, (0, 0, box[2], pixels.shape[0]), kind),
            (across, down),
            backend,
            (0, 0, across, box[3]),
            kind,
        )
    return resize(
        resize(pixels, (pixels.shape[1], down), backend, (0, 0, pixels.shape[1], box[3]), kind),
        (across, down),
        backend,
        (0, 0, box[2], down),
        kind,
    )


# ---------------------------------------------------------------- encoding


def encode(pixels: Pixels, format: str, quality: int = 95) -> bytes:
    """Encode `pixels` (h, w, c) as `jpeg` (4:2:0, explicitly, because libraries' defaults differ), `png` or `webp`."""
    pixels = np.ascontiguousarray(pixels)
    if format == "jpeg":
        return bytes(simplejpeg.encode_jpeg(pixels, quality, "RGBX" if pixels.shape[2] == 4 else "RGB", "420"))
    file = BytesIO()
    options = {"quality": quality} if format == "webp" else {}
    Image.fromarray(np.ascontiguousarray(pixels[:, :, :3])).save(file, format.upper(), **options)
    return file.getvalue()


def _encode_format(header: Probe, rules: Rules) -> str:
    """The output format of a changed image, one of `FORMATS`."""
    if rules.encode_format == "auto":
        return "png" if header.format in LOSSLESS_FORMATS else "jpeg"
    return "jpeg" if rules.encode_format == "jpg" else rules.encode_format
