"""Makes archives, proper ones by Python's own modules and others by hand."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

from pipeline.sources.archives.tar import BLOCK

TAR = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": lambda data: gzip.compress(data, 1),
    "bz2": bz2.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
}
END = bytes(2 * BLOCK)


def tar_of(files: dict[str, bytes], kind: str = "pax", **fields: Any) -> bytes:
    return tar_of_entries([entry(name, data, **fields) for name, data in files.items()], kind)


def entry(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of_entries(entries: list[tuple[tarfile.TarInfo, bytes]], kind: str = "pax") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=TAR[kind]) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data) if data else None)
    return file.getvalue()


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def header(name: str | bytes, size: int | bytes = 0, kind: bytes = b"0") -> bytes:
    """A ustar header with any size, as a number or as the field's 12 bytes."""
    block = bytearray(BLOCK)
    name = name.encode() if isinstance(name, str) else name
    block[: len(name)] = name
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)
