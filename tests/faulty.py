"""What a worker is given to run in tests: it does as the data says."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from pipeline.imaging import transform, worker_pool, worker_protocol


def obey(data: bytes, *arguments: Any) -> bytes:
    word, _, rest = data.partition(b" ")
    if word == b"segfault":
        ctypes.string_at(0)
    elif word == b"hang":
        ctypes.CDLL(None).sleep(3600)  # in C, where no Python code can end it
    elif word == b"spin":
        while True:
            pass
    elif word == b"abort":
        os.abort()
    elif word == b"killed-once" and not os.path.exists(rest):
        open(rest, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == b"gorge":
        try:
            bytearray(2**33)
        except MemoryError:
            return b"refused"
    elif word == b"leave":
        _write(worker_pool._SAID.pack(worker_pool._LEAVING, 0, 0))
        os._exit(0)
    elif word == b"raise":
        raise ValueError("a defect")
    elif word == b"sleep":
        time.sleep(float(rest))
    elif word == b"grow":
        _kept.append(bytes(os.urandom(1)) * int(rest))
    return data + str(os.getpid()).encode() if word == b"pid" else data[::-1]


_kept: list[bytes] = []


def _write(data: bytes) -> None:
    """To the rank, past what a worker says."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.write(int(name), data)


EVIL = ("segfault", "hang", "flood", "garbage", "raise", "short", "long", "raw", "twice", "leave")
"""What an image can do to the process that decodes it: die, hang, take much memory, have it give no answer, raise, give
an answer that is too short or too long; write garbage to the rank, answer twice, say that it leaves and die."""


def evil_png(kind: str, edge: int = 64) -> bytes:
    """An image like others, which the functions below do not survive."""
    pixels = np.full((edge, edge, 3), 128, np.uint8)
    pixels[0, 0] = (EVIL.index(kind), 77, 99)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def evil_of(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        number, *mark = Image.open(BytesIO(data)).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
        return EVIL[number] if mark == [77, 99] and EVIL[number] in os.environ.get("EVIL", EVIL) else ""
    return ""


def _planted(function: Any, data: bytes, *arguments: Any, before: tuple[Any, ...] = ()) -> bytes:
    """``function``, whose decoder evil images take over."""
    kind, decode = evil_of(data), transform._decode

    def evil(*given: Any, **named: Any) -> Any:
        if kind in ("segfault", "hang", "raise", "leave"):
            obey(kind.encode())
        if kind == "flood":
            bytearray(2**33)
        return decode(*given, **named)

    transform._decode = evil  # type: ignore[assignment]
    try:
        answer: bytes = function(*before, data, *arguments)
    finally:
        transform._decode = decode
    said = {"short": answer[:-1], "long": answer + bytes(2**20), "garbage": b"\xff" * 40}.get(kind, answer)
    if kind in ("raw", "twice"):
        _write(b"\xff" * 64 if kind == "raw" else worker_pool._SAID.pack(1, 2**31, 0))
    return said


def judge(data: bytes, *arguments: Any) -> bytes:
    return _planted(worker_protocol.answer, data, *arguments)


def pixels(data: bytes, *arguments: Any) -> bytes:
    return _planted(worker_protocol.pixels, data, *arguments)


def size(data: bytes, *arguments: Any) -> bytes:
    return _planted(worker_protocol.size, data, *arguments)


def fill(slot: np.ndarray, data: bytes, *arguments: Any) -> bytes:
    from pipeline.latents import image_decoding

    return _planted(image_decoding.fill, data, *arguments, before=(slot,))
