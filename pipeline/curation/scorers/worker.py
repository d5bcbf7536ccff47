"""Computes scores of an image in a decoding worker for ``stage=score``; results are plain bytes, never pickles."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.curation.scorers import get_scorer
from pipeline.curation.scorers.pixels import View
from pipeline.imaging.headers import ImageError, Limits, probe
from pipeline.imaging.transform import Pixels, decode

_SCORED, _REFUSED = 0, 1
_REASON = re.compile(r"[a-z0-9_]{1,40}")
_DETAIL = 400  # characters
_SIZE = struct.Struct("<II")


class Cut(Protocol):
    """How an encoder crops an image; see :class:`pipeline.encoders.crop.Crop`."""

    @property
    def bytes(self) -> int: ...

    def cut(self, pixels: Pixels) -> Pixels: ...


@dataclass(frozen=True)
class Scored:
    """Results for an image: width, height, the value of each scorer, and the crop for each encoder, uint8 (e, e, 3)."""

    width: int
    height: int
    values: list[float]
    crops: list[Pixels]


def answer(data: bytes, names: Sequence[str], crops: Sequence[Cut], limits: Limits) -> bytes:
    """Decode ``data`` once; return its scores ``names`` and its ``crops``."""
    try:
        header = probe(data, limits)
        view = View(decode(data, header, limits), data, header)
    except ImageError as error:
        return bytes([_REFUSED]) + f"{error.reason}\0{error.detail[:_DETAIL]}".encode(errors="backslashreplace")
    values = [float(get_scorer(name).function(view)) for name in names]
    height, width = view.pixels.shape[:2]
    parts = [bytes([_SCORED]), _SIZE.pack(width, height), np.array(values, "<f8").tobytes()]
    return b"".join([*parts, *(np.ascontiguousarray(crop.cut(view.pixels)).tobytes() for crop in crops)])


def understood(said: bytes | bytearray, scores: int, crops: Sequence[Cut]) -> Scored | ImageError:
    """Read the answer of :func:`answer`; raises ValueError if it is invalid."""
    if said[:1] == bytes([_REFUSED]):
        reason, _, detail = bytes(said[1:]).decode().partition("\0")
        if not _REASON.fullmatch(reason):
            raise ValueError("no reason")
        return ImageError(reason, detail)
    start = 1 + _SIZE.size
    if said[:1] != bytes([_SCORED]) or len(said) != start + 8 * scores + sum(crop.bytes for crop in crops):
        raise ValueError("no answer")
    width, height = _SIZE.unpack_from(said, 1)
    values = np.frombuffer(said, "<f8", scores, start).tolist()
    at, cut = start + 8 * scores, []
    for crop in crops:
        edge = round((crop.bytes // 3) ** 0.5)
        cut.append(np.frombuffer(said, np.uint8, crop.bytes, at).reshape(edge, edge, 3))
        at += crop.bytes
    return Scored(width, height, values, cut)
