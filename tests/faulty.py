"""What a worker is given to run in tests: it does as the data says."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

from pipeline.imaging import transform, worker_protocol


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
    elif word == b"raise":
        raise ValueError("a defect")
    elif word == b"sleep":
        time.sleep(float(rest))
    elif word == b"grow":
        _kept.append(bytes(os.urandom(1)) * int(rest))
    return data + str(os.getpid()).encode() if word == b"pid" else data[::-1]


_kept: list[bytes] = []


def judge(data: bytes, rules: transform.Rules, limits: transform.Limits) -> bytes:
    """The image path with two holes: images whose first pixel's red is 1 crash it, 2 hang it."""
    if data.startswith(b"\x89PNG"):
        red = int(transform.decode(data, transform.probe(data))[0, 0, 0])
        if red in (1, 2):
            obey(b"segfault" if red == 1 else b"hang")
    return worker_protocol.answer(data, rules, limits)
