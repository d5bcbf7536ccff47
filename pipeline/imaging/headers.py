"""Reads format, size and orientation of an image file, and checks its end, without decoding pixels.

Memory is never allocated according to a header. Formats are recognized by magic bytes, never by the file name; formats
that are not in `FORMATS` are rejected. JPEG, PNG, WebP and GIF are parsed here, because their libraries allocate memory
while opening (WebP) or accept truncated files (PNG, GIF). Pillow parses the others.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from zlib import decompressobj
from zlib import error as ZlibError

from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError

from pipeline.imaging.color import MAX_PROFILE
from pipeline.imaging.tiff import without_lost_fields

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # our errors include its messages about bad files

FORMATS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000")
LOSSLESS_FORMATS = ("png", "gif", "bmp", "tiff")

_MAX_SCANS = 500
"""A JPEG of a few kilobytes can request thousands of passes over all of its pixels; real ones have about 10."""


class ImageError(Exception):
    """An image that cannot be used. `reason` is a snake_case identifier for the ledger; `detail` is for people.

    Both depend only on the bytes and the limits (no memory addresses, paths or times), so that ledgers are
    reproducible. Reasons include `empty`, `svg`, `html`, `unknown_format`, `too_many_bytes`, `too_many_pixels`,
    `too_many_scans`, `too_many_frames`, `zero_size`, `truncated`, `decode_error`, `size_mismatch`, `unsupported_mode`,
    `edge_too_long` and `out_of_memory`.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that are checked before decoding."""

    max_pixels: int = 178_956_970 // 2
    """Width times height; the default is Pillow's (a quarter of a gibibyte at 3 bytes per pixel)."""
    max_bytes: int = 128 * 2**20
    """Size of the file in bytes."""
    max_frames: int = 10_000
    """Frames of an animation, of which only the first is used."""


@dataclass(frozen=True, slots=True)
class Probe:
    """An image file's header."""

    format: str
    """One of `FORMATS`."""
    width: int
    """Pixels, as stored: before the orientation is applied."""
    height: int
    mode: str
    """Pillow's mode of the stored pixels (`1`, `L`, `P`, `RGB`, `RGBA`, `CMYK`, …); 16-bit PNG: `I;16`, `RGB;16`, …"""
    orientation: int
    """EXIF orientation, 1 to 8; 1 if there is none or it is damaged."""
    frames: int
    """Frames of an animation (GIF, APNG, WebP, AVIF), otherwise 1; the first is used. TIFF pages are not counted."""
    has_alpha: bool
    """Whether the header declares an alpha channel or a transparent colour, even if every pixel is opaque."""
    plain: bool
    """Whether every decoder of training images reads the same 8-bit RGB or grey pixels from these bytes as from a
    re-encoded copy."""
    icc: bytes = field(default=b"", repr=False)
    """The ICC profile, not validated; empty if there is none or it is longer than `color.MAX_PROFILE`."""

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) in pixels after the orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


DEFAULT_LIMITS = Limits()


def probe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Probe:
    """Parse the header of an image file.

    Raises:
        ImageError: the file is invalid, exceeds `limits` or, if the format allows to detect it, is truncated.
    """
    if not data:
        raise ImageError("empty")
    if len(data) > limits.max_bytes:
        raise ImageError("too_many_bytes", f"{len(data)} bytes, max_bytes is {limits.max_bytes}")
    return _PROBES[sniff(data)](data, limits)


def sniff(data: bytes) -> str:
    """Detect the format by magic bytes. Raises `ImageError` with the reason `svg`, `html` or `unknown_format`."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp" and _is_avif(data):
        return "avif"
    text = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        if b"<svg" in text or b"<!doctype svg" in text:
            raise ImageError("svg", "vector graphics are not decoded")
        if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
            raise ImageError("html", "a web page, not an image")
    raise ImageError("unknown_format", f"starts with {data[:8].hex()}")


_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg2000"),
    (b"\xff\x4f\xff\x51", "jpeg2000"),
)


def _is_avif(data: bytes) -> bool:
    """Whether the brands of an ISO media file (the major one, and compatible ones from byte 16) include AVIF."""
    brands = data[8:12] + data[16 : min(int.from_bytes(data[:4], "big"), 512)]
    return any(brands[at : at + 4] in (b"avif", b"avis") for at in range(0, len(brands), 4))


def _checked(found: Probe, limits: Limits) -> Probe:
    if found.width < 1 or found.height < 1:
        raise ImageError("zero_size", f"{found.width}x{found.height}")
    if found.width * found.height > limits.max_pixels:
        raise ImageError("too_many_pixels", f"{found.width}x{found.height}, max_pixels is {limits.max_pixels}")
    if found.frames > limits.max_frames:
        raise ImageError("too_many_frames", f"{found.frames}, max_frames is {limits.max_frames}")
    return found


# ---------------------------------------------------------------- JPEG (ITU T.81, annex B)

_SUBSAMPLINGS = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (1, 4)}
"""Luma sampling factors (with chroma 1x1) that TurboJPEG supports: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1, 4:4:1."""


def _probe_jpeg(data: bytes, limits: Limits) -> Probe:
    orientation, frame, scan = 1, None, b""
    profile: dict[bytes, bytes] = {}
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xE1 and orientation == 1 and data.startswith(b"Exif\0\0", start):
            orientation = exif_orientation(data[start + 6 : end])
        elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", start):  # number, count, data
            profile.setdefault(data[start + 12 : start + 13], data[start + 14 : end])
        elif _is_frame(marker) and frame is None:
            frame = marker, data[start:end]
        elif marker == 0xDA:
            scan = data[start:end]
    if frame is None:
        raise ImageError("decode_error", "JPEG without a frame header")
    coding, header = frame
    if len(header) < 6 or len(header) < 6 + 3 * header[5]:
        raise ImageError("decode_error", "short frame header")
    bits, height, width, components = struct.unpack_from(">BHHB", header)
    if bits != 8 or components not in (1, 3, 4):
        raise ImageError("unsupported_mode", f"JPEG with {components} components of {bits} bits")
    single = coding in (0xC0, 0xC1) and scan[:1] == bytes([components])  # decoders ignore further scans
    if not single and data.count(b"\xff\xda") > _MAX_SCANS:
        raise ImageError("too_many_scans", f"more than {_MAX_SCANS} scans")
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[components]
    # All decoders read baseline, extended and progressive Huffman files, but not arithmetic coding or odd subsampling.
    plain = components != 4 and coding in (0xC0, 0xC1, 0xC2) and _is_common_subsampling(header)
    icc = _profile(b"".join(profile[number] for number in sorted(profile)))
    return _checked(Probe("jpeg", width, height, mode, orientation, 1, False, plain, icc), limits)


def _profile(icc: bytes) -> bytes:
    return icc if len(icc) <= MAX_PROFILE else b""


def is_turbo_jpeg(data: bytes) -> bool:
    """Whether TurboJPEG decodes the subsampling of a JPEG that `probe` accepted."""
    frames = (data[start:end] for marker, start, end in _jpeg_segments(data) if _is_frame(marker))
    return _is_common_subsampling(next(frames))


def _is_frame(marker: int) -> bool:
    """Whether `marker` is one of SOF0 to SOF15, which excludes DHT (C4), JPG (C8) and DAC (CC)."""
    return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)


def _is_common_subsampling(header: bytes) -> bool:
    """Whether luma (and black) have one of `_SUBSAMPLINGS` and chroma 1x1. `header` is a frame header's payload."""
    factors = [divmod(factor, 16) for factor in header[7 : 6 + 3 * header[5] : 3]]
    if len(factors) == 1:
        return True
    return factors[0] in _SUBSAMPLINGS and factors[1:3] == [(1, 1), (1, 1)] and factors[3:] in ([], factors[:1])


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end of payload) of all segments to the first scan. Raises `ImageError` without a scan."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ImageError("decode_error", "no marker where one must be")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a payload
            at += 2
        elif marker in (0xD9, 0xDA):
            break
        else:
            start, at = at + 4, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if at < start:
                raise ImageError("decode_error", f"segment {marker:#04x} without a length")
            yield marker, start, at
    if at + 4 > len(data) or data[at + 1] != 0xDA:
        raise ImageError("truncated", "JPEG without a scan")
    yield 0xDA, at + 4, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def exif_orientation(exif: bytes) -> int:
    """Read the orientation, 1 to 8, from the first directory of an EXIF block, which begins with a TIFF header.

    Damaged EXIF data give 1: browsers show such images as stored, which is also what caption authors saw.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            return 1
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for index in range(entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", exif, directory + 2 + 12 * index)
            if tag == 0x0112:
                return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


# ---------------------------------------------------------------- PNG (W3C PNG, third edition, section 5)

_PNG_MODES = {
    (1, 0): "1",
    (2, 0): "L;2",
    (4, 0): "L;4",
    (8, 0): "L",
    (16, 0): "I;16",
    (8, 2): "RGB",
    (16, 2): "RGB;16",
    (1, 3): "P;1",
    (2, 3): "P;2",
    (4, 3): "P;4",
    (8, 3): "P",
    (8, 4): "LA",
    (16, 4): "LA;16",
    (8, 6): "RGBA",
    (16, 6): "RGBA;16",
}


def _probe_png(data: bytes, limits: Limits) -> Probe:
    orientation, frames, alpha, icc, readable = 1, 1, False, b"", True
    for kind, start, end in png_chunks(data):
        readable = readable and not (kind in _PNG_TEXTS and _is_long_text(kind, data[start:end]))
        if kind == b"tRNS":
            alpha = True
        elif kind == b"eXIf":
            orientation = exif_orientation(data[start:end])
        elif kind == b"iCCP" and not icc:
            icc = _inflated_profile(data[start:end])
        elif kind == b"acTL" and end - start == 8:
            frames = max(1, int.from_bytes(data[start : start + 4], "big"))
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    mode = _PNG_MODES.get((bits, colour))
    if mode is None:
        raise ImageError("decode_error", f"PNG with {bits} bits of colour type {colour}")
    alpha |= colour in (4, 6)
    plain = mode in ("L", "RGB") and not alpha and frames == 1 and readable
    return _checked(Probe("png", width, height, mode, orientation, frames, alpha, plain, icc), limits)


_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Metadata chunks. Pillow rejects files in which one is long or unpacks to more than 1 MiB."""
_LONG_TEXT = 1 << 20


def _is_long_text(kind: bytes, chunk: bytes) -> bool:
    """Whether other decoders may reject a PNG because of this chunk."""
    if len(chunk) > _LONG_TEXT:
        return True
    if kind == b"tEXt" or len(chunk) * 1032 < _LONG_TEXT:  # maximum compression ratio of deflate
        return False
    packed = chunk.partition(b"\0")[2]
    if kind == b"iTXt":  # flag, method, then language and keyword, both zero-terminated
        packed = b"" if packed[:1] != b"\1" else packed[2:].split(b"\0", 2)[-1]
    else:
        packed = packed[1:]
    try:
        return len(decompressobj().decompress(packed, _LONG_TEXT + 1)) > _LONG_TEXT
    except ZlibError:
        return True


def png_pixels(data: bytes) -> bytes:
    """Remove texts and the profile from a PNG, which do not affect pixels; return ``data`` itself if it has none.

    Raises:
        ImageError: the file is truncated.
    """
    chunks = list(png_chunks(data))
    if not any(kind in _PNG_TEXTS for kind, _, _ in chunks):
        return data
    return data[:8] + b"".join(data[start - 8 : end + 4] for kind, start, end in chunks if kind not in _PNG_TEXTS)


def _inflated_profile(chunk: bytes) -> bytes:
    """Decompress an iCCP chunk: name, zero byte, method 0, and zlib data, which may be a decompression bomb."""
    try:
        return _profile(decompressobj().decompress(chunk.partition(b"\0")[2][1:], MAX_PROFILE + 1))
    except ZlibError:
        return b""


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end of payload) of each chunk from IHDR to IEND. Raises `ImageError` if either is missing."""
    at, kind = 8, b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise ImageError("truncated", "PNG without its end")
        kind, start = data[at + 4 : at + 8], at + 8
        end = start + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            raise ImageError("truncated", "PNG without its end")
        if at == 8 and (kind != b"IHDR" or end - start != 13):
            raise ImageError("decode_error", "PNG without its header")
        yield kind, start, end
        at = end + 4


# ---------------------------------------------------------------- WebP (RFC 9649)


def _probe_webp(data: bytes, limits: Limits) -> Probe:
    chunks = list(_webp_chunks(data))
    kind, start = chunks[0][:2] if chunks else (b"", 0)
    head = data[start : start + 10]
    if len(head) < (5 if kind == b"VP8L" else 10):
        raise ImageError("truncated", "WebP without a picture")
    if kind == b"VP8X":  # flags, 3 reserved bytes, 24 bits each of width - 1 and height - 1
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (4, 7))
        alpha = bool(head[0] & 0x10)
    elif kind == b"VP8L":  # signature, 14 bits of width - 1, 14 bits of height - 1, alpha bit
        word = int.from_bytes(head[1:5], "little")
        width, height, alpha = (word & 0x3FFF) + 1, (word >> 14 & 0x3FFF) + 1, bool(word >> 28 & 1)
    elif kind == b"VP8 ":  # 3 bytes of frame tag, 3 of start code, 14 bits each of width and height
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        alpha = False
    else:
        raise ImageError("decode_error", "WebP without a picture")
    frames = max(1, sum(chunk == b"ANMF" for chunk, _, _ in chunks))
    exif = next((data[begin:end] for chunk, begin, end in chunks if chunk == b"EXIF"), b"")
    orientation = exif_orientation(exif.removeprefix(b"Exif\0\0"))
    icc = _profile(next((data[begin:end] for chunk, begin, end in chunks if chunk == b"ICCP"), b""))
    animated = any(chunk == b"ANIM" for chunk, _, _ in chunks)
    mode = "RGBA" if alpha else "RGB"
    plain = not alpha and not animated
    return _checked(Probe("webp", width, height, mode, orientation, frames, alpha, plain, icc), limits)


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end of payload) of each chunk of a RIFF file. Raises `ImageError` if it is truncated."""
    file_end = 8 + int.from_bytes(data[4:8], "little")
    if file_end > len(data):
        raise ImageError("truncated", f"WebP of {file_end} bytes, {len(data)} are there")
    at = 12
    while at + 8 <= file_end:
        start = at + 8
        end = start + int.from_bytes(data[at + 4 : at + 8], "little")
        if end > file_end:
            raise ImageError("truncated", "WebP chunk beyond the end")
        yield data[at : at + 4], start, end
        at = end + end % 2


# ---------------------------------------------------------------- GIF (GIF89a specification)


def _probe_gif(data: bytes, limits: Limits) -> Probe:
    """Reads all blocks, in linear time, because only the trailer shows that a GIF is complete."""
    try:
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        at = 13 + _colour_table(flags)
        frames, alpha = 0, False
        while (block := data[at]) != 0x3B:
            if block == 0x21:
                alpha |= frames == 0 and data[at + 1] == 0xF9 and bool(data[at + 3] & 1)
                at = _skip_blocks(data, at + 2)
            elif block == 0x2C:
                left, top, across, down, flags = struct.unpack_from("<HHHHB", data, at + 1)
                if frames == 0:  # Pillow and browsers grow the canvas to hold the first frame
                    width, height = max(width, left + across), max(height, top + down)
                frames += 1
                at = _skip_blocks(data, at + 11 + _colour_table(flags))
            else:
                raise ImageError("decode_error", f"GIF block {block:#04x}")
    except (IndexError, struct.error):
        raise ImageError("truncated", "GIF without its end") from None
    if frames == 0:
        raise ImageError("decode_error", "GIF without a frame")
    return _checked(Probe("gif", width, height, "P", 1, frames, alpha, False), limits)


def _colour_table(flags: int) -> int:
    """Size in bytes of the colour table according to `flags`."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip_blocks(data: bytes, at: int) -> int:
    """Offset of the end of a chain of sub-blocks: each begins with its length, and the last has length 0."""
    while data[at]:
        at += data[at] + 1
    return at + 1


# ---------------------------------------------------------------- other formats, by Pillow


def _probe_pillow(data: bytes, limits: Limits) -> Probe:
    with opened(data, sniff(data), limits) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Pillow rotates TIFF images: both the size and, after load(), the pixels are upright.
            tag = image.tag_v2.get(0x0112)
            orientation = tag if isinstance(tag, int) and 1 <= tag <= 8 else 1
            if orientation >= 5:
                width, height = height, width
        else:
            orientation = exif_orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
        frames = int(getattr(image, "n_frames", 1)) if image.format == "AVIF" else 1
        found = Probe(
            str(image.format).lower(),
            width,
            height,
            image.mode,
            orientation,
            frames,
            image.has_transparency_data,
            plain=False,
            icc=_profile(image.info.get("icc_profile") or b""),
        )
    return _checked(found, limits)


_HARMLESS = (
    r"Metadata Warning, tag \d+ had too many entries",
    r"Possibly corrupt EXIF (MakerNote )?data",
    r"Corrupt EXIF data",
    r"Palette images with Transparency expressed in bytes",
    r"Couldn't allocate palette entry for transparency",
)
"""Pillow's warnings about metadata or about details that it handles correctly; any other one rejects the file."""


@contextmanager
def opened(data: bytes, format: str, limits: Limits) -> Iterator[Image.Image]:
    """Open an image with Pillow, restricted to `format` and `limits`; warnings and exceptions become `ImageError`.

    This includes exceptions inside the `with` block. Not thread-safe: the limits and warning filters are global.
    """
    cap, threads = Image.MAX_IMAGE_PIXELS, AvifImagePlugin.DEFAULT_MAX_THREADS
    Image.MAX_IMAGE_PIXELS, AvifImagePlugin.DEFAULT_MAX_THREADS = limits.max_pixels, 1
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module=r"PIL(\.|$)")  # filters are global
            for harmless in _HARMLESS:
                warnings.filterwarnings("ignore", harmless)
            data = without_lost_fields(data) if format == "tiff" else data
            with Image.open(BytesIO(data), formats=(format.upper(),)) as image:
                yield image
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("too_many_pixels", f"max_pixels is {limits.max_pixels}") from None
    except MemoryError:
        raise ImageError("out_of_memory") from None
    except Exception as error:  # decoders raise almost any exception, such as KeyError or struct.error
        raise ImageError(*explain(error)) from error
    finally:
        Image.MAX_IMAGE_PIXELS, AvifImagePlugin.DEFAULT_MAX_THREADS = cap, threads


def explain(error: Exception) -> tuple[str, str]:
    """(reason, detail) for a decoder's exception, reproducible between runs."""
    if isinstance(error, UnidentifiedImageError):  # its message contains a memory address
        return "decode_error", "no header that can be read"
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "object", str(error)).strip()[:200]
    ended = isinstance(error, (EOFError, struct.error)) or re.search("truncated|premature end", text, re.IGNORECASE)
    return ("truncated" if ended else "decode_error"), text or type(error).__name__


_PROBES: dict[str, Callable[[bytes, Limits], Probe]] = {
    "jpeg": _probe_jpeg,
    "png": _probe_png,
    "webp": _probe_webp,
    "gif": _probe_gif,
    "bmp": _probe_pillow,
    "tiff": _probe_pillow,
    "avif": _probe_pillow,
    "jpeg2000": _probe_pillow,
}
