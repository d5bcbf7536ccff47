"""What an image worker makes of a file, as plain bytes: it decodes what may be hostile, so that nothing is unpickled.

A head of fixed size with what was found, then the bytes of the image. Those of one that passes through untouched are
not sent back.
"""

from __future__ import annotations

import re
import struct

from pipeline.imaging.headers import DEFAULT_LIMITS, FORMATS, ImageError, Limits
from pipeline.imaging.transform import Dropped, Result, Rules, judge

_KEPT, _UNCHANGED, _DROPPED, _ERROR = range(4)
_RESULT = struct.Struct("<BBIIII?16s")  # kind, format, width and height now and before, whether there is a hash, hash
_REASON = re.compile(r"[a-z0-9_]{1,40}")
_DETAIL = 400  # characters
_EDGE = 2**31
_REFUSED: dict[int, type[Dropped] | type[ImageError]] = {_DROPPED: Dropped, _ERROR: ImageError}


def answer(data: bytes, rules: Rules, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """`judge`, for a worker."""
    found = judge(data, rules, limits)
    if not isinstance(found, Result):
        kind = _DROPPED if isinstance(found, Dropped) else _ERROR
        return bytes([kind]) + f"{found.reason}\0{found.detail[:_DETAIL]}".encode(errors="backslashreplace")
    sizes = (found.width, found.height, found.source_width, found.source_height)
    kind, format = _KEPT if found.changed else _UNCHANGED, FORMATS.index(found.format)
    head = _RESULT.pack(kind, format, *sizes, bool(found.phash), bytes.fromhex(found.phash))
    return head + found.data if found.changed else head


def understood(said: bytes | bytearray, data: bytes) -> Result | ImageError | Dropped:
    """What `answer` said of `data`; raises ValueError if it cannot have said that."""
    kind = said[0] if said else -1
    if kind in _REFUSED:
        reason, _, detail = said[1:].decode().partition("\0")
        if not _REASON.fullmatch(reason):
            raise ValueError("no reason")
        return _REFUSED[kind](reason, detail)
    if kind not in (_KEPT, _UNCHANGED) or len(said) < _RESULT.size:
        raise ValueError("no answer")
    _, format, width, height, source_width, source_height, has_hash, look = _RESULT.unpack_from(said)
    if format >= len(FORMATS) or not all(0 < edge < _EDGE for edge in (width, height, source_width, source_height)):
        raise ValueError("no image")
    image, changed = (bytes(memoryview(said)[_RESULT.size :]), True) if kind == _KEPT else (data, False)
    seen = look.hex() if has_hash else ""
    return Result(image, FORMATS[format], width, height, source_width, source_height, changed, seen)
