"""Image files for tests: good ones of every kind, and ones that lie, are damaged, or mean harm."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from itertools import cycle, islice
from typing import Any

import numpy as np
from PIL import Image

ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU"
    "GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAQABAD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ANH1YMCfTLYdaBKkDsngF50LuuF8RlD/2Q=="
)
"""16x16, red above blue, as `cjpeg -arithmetic` writes it."""
ODD_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU"
    "GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/wAARCAAQABAD"
    "ASIAAhIBAyEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAf/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFgEBAQEAAAAAAAAAAAAAAAAABwAJ/8QAGBEA"
    "AgMAAAAAAAAAAAAAAAAAABdko+L/2gAMAwEAAhEDEQA/AIoJeDc0dFlqQrME1IVmD//Z"
)
"""The same image from `cjpeg -sample 2x2,1x2,2x1`, which TurboJPEG does not know."""


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colour field with some noise: compresses like a photo, differs under every rotation."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(small) // 16 * 15 + rng.integers(0, 16, (height, width, 3))).astype(np.uint8))


def png(
    width: int, height: int, bits: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes], stride: int = 0
) -> bytes:
    """A PNG with these packed rows; `chunks` go between header and pixels."""
    stride = stride or len(rows) // height
    raw = b"".join(b"\0" + rows[at : at + stride] for at in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, parts))


def png_chunk(part: tuple[bytes, bytes]) -> bytes:
    kind, payload = part
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def samples() -> dict[str, bytes]:
    """One small good file of every kind."""
    image = picture(61, 47)
    exif = Image.Exif()
    exif[0x0112] = 6
    animation = [picture(61, 47, seed) for seed in (1, 2, 3)]
    faded = image.copy()
    faded.putalpha(picture(61, 47, 4).convert("L"))
    return {
        "jpeg": saved(image, "JPEG"),
        "jpeg-exif": saved(image, "JPEG", exif=exif),
        "jpeg-progressive": saved(image, "JPEG", progressive=True),
        "jpeg-grey": saved(image.convert("L"), "JPEG"),
        "jpeg-444": saved(image, "JPEG", subsampling=0),
        "jpeg-cmyk": saved(image.convert("CMYK"), "JPEG"),
        "jpeg-restart": saved(image, "JPEG", restart_marker_blocks=2),
        "jpeg-arithmetic": ARITHMETIC_JPEG,
        "jpeg-odd": ODD_JPEG,
        "png": saved(image, "PNG"),
        "png-alpha": saved(faded, "PNG"),
        "png-palette": saved(image.quantize(16), "PNG"),
        "apng": saved(image, "PNG", save_all=True, append_images=animation),
        "webp": saved(image, "WEBP"),
        "webp-lossless": saved(faded, "WEBP", lossless=True),
        "webp-exif": saved(image, "WEBP", exif=exif),
        "webp-animated": saved(image, "WEBP", save_all=True, append_images=animation),
        "gif": saved(image, "GIF"),
        "gif-animated": saved(image, "GIF", save_all=True, append_images=animation),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF"),
        "tiff-lzw": saved(image, "TIFF", compression="tiff_lzw"),
        "avif": saved(image, "AVIF"),
        "jpeg2000": saved(image, "JPEG2000"),
        "jpeg2000-bare": saved(image, "JPEG2000", no_jp2=True),
    }


SAMPLES = samples()


def bombs() -> dict[str, bytes]:
    """Headers that announce gigapixels."""
    jpeg = bytearray(SAMPLES["jpeg"])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    webp = b"VP8X" + struct.pack("<IB3x", 10, 0) + b"\xff\x3f\0\xff\x3f\0"
    bmp = bytearray(SAMPLES["bmp"])
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    tiff = SAMPLES["tiff"]
    for tag in (256, 257):
        for kind, size in ((3, "H"), (4, "I")):
            entry = struct.pack("<HHI" + size, tag, kind, 1, 61 if tag == 256 else 47)
            tiff = tiff.replace(entry, struct.pack("<HHI" + size, tag, kind, 1, 60_000))
    avif = SAMPLES["avif"].replace(struct.pack(">II", 61, 47), struct.pack(">II", 15_000, 15_000))
    return {
        "jpeg": bytes(jpeg),
        "png": png(100_000, 100_000, 8, 2, bytes(100_000)),
        "webp": b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp,
        "gif": SAMPLES["gif"][:6] + b"\xff\xff\xff\xff" + SAMPLES["gif"][10:],
        "bmp": bytes(bmp),
        "tiff": tiff,
        "avif": avif,
        "jpeg2000": SAMPLES["jpeg2000"]
        .replace(struct.pack(">II", 47, 61), struct.pack(">II", 60_000, 60_000))
        .replace(struct.pack(">II", 61, 47), struct.pack(">II", 60_000, 60_000)),
    }


def damaged(count: int, seed: int = 0) -> list[bytes]:
    """Good files with flipped bits, overwritten runs, and pieces cut out or repeated, more often near the header."""
    rng = random.Random(seed)
    out = []
    for data in islice(cycle(SAMPLES.values()), count):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(bad)) if rng.random() < 0.5 else rng.randrange(min(len(bad), 200))
            kind = rng.randrange(4)
            if kind == 0:
                bad[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                bad[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", rng.randbytes(4)])
            elif kind == 2:
                del bad[at : at + rng.randint(1, 20)]
            else:
                bad[at:at] = bad[at : at + rng.randint(1, 20)]
        out.append(bytes(bad))
    return out


# ---------------------------------------------------------------- a corpus


def hostile(count: int = 2500) -> Iterator[tuple[str, bytes]]:
    """(kind, file) of at least `count` files, the same ones every time."""
    number = 0
    for kind, data in _made_by_hand():
        number += 1
        yield kind, data
    for data in damaged(max(0, count - number), seed=1):
        yield "damaged", data


def _made_by_hand() -> Iterator[tuple[str, bytes]]:
    for name, data in SAMPLES.items():
        for at in sorted(_boundaries(name, data)):
            for end in (at - 1, at, at + 1, at + 3):
                if 0 <= end < len(data):
                    yield "cut at a marker", data[:end]
        yield "twice", data + data
        yield "with a tail", data + b"PK\3\4" + bytes(1000)
        yield "inside out", data[::-1]
        for other in ("png", "jpeg", "gif"):
            yield "head of another kind", SAMPLES[other][:16] + data[16:]
        for at in range(2, min(len(data), 60), 2):
            yield "header lies", data[:at] + b"\xff\xff" + data[at + 2 :]
            yield "header lies", data[:at] + b"\0\0" + data[at + 2 :]
    for name, data in bombs().items():
        yield f"{name} bomb", data
    jpeg, rows = SAMPLES["jpeg"], b"\0" * 300
    comment = b"\xff\xfe\xff\xff" + bytes(65_533)
    yield "huge comments", jpeg[:2] + comment * 100 + jpeg[2:]
    exif = b"\xff\xe1\xff\xffExif\0\0II*\0" + b"\x08\0\0\0\xff\xff" + bytes(65_517)
    yield "huge EXIF", jpeg[:2] + exif * 50 + jpeg[2:]
    icc = b"\xff\xe2\xff\xffICC_PROFILE\0\1\1" + bytes(65_519)
    yield "huge ICC", jpeg[:2] + icc * 200 + jpeg[2:]
    yield "ICC in 255 pieces that say nothing", jpeg[:2] + (b"\xff\xe2\0\x10ICC_PROFILE\0\1\xff") * 255 + jpeg[2:]
    yield "cut ICC", jpeg[:2] + b"\xff\xe2\0\x0eICC_PROFILE\0"
    scan = SAMPLES["jpeg-progressive"]
    at = scan.rindex(b"\xff\xda")
    yield "endless scans", scan[:at] + scan[at:-2] * 400 + scan[-2:]
    flood = zlib.compress(bytes(50_000_000))
    for kind in (b"zTXt", b"iTXt"):
        head = b"a\0\0" if kind == b"zTXt" else b"a\0\1\0\0\0"
        yield "text bomb", png(10, 10, 8, 2, rows, (kind, head + flood))
    yield "profile bomb", png(10, 10, 8, 2, rows, (b"iCCP", b"a\0\0" + flood))
    yield "pixel bomb", png(10, 10, 8, 2, bytes(30_000_000), stride=30)
    yield "100,000 chunks", png(10, 10, 8, 2, rows, *[(b"teSt", b"")] * 100_000)
    yield "animation that lies", png(10, 10, 8, 2, rows, (b"acTL", b"\xff" * 8))
    gif = SAMPLES["gif-animated"]
    frame = b"\x2c" + bytes(4) + b"\1\0\1\0\0" + b"\x02\x02\x44\x01\0"
    yield "a million frames", gif[:-1] + frame * 1_000_000 + b";"
    for tag in (256, 257, 258, 259, 262, 273, 277, 278, 279, 282, 320, 338, 34675):
        for kind in (1, 3, 4, 5, 12, 16, 99):
            for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
                yield "absurd TIFF tag", _tiff_with(tag, kind, 0xFFFFFFFF if value == 1 else 1, value)
    yield "TIFF that bites its tail", struct.pack("<4sIHI", b"II*\0", 8, 0, 8)
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    yield "GIF and script", b"GIF89a/*" + SAMPLES["gif"][8:] + b"*/=1;alert(1)"


def _tiff_with(tag: int, kind: int, number: int, value: int) -> bytes:
    """A 4x4 grey TIFF in which one tag says something else."""
    entries = {256: (4, 1, 4), 257: (4, 1, 4), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8)}
    entries |= {277: (3, 1, 1), 278: (4, 1, 4), 279: (4, 1, 16), tag: (kind, number, value)}
    directory = b"".join(struct.pack("<HHII", name, *entry) for name, entry in sorted(entries.items()))
    return struct.pack("<4sI", b"II*\0", 24) + bytes(16) + struct.pack("<H", len(entries)) + directory + bytes(4)


def _boundaries(name: str, data: bytes) -> set[int]:
    """Offsets at which parts of a file begin."""
    kind = name.partition("-")[0]
    if kind == "jpeg":
        return {at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] != 0}
    names = {
        "png": (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"),
        "apng": (b"acTL", b"fcTL", b"IDAT", b"fdAT", b"IEND"),
        "webp": (b"WEBP", b"VP8", b"ALPH", b"ANIM", b"ANMF", b"EXIF"),
        "gif": (b"\x21\xf9", b"\x2c", b"\x3b"),
        "avif": (b"ftyp", b"meta", b"iloc", b"ispe", b"mdat"),
    }.get(kind, ())
    found = {at for part in names for at in range(len(data)) if data.startswith(part, at)}
    return found or set(range(0, len(data), max(1, len(data) // 20)))
