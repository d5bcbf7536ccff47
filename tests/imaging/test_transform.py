"""The image path keeps exactly what it promises: sizes, pixels, untouched bytes, and no bad file gets through."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from dataclasses import replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import ARITHMETIC_JPEG, ODD_JPEG, SAMPLES, bombs, damaged, picture, png, png_chunk, saved
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from profiles import ADOBE_RGB, profile
from sklearn.datasets import load_sample_image

from pipeline.imaging import transform
from pipeline.imaging.headers import exif_orientation
from pipeline.imaging.tiff import without_lost_fields
from pipeline.imaging.transform import (
    Dropped,
    ImageError,
    Limits,
    Rules,
    decode,
    geometry,
    probe,
    process,
    render,
    resize,
    target_size,
)

KEEP_ALL = Rules(min_image_size=0, max_image_size=0)


def pixels_of(data: bytes) -> list[list[int]]:
    """The decoded pixels in reading order."""
    pixels = decode(data, probe(data))
    return [[int(value) for value in pixel] for pixel in pixels.reshape(-1, 3)]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


# ---------------------------------------------------------------- probe


@pytest.mark.parametrize("name", SAMPLES)
def test_the_header_tells_format_and_size(name: str) -> None:
    header = probe(SAMPLES[name])
    assert header.format == {"apng": "png"}.get(name, name.partition("-")[0])
    assert (header.width, header.height) == ((16, 16) if name in ("jpeg-arithmetic", "jpeg-odd") else (61, 47))
    assert header.orientation == (6 if name.endswith("exif") else 1)
    assert header.has_alpha == (name in ("png-alpha", "webp-lossless"))
    if name.endswith("animated"):
        assert header.frames == 4
    plain = "jpeg jpeg-exif jpeg-progressive jpeg-grey jpeg-444 jpeg-restart png webp webp-exif"
    assert header.plain == (name in plain.split())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 100, "unknown_format"),
        (b"\xff\xd8", "unknown_format"),
        (b"\xff\xd8\xff", "truncated"),
        (b"plain text", "unknown_format"),
        (b"%PDF-1.4", "unknown_format"),
        (b"PK\3\4" + b"\0" * 50, "unknown_format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unknown_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?>\n<!-- drawn --><svg/>", "svg"),
        (b"<?xml version='1.0'?><!DOCTYPE SVG PUBLIC '' ''>", "svg"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "html"),
        (b"<html><svg/></html>", "svg"),
        (b"<rss/>", "unknown_format"),
        (b"RIFF\x04\0\0\0WEBP", "decode_error"),
        (b"GIF89a", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"BM", "decode_error"),
        (b"II*\0", "decode_error"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        process(data, KEEP_ALL)
    assert caught.value.reason == reason, caught.value.detail


def test_messages_are_the_same_in_every_run() -> None:
    for data in (b"II*\0" + b"\xff" * 60, b"BM" + b"\xff" * 60, SAMPLES["avif"][:100]):
        details = set()
        for _ in range(2):
            with pytest.raises(ImageError) as caught:
                process(data, KEEP_ALL)
            details.add(caught.value.detail)
        assert len(details) == 1
        assert " at 0x" not in details.pop()


def test_exif_orientation_survives_any_bytes() -> None:
    good = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    assert exif_orientation(good) == 6
    assert exif_orientation(good.replace(b"\0\x06", b"\0\x09")) == 1
    assert all(exif_orientation(good[:end]) in (1, 6) for end in range(len(good)))
    assert exif_orientation(b"II*\0\xff\xff\xff\xff") == 1
    assert exif_orientation(b"") == 1


# ---------------------------------------------------------------- other interpolations, enlarging


@pytest.mark.parametrize(
    ("interpolation", "pillow"),
    [
        ("bicubic", Image.Resampling.BICUBIC),
        ("lanczos", Image.Resampling.LANCZOS),
        ("bilinear", Image.Resampling.BILINEAR),
        ("area", Image.Resampling.BOX),
    ],
)
@pytest.mark.parametrize("size", [(40, 30), (90, 70)])
def test_each_interpolation_is_pillows(interpolation: str, pillow: Image.Resampling, size: tuple[int, int]) -> None:
    image = picture(61, 47)
    expected = np.asarray(image.resize(size, pillow)).astype(int)
    for backend in ("fast", "pillow"):
        found = resize(np.asarray(image), size, backend, interpolation=interpolation)
        assert np.abs(found - expected).max() <= 3


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("keep_ratio", (130, 100)),
        ("keep_ratio_largest", (100, 77)),
        ("center_crop", (100, 100)),
        ("border", (100, 100)),
    ],
)
def test_small_images_are_enlarged_where_that_is_asked_for(mode: str, expected: tuple[int, int]) -> None:
    rules = Rules(min_image_size=0, max_image_size=100, resize_mode=mode, upscale=True)
    result = process(SAMPLES["jpeg"], rules)
    assert (result.width, result.height) == expected and (result.source_width, result.source_height) == (61, 47)
    assert process(SAMPLES["jpeg"], replace(rules, resize_mode="no")).data == SAMPLES["jpeg"]


# ---------------------------------------------------------------- damage that does not touch the pixels

LONG = "x" * 2_000_000


def described(**texts: str) -> PngInfo:
    info = PngInfo()
    for kind, text in texts.items():
        if kind == "international":
            info.add_itxt("about", text, zip=True)
        else:
            info.add_text("about", text, zip=kind == "packed")
    return info


@pytest.mark.parametrize("options", [
    {"pnginfo": described(plain=LONG)},
    {"pnginfo": described(packed=LONG)},
    {"pnginfo": described(international=LONG)},
    {"icc_profile": bytes(3_000_000)},
])  # fmt: skip
def test_a_png_with_long_texts_or_profile_is_read_and_written_anew_without_them(options: dict[str, Any]) -> None:
    image = picture(61, 47)
    result = process(saved(image, "PNG", **options), replace(KEEP_ALL, encode_format="png"))
    assert result.changed and len(result.data) < 100_000
    assert np.array_equal(np.asarray(Image.open(BytesIO(result.data))), np.asarray(image))


def test_a_png_with_short_texts_keeps_its_bytes() -> None:
    data = saved(picture(61, 47), "PNG", pnginfo=described(plain="short", packed="short" * 100))
    assert process(data, KEEP_ALL).data == data


@pytest.mark.parametrize("name", ["jpeg", "jpeg-grey", "jpeg-444"])
@pytest.mark.parametrize("tail", [b"", b"after the end"])
def test_bytes_before_the_end_marker_of_a_jpeg_are_harmless(name: str, tail: bytes) -> None:
    good = SAMPLES[name]
    padded = good[:-2] + b"\0\0camera\0" + good[-2:] + tail
    assert np.array_equal(transform.decode(padded, probe(padded)), transform.decode(good, probe(good)))
    with pytest.raises(ImageError, match="truncated"):
        process(good[:-300] + b"\0\0camera\0" + good[-2:], KEEP_ALL)


def tiff_with(*fields: bytes) -> bytes:
    """A TIFF whose directory has these fields besides its own."""
    data = SAMPLES["tiff"]
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    own = [data[start + 2 + 12 * number :][:12] for number in range(count)]
    every = sorted([*own, *fields], key=lambda field: struct.unpack_from("<H", field))
    directory = struct.pack("<H", len(every)) + b"".join(every) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory


def test_fields_of_a_tiff_that_say_nothing_of_pixels_may_be_damaged() -> None:
    good = transform.decode(SAMPLES["tiff"], probe(SAMPLES["tiff"]))
    lost = tiff_with(struct.pack("<HHII", 270, 2, 100, 10_000_000), struct.pack("<HHII", 33432, 2, 9, 2**32 - 5))
    assert np.array_equal(transform.decode(lost, probe(lost)), good)
    assert without_lost_fields(SAMPLES["tiff"]) == SAMPLES["tiff"]
    twice = tiff_with(struct.pack("<HHIHH", 274, 3, 2, 3, 6))
    assert np.array_equal(transform.decode(twice, probe(twice)), good[::-1, ::-1])
    pixels = tiff_with(struct.pack("<HHII", 347, 7, 100, 10_000_000))
    assert without_lost_fields(pixels) == pixels


@pytest.mark.parametrize("end", range(0, 60, 7))
def test_a_cut_tiff_is_left_as_it_is(end: int) -> None:
    assert without_lost_fields(SAMPLES["tiff"][:end]) == SAMPLES["tiff"][:end]


# ---------------------------------------------------------------- caps come before decoding


@pytest.mark.parametrize("name", transform.FORMATS)
def test_a_bomb_is_refused_by_its_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ImageError) as caught:
        process(bombs()[name], KEEP_ALL)
    assert caught.value.reason == "too_many_pixels", caught.value.detail


@pytest.mark.parametrize("name", SAMPLES)
def test_the_caps_can_be_set(name: str) -> None:
    header = probe(SAMPLES[name])
    pixels, size = header.width * header.height, len(SAMPLES[name])
    process(SAMPLES[name], KEEP_ALL, Limits(pixels, size))
    for limits, reason in ((Limits(pixels - 1, size), "too_many_pixels"), (Limits(pixels, size - 1), "too_many_bytes")):
        with pytest.raises(ImageError, match=reason):
            process(SAMPLES[name], KEEP_ALL, limits)


def test_pillows_own_cap_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    process(SAMPLES["bmp"], KEEP_ALL, Limits(max_pixels=10**9))
    with pytest.raises(ImageError):
        process(SAMPLES["bmp"][:99], KEEP_ALL)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = SAMPLES["jpeg-progressive"]
    at = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="too_many_scans"):
        process(data[:at] + data[at:-2] * 600 + data[-2:], KEEP_ALL)
    for name, reason in (("jpeg", "decode_error: Didn't expect more than one scan"), ("jpeg-grey", "decode_error")):
        data = SAMPLES[name]
        at = data.rindex(b"\xff\xda")
        with pytest.raises(ImageError, match=reason):
            process(data[:at] + data[at:-2] * 600 + data[-2:], KEEP_ALL)


# ---------------------------------------------------------------- truncated and damaged files


@pytest.mark.parametrize("name", SAMPLES)
def test_a_truncated_file_is_never_kept(name: str) -> None:
    data = SAMPLES[name]
    for end in sorted({*range(0, len(data), max(1, len(data) // 100)), *range(len(data) - 12, len(data))}):
        if end >= len(data) - {"jpeg-odd": 2, "bmp": 1}.get(name, 0):
            continue  # all pixels are there; missing are an end marker that Pillow does not look for, a row's padding
        with pytest.raises(ImageError):
            process(data[:end], KEEP_ALL)


def test_damaged_files_raise_nothing_but_image_errors() -> None:
    limits, rules = Limits(max_pixels=4_000_000), Rules(min_image_size=16, max_image_size=32)
    reasons, kept = set(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in damaged(400):
            try:
                result = process(data, rules, limits)
            except (ImageError, Dropped) as error:
                reasons.add(error.reason)
            else:
                Image.open(BytesIO(result.data)).load()
                assert min(result.width, result.height) >= 16
                kept += 1
    assert kept < 200
    assert reasons >= {"decode_error", "truncated", "unknown_format"}
    assert all(re.fullmatch("[a-z_]+", reason) for reason in reasons)


def test_flipped_bits_in_png_pixels_are_seen() -> None:
    data = SAMPLES["png"]
    start = data.index(b"IDAT") + 10
    for at in range(start, len(data) - 20, len(data) // 50):
        bad = bytearray(data)
        bad[at] ^= 4
        with pytest.raises(ImageError, match="checksum"):
            process(bytes(bad), KEEP_ALL)


def test_more_pixels_in_the_header_than_in_the_data_is_an_error() -> None:
    for rows, level in ((19, b"\x07"), (10, b"\0"), (0, b"\0")):
        with pytest.raises(ImageError, match=r"truncated|decode_error"):
            process(png(10, 20, 8, 2, level * 30 * rows, stride=30), KEEP_ALL)
    assert not process(png(10, 20, 8, 2, bytes(30) * 20), KEEP_ALL).changed, "an all-black image is an image"


@pytest.mark.parametrize("edge", [1, 2, 5, 9])
def test_an_interlaced_png_must_hold_all_of_its_passes(edge: int) -> None:
    values = np.arange(1, edge * edge + 1, dtype=np.uint8).reshape(edge, edge)
    rows = [
        b"\0" + row.tobytes()
        for x, y, dx, dy in transform._ADAM7
        for row in (values[y::dy, x::dx] if values[y::dy, x::dx].size else ())
    ]
    header = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 1)
    for held in (len(rows), len(rows) - 1):
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows[:held]))), (b"IEND", b"")]
        data = b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, parts))
        if held == len(rows):
            assert (decode(data, probe(data))[:, :, 0] == values).all()
        else:
            with pytest.raises(ImageError, match="truncated"):
                process(data, KEEP_ALL)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("rgba", png(2, 1, 8, 6, bytes([200, 100, 0, 128, 9, 9, 9, 0])), [[227, 177, 127], [255, 255, 255]]),
        ("la", png(2, 1, 8, 4, bytes([0, 51, 100, 255])), [[204] * 3, [100] * 3]),
        ("palette", png(3, 1, 2, 3, b"\x18", (b"PLTE", bytes(range(9)))), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        (
            "palette+alpha",
            png(3, 1, 2, 3, b"\x18", (b"PLTE", bytes([0] * 6 + [9] * 3)), (b"tRNS", b"\0\x80")),
            [[255] * 3, [127] * 3, [9] * 3],
        ),
        ("bits", png(3, 1, 1, 0, b"\xa0"), [[255] * 3, [0] * 3, [255] * 3]),
        ("bits+transparent", png(3, 1, 1, 0, b"\xa0", (b"tRNS", b"\0\0")), [[255] * 3] * 3),
        ("grey2", png(4, 1, 2, 0, b"\x1b"), [[0] * 3, [85] * 3, [170] * 3, [255] * 3]),
        (
            "grey2+transparent",
            png(4, 1, 2, 0, b"\x1b", (b"tRNS", b"\0\x01")),
            [[0] * 3, [255] * 3, [170] * 3, [255] * 3],
        ),
        ("grey4+transparent", png(2, 1, 4, 0, b"\x07", (b"tRNS", b"\0\x07")), [[0] * 3, [255] * 3]),
        ("grey+transparent", png(2, 1, 8, 0, b"\x07\x08", (b"tRNS", b"\0\x07")), [[255] * 3, [8] * 3]),
        ("rgb+transparent", png(2, 1, 8, 2, b"abcabd", (b"tRNS", b"\0a\0b\0c")), [[255] * 3, [97, 98, 100]]),
        ("grey16", png(3, 1, 16, 0, struct.pack(">3H", 0, 0x8040, 65535)), [[0] * 3, [128] * 3, [255] * 3]),
        (
            "grey16+transparent",
            png(2, 1, 16, 0, struct.pack(">2H", 300, 301), (b"tRNS", struct.pack(">H", 300))),
            [[255] * 3, [1] * 3],
        ),
        ("rgb16", png(1, 1, 16, 2, struct.pack(">3H", 0, 0x8040, 65535)), [[0, 128, 255]]),
        (
            "rgb16+transparent",
            png(2, 1, 16, 2, struct.pack(">6H", 0, 256, 65535, 0, 0, 0), (b"tRNS", struct.pack(">3H", 0, 256, 65535))),
            [[255] * 3, [0] * 3],
        ),
        ("rgba16", png(1, 1, 16, 6, struct.pack(">4H", 0, 0, 65535, 0x80FF)), [[127, 127, 255]]),
        ("la16", png(1, 1, 16, 4, struct.pack(">2H", 0, 51 * 257)), [[204] * 3]),
    ],
)
def test_png_pixels_become_rgb_over_white(name: str, data: bytes, expected: list[list[int]]) -> None:
    assert pixels_of(data) == expected
    result = process(data, Rules(min_image_size=0, encode_format="png"))
    assert result.changed, "only 8-bit RGB and grey pass through"
    assert pixels_of(result.data) == expected


def tiff(values: list[float], kind: str, **tags: int) -> bytes:
    """A one-row grey TIFF of numpy's type `kind`."""
    row = np.array([values], kind)
    fields = {258: row.itemsize * 8, 339: {"u": 1, "i": 2, "f": 3}[row.dtype.kind], 262: tags.get("photometric", 1)}
    entries = {256: len(values), 257: 1, **fields, 259: 1, 273: 8, 277: 1, 278: 1, 279: row.nbytes}
    if "bits" in tags:
        entries[258] = tags["bits"]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    head = struct.pack("<4sI", b"II*\0", 8 + row.nbytes)
    return head + row.tobytes() + struct.pack("<H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff([0, 0x8040, 65535], "<u2"), [0, 128, 255]),
        (tiff([0, 0x8040, 65535], "<u2", photometric=0), [255, 127, 0]),
        (tiff([0, 1000, 32767], "<i2"), [0, 4, 127]),
        (tiff([0, 100, 255], "<i4"), [0, 100, 255]),
        (tiff([0, 25700, 65535], "<i4"), [0, 100, 255]),
        (tiff([0, 0.5, 1], "<f4"), [0, 128, 255]),
        (tiff([0, 0.5, 200], "<f4"), [0, 1, 200]),
        (tiff([0, 257, 65535], "<f4"), [0, 1, 255]),
    ],
)
def test_deep_grey_tiffs_are_scaled_not_clipped(data: bytes, expected: list[int]) -> None:
    assert pixels_of(data) == [[value] * 3 for value in expected]


@pytest.mark.parametrize("data", [tiff([-1, 5], "<i4"), tiff([float("nan"), 0], "<f4"), tiff([0, float("inf")], "<f4")])
def test_values_without_a_white_level_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="unsupported_mode"):
        process(data, KEEP_ALL)


def test_cmyk_is_read_as_adobe_writes_it() -> None:
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 51))  # full cyan, a fifth of black
    for data in (saved(ink, "JPEG", quality=100), saved(ink, "TIFF")):
        assert np.abs(np.array(pixels_of(data)) - [0, 204, 204]).max() <= 1
        result = process(data, Rules(min_image_size=0, encode_format="png"))
        assert result.changed
    assert b"Adobe" in saved(ink, "JPEG")


def test_premultiplied_alpha_is_not_applied_twice() -> None:
    image = Image.new("RGBA", (1, 1), (100, 50, 0, 128))
    plain = saved(image, "TIFF")
    premultiplied = plain.replace(struct.pack("<HHIHH", 338, 3, 1, 2, 0), struct.pack("<HHIHH", 338, 3, 1, 1, 0))
    assert plain != premultiplied
    assert pixels_of(plain) == [[177, 152, 127]]
    assert pixels_of(premultiplied) == [[227, 177, 127]]


def test_only_the_first_frame_is_used() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = saved(first, format, save_all=True, append_images=[second], **options)
        assert np.abs(np.array(pixels_of(data)) - [255, 0, 0]).max() <= 3, format
        result = process(data, Rules(min_image_size=0, encode_format="png"))
        assert result.changed
        assert probe(result.data).frames == 1


def test_rare_jpegs_are_read_and_written_anew() -> None:
    for data in (ARITHMETIC_JPEG, ODD_JPEG):
        pixels = decode(data, probe(data))
        assert np.abs(pixels[2].astype(int) - [200, 40, 40]).max() <= 12
        assert np.abs(pixels[13].astype(int) - [40, 40, 200]).max() <= 12
        assert process(data, Rules(min_image_size=0)).changed
    twelve_bits = SAMPLES["jpeg"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c")
    with pytest.raises(ImageError, match="unsupported_mode"):
        process(twelve_bits, KEEP_ALL)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF", "JPEG"])
def test_every_orientation_gives_the_upright_picture(format: str, orientation: int) -> None:
    upright = picture(50, 34)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    by_format: dict[str, dict[str, Any]] = {
        "PNG": {"exif": exif},
        "WEBP": {"exif": exif, "lossless": True},
        "TIFF": {"tiffinfo": {0x0112: orientation}},
        "AVIF": {"exif": exif, "quality": 100, "subsampling": "4:4:4"},
        "JPEG": {"exif": exif, "quality": 100, "subsampling": 0},
    }
    data = saved(stored, format, **by_format[format])
    header = probe(data)
    assert (header.orientation, header.width, header.height) == (orientation, *stored.size)
    assert header.upright == (50, 34)
    tolerance = {"AVIF": 6, "JPEG": 6}.get(format, 0)
    assert np.abs(decode(data, header).astype(int) - np.asarray(upright)).max() <= tolerance
    rules = Rules(min_image_size=0, max_image_size=20, encode_format="png")
    result = process(data, rules)
    assert (result.width, result.height, result.source_width, result.source_height) == (29, 20, 50, 34)
    if tolerance == 0:
        assert result.data == process(saved(upright, "PNG"), rules).data
    again = process(result.data, rules)
    assert not again.changed, "the orientation is gone once applied"


# ---------------------------------------------------------------- what passes through


@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_pass_through_where_nothing_has_to_change(name: str) -> None:
    data = SAMPLES[name]
    result = process(data, Rules(min_image_size=0, max_image_size=512))
    assert result.changed == (not probe(data).plain or probe(data).orientation != 1)
    if not result.changed:
        assert result.data is data
    else:
        assert result.format == "jpeg"
        assert probe(result.data).plain
        assert not process(result.data, Rules(min_image_size=0)).changed


def test_a_changed_jpeg_is_written_as_420_without_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    result = process(saved(picture(64, 64), "JPEG", exif=exif, subsampling=0), Rules(min_image_size=0))
    at = result.data.index(b"\xff\xc0")
    assert result.data[at + 11 :: 3][:3] == b"\x22\x11\x11"
    assert b"Exif" not in result.data


@pytest.mark.parametrize("backend", ["fast", "pillow"])
@pytest.mark.parametrize("encode_format", transform.ENCODE_FORMATS)
def test_the_output_is_the_same_every_time(encode_format: str, backend: str) -> None:
    rules = Rules(min_image_size=0, max_image_size=30, encode_format=encode_format, resize=backend)
    for name, data in SAMPLES.items():
        first, second = process(data, rules), process(data, rules)
        assert first == second
        expected = {"jpg": "jpeg", "auto": "png" if probe(data).format in transform.LOSSLESS_FORMATS else "jpeg"}
        if first.changed:
            assert first.format == expected.get(encode_format, encode_format) == probe(first.data).format, name


# ---------------------------------------------------------------- sizes


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.integers(0, 5_000))
def test_sizes_follow_the_documented_rule(width: int, height: int, most: int) -> None:
    new = target_size(width, height, most)
    small, large = min(width, height), max(width, height)
    if most == 0 or small <= most:
        assert new == (width, height)
        return
    exact = Fraction(large * most, small)
    assert min(new) == most
    assert max(new) == (exact + Fraction(1, 2)).__floor__()
    assert (new[0] <= new[1]) == (width <= height) or new[0] == new[1]
    assert max(new) <= large, "never upscaled"
    assert target_size(height, width, most) == new[::-1]


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 60), st.integers(0, 60), st.sampled_from(["JPEG", "PNG"]))
def test_results_have_the_size_of_the_rule(width: int, height: int, least: int, most: int, format: str) -> None:
    data = saved(Image.new("RGB", (width, height), "teal"), format)
    rules = Rules(min_image_size=least, max_image_size=most)
    if min(width, height) < least:
        with pytest.raises(Dropped, match="too_small"):
            process(data, rules)
        return
    result = process(data, rules)
    assert (result.width, result.height) == target_size(width, height, most)
    assert Image.open(BytesIO(result.data)).size == (result.width, result.height)
    assert (result.source_width, result.source_height) == (width, height)
    assert result.changed == ((result.width, result.height) != (width, height))


@given(
    st.integers(1, 100_000),
    st.integers(1, 100_000),
    st.integers(1, 5_000),
    st.sampled_from(transform.RESIZE_MODES),
)
def test_every_mode_follows_its_rule(width: int, height: int, most: int, mode: str) -> None:
    shape = geometry(width, height, Rules(max_image_size=most, resize_mode=mode))
    small, large = min(width, height), max(width, height)
    edge = large if mode in ("keep_ratio_largest", "border") else small
    if mode == "no" or edge <= most:
        assert shape.sized == (width, height), "never upscaled"
    else:
        ratio = Fraction(most, edge)
        assert shape.sized == tuple(max(1, (value * ratio + Fraction(1, 2)).__floor__()) for value in (width, height))
    square = {"border": most, "center_crop": min(small, most)}.get(mode)
    assert shape.canvas == ((square, square) if square else shape.sized)
    for offset, free in zip(shape.offset, np.subtract(shape.canvas, shape.sized), strict=True):
        assert abs(offset) == abs(int(free)) // 2
        assert offset * int(free) >= 0
    turned = geometry(height, width, Rules(max_image_size=most, resize_mode=mode))
    assert (turned.sized, turned.canvas) == (shape.sized[::-1], shape.canvas[::-1])


@pytest.mark.parametrize(("width", "height"), [(90, 40), (40, 90), (33, 33), (20, 10), (1, 70)])
@pytest.mark.parametrize("mode", transform.RESIZE_MODES)
def test_pixels_lie_where_the_geometry_says(mode: str, width: int, height: int) -> None:
    rules = Rules(0, 32, mode, encode_format="png", background="#102030")
    data = saved(Image.new("RGB", (width, height), "teal"), "PNG")
    result = process(data, rules)
    shape = geometry(width, height, rules)
    assert (result.width, result.height) == shape.canvas
    pixels = decode(result.data, probe(result.data))
    inside = (pixels == (0, 128, 128)).all(-1)
    assert inside.sum() == min(shape.sized[0], shape.canvas[0]) * min(shape.sized[1], shape.canvas[1])
    assert (inside | (pixels == (16, 32, 48)).all(-1)).all()
    x, y = (max(0, offset) for offset in shape.offset)
    assert inside[y, x]


def test_a_crop_takes_the_centre() -> None:
    ramp = np.repeat(np.arange(0, 200, 2, np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    result = process(saved(Image.fromarray(ramp), "PNG"), Rules(0, 40, "center_crop", encode_format="png"))
    assert decode(result.data, probe(result.data))[0, :, 0].tolist() == list(range(60, 140, 2))


def test_images_beyond_the_limits_are_dropped_with_a_reason() -> None:
    data = saved(Image.new("RGB", (90, 30)), "PNG")
    for rules, reason in (
        (Rules(31), "too_small"),
        (Rules(0, max_image_area=2699), "too_large"),
        (Rules(0, max_aspect_ratio=2.9), "too_elongated"),
    ):
        with pytest.raises(Dropped) as caught:
            process(data, rules)
        assert caught.value.reason == reason
    assert not process(data, Rules(30, max_image_area=2700, max_aspect_ratio=3)).changed


def test_what_needs_no_change_can_be_trusted_or_written_anew() -> None:
    data = SAMPLES["png"]
    assert process(data, replace(KEEP_ALL, skip_reencode=False)).changed
    bad = bytearray(data)
    bad[data.index(b"IDAT") + 20] ^= 4
    assert process(bytes(bad), replace(KEEP_ALL, validate="header")).data == bytes(bad)
    with pytest.raises(ImageError):
        process(bytes(bad), KEEP_ALL)


# ---------------------------------------------------------------- colours


def with_profile(format: str, icc: bytes, colours: list[tuple[int, int, int]]) -> bytes:
    image = Image.fromarray(np.array([colours], np.uint8).repeat(8, 0).repeat(8, 1))
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    return saved(image, format, icc_profile=icc, **options)


COLOURS = [(200, 100, 50), (10, 60, 90), (128, 128, 128), (255, 255, 255), (0, 0, 0)]


def adobe_as_srgb(colour: tuple[int, int, int]) -> np.ndarray:
    """By the definitions of both spaces."""
    xyz = np.array(ADOBE_RGB).T @ (np.array(colour) / 255) ** (563 / 256)
    srgb = np.array(
        [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    )
    linear = np.linalg.solve(srgb, xyz).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_colours_with_a_profile_become_srgb(format: str) -> None:
    data = with_profile(format, profile(563 / 256, ADOBE_RGB), COLOURS)
    result = process(data, replace(KEEP_ALL, encode_format="png"))
    assert result.changed
    assert not probe(result.data).icc
    got = decode(result.data, probe(result.data))[4, 4::8]
    tolerance = 12 if format == "AVIF" else 4
    assert np.abs(got - np.array([adobe_as_srgb(c) for c in COLOURS])).max() <= tolerance
    if format in ("PNG", "JPEG", "WEBP"):
        assert process(data, replace(KEEP_ALL, icc="ignore")).data is data


def test_a_profile_that_says_srgb_or_nothing_changes_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (srgb, b"no profile", profile(1.8), profile(2.2, ADOBE_RGB)[:200], bytes(2**21)):
        for format in ("PNG", "JPEG", "WEBP") if len(icc) < 2**20 else ("WEBP",):
            data = with_profile(format, icc, COLOURS)
            assert process(data, KEEP_ALL).data is data, (format, len(icc))


def test_grey_has_profiles_too() -> None:
    image = Image.fromarray(np.array([[0, 64, 128, 255]], np.uint8))
    result = process(saved(image, "PNG", icc_profile=profile(1.0)), replace(KEEP_ALL, encode_format="png"))
    assert np.abs(np.array(pixels_of(result.data))[:, 0] - [0, 137, 188, 255]).max() <= 2


def gallery() -> dict[str, bytes]:
    """A file of each kind that needs more than reading, all of the same photo."""
    photo = Image.fromarray(load_sample_image("flower.jpg")).crop((160, 60, 448, 252)).resize((96, 64))
    veil = Image.fromarray(np.linspace(0, 255, 96).astype(np.uint8)[None].repeat(64, 0))
    faded = photo.copy()
    faded.putalpha(veil)
    deep = (np.asarray(photo.convert("L")).astype(">u2") * 257).tobytes()
    clear = photo.quantize(32)
    return {
        "alpha": saved(faded, "PNG"),
        "cmyk": saved(photo.convert("CMYK"), "TIFF"),
        "deep": png(96, 64, 16, 0, deep),
        "palette": saved(clear, "PNG", transparency=clear.getpixel((0, 0))),
        "icc": saved(photo, "PNG", icc_profile=profile(563 / 256, ADOBE_RGB)),
        "grey-icc": saved(photo.convert("L"), "PNG", icc_profile=profile(1.0)),
    }


@pytest.mark.parametrize("name", gallery())
def test_rare_kinds_look_as_they_should(name: str) -> None:
    """Compared with images that were looked at; delete one to make it again, and look at it again."""
    rules = Rules(0, 56, "border", encode_format="png", background="#2060a0")
    result = process(gallery()[name], rules)
    place = Path(__file__).parents[1] / "data" / "gallery" / f"{name}.png"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(result.data)
        pytest.fail(f"{place} was missing: look at the new one")
    golden = decode(place.read_bytes(), probe(place.read_bytes())).astype(int)
    assert np.abs(decode(result.data, probe(result.data)) - golden).max() <= 3


def test_an_edge_that_no_jpeg_can_hold_is_refused() -> None:
    long = saved(Image.new("RGB", (70_000, 2)), "PNG")
    with pytest.raises(ImageError, match="edge_too_long"):
        process(long, Rules(min_image_size=0, max_image_size=1, encode_format="webp"))
    assert process(long, Rules(min_image_size=0)).data is long


@pytest.mark.parametrize(
    "wrong",
    [
        {"encode_quality": 0},
        {"encode_format": "gif"},
        {"resize": "cv2"},
        {"resize": "simd"},
        {"resize_mode": "stretch"},
        {"min_image_size": -1},
        {"max_aspect_ratio": float("nan")},
        {"background": "#12"},
    ],
)
def test_wrong_rules_name_the_setting(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)


# ---------------------------------------------------------------- quality


@pytest.mark.parametrize("backend", ["fast", "pillow"])
def test_resizing_is_faithful_to_bicubic_in_floats(backend: str) -> None:
    photo = np.asarray(load_sample_image("china.jpg"))
    planes = [Image.fromarray(photo[:, :, channel].astype(np.float32)) for channel in range(3)]
    exact = np.stack([np.asarray(plane.resize((300, 200), Image.Resampling.BICUBIC)) for plane in planes], -1)
    assert psnr(resize(photo, (300, 200), backend), exact.clip(0, 255)) > 55


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_scaled_decode_stays_close_to_a_full_one(name: str) -> None:
    """These two are sharp to the pixel, the worst case; 854 rows are no multiple of 4, so a shift would show."""
    photo = Image.fromarray(load_sample_image(name)).resize((1280, 854), Image.Resampling.BICUBIC)
    data = saved(photo, "JPEG", quality=92)
    header = probe(data)
    for most, scale in ((214, 1), (213, 2), (107, 2), (106, 4)):
        rules = Rules(min_image_size=0, max_image_size=most)
        shape = geometry(1280, 854, rules)
        assert transform._decode(data, header, Limits(), shape.sized)[1] == scale
        in_full = render(data, header, shape, replace(rules, scaled_decode=False))
        assert psnr(render(data, header, shape, rules)[:, :, :3], in_full[:, :, :3]) > 42


# ---- harmless peculiarities of files in the wild


@pytest.mark.parametrize("packed", [True, False])
def test_much_text_in_a_png_is_left_away(packed: bool) -> None:
    text = PngInfo()
    text.add_text("parameters", "x" * 2_000_000, zip=packed)
    found = process(saved(Image.new("RGB", (40, 30)), "PNG", pnginfo=text), Rules(0, 20))
    assert (found.width, found.height) == (27, 20) and len(found.data) < 10_000


def test_a_large_profile_that_makes_no_sense_is_left_away() -> None:
    data = saved(Image.new("RGB", (40, 30)), "PNG", icc_profile=np.random.default_rng(0).bytes(2_000_000))
    assert process(data, Rules(0, 20)).width == 27


def test_extraneous_bytes_before_the_end_marker_of_a_jpeg_are_harmless() -> None:
    data = saved(Image.effect_noise((64, 48), 60).convert("RGB"), "JPEG")
    found = process(data[:-2] + b"\0\1\2\3" * 5 + data[-2:], Rules(0, 24))
    assert (found.width, found.height) == (32, 24)
