"""Encodes the answers of image workers as plain bytes: workers decode hostile data, so their answers are not unpickled.

For each kind of answer, there is a function that the worker runs and one that reads the answer and raises ValueError if
it is invalid:

===========================  ========================  =============================================
function of the worker       read by                   gives
===========================  ========================  =============================================
:func:`answer`               :func:`understood`        the image that stage=filter stores
:func:`answer_with_boxes`    :func:`with_boxes`        the same with blurred boxes
:func:`pixels`               :func:`read_pixels`       the whole image, uint8 (h, w, 3)
:func:`size`                 :func:`read_size`         (height, width) after decoding completely
:func:`header_size`          :func:`read_size`         (height, width) from the header
===========================  ========================  =============================================

The bytes of an image that the filter leaves unchanged are not sent back.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import numpy as np

from pipeline.imaging import blur
from pipeline.imaging.headers import DEFAULT_LIMITS, FORMATS, ImageError, Limits, probe
from pipeline.imaging.transform import Dropped, Pixels, Result, Rules, decode, judge

_KEPT, _UNCHANGED, _DROPPED, _ERROR = range(4)
_RESULT = struct.Struct("<BBIIII?16s")  # kind, format, new and original size, has hash, hash
_SIZE = struct.Struct("<BII")  # kind, height, width
_REASON = re.compile(r"[a-z0-9_]{1,40}")
_DETAIL = 400  # characters
_EDGE = 2**31
_REFUSED: dict[int, type[Dropped] | type[ImageError]] = {_DROPPED: Dropped, _ERROR: ImageError}
SMALL = 4096
"""Maximum bytes of an answer without pixels."""


def answer(data: bytes, rules: Rules, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """`judge`, for a worker."""
    return _said(judge(data, rules, limits))


def answer_with_boxes(task: bytes, rules: Rules, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """`answer` for an image with boxes, packed by :func:`pipeline.imaging.blur.packed`."""
    boxes, data = blur.unpacked(task)
    return _said(judge(data, rules, limits, boxes))


def with_boxes(said: bytes | bytearray, task: bytes) -> Result | ImageError | Dropped:
    """Read the answer of `answer_with_boxes` to `task`; raises ValueError if it is invalid."""
    boxes, data = blur.unpacked(task)
    found = understood(said, data)
    if isinstance(found, Result) and boxes and not found.changed:
        raise ValueError("an image that was not blurred")
    return found


def _said(found: Result | ImageError | Dropped) -> bytes:
    if not isinstance(found, Result):
        return _refusal(found)
    sizes = (found.width, found.height, found.source_width, found.source_height)
    kind, format = _KEPT if found.changed else _UNCHANGED, FORMATS.index(found.format)
    head = _RESULT.pack(kind, format, *sizes, bool(found.phash), bytes.fromhex(found.phash))
    return head + found.data if found.changed else head


def understood(said: bytes | bytearray, data: bytes) -> Result | ImageError | Dropped:
    """Read the answer of `answer` to `data`; raises ValueError if it is invalid."""
    kind = said[0] if said else -1
    if kind in _REFUSED:
        return _read_refusal(said)
    if kind not in (_KEPT, _UNCHANGED) or len(said) < _RESULT.size:
        raise ValueError("no answer")
    _, format, width, height, source_width, source_height, has_hash, look = _RESULT.unpack_from(said)
    if format >= len(FORMATS) or not all(0 < edge < _EDGE for edge in (width, height, source_width, source_height)):
        raise ValueError("no image")
    if (kind == _KEPT) != (len(said) > _RESULT.size):
        raise ValueError("an answer of the wrong length")
    image, changed = (bytes(memoryview(said)[_RESULT.size :]), True) if kind == _KEPT else (data, False)
    seen = look.hex() if has_hash else ""
    return Result(image, FORMATS[format], width, height, source_width, source_height, changed, seen)


def pixels(data: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The whole image, for a worker."""
    return _decoded(data, limits, lambda image: image.tobytes())


def read_pixels(said: bytes | bytearray, data: bytes = b"") -> Pixels | ImageError:
    """Read the answer of `pixels`, uint8 (h, w, 3); raises ValueError if it is invalid."""
    if said[:1] == bytes([_ERROR]):
        return _read_error(said)
    height, width = _read_head(said)
    if len(said) != _SIZE.size + 3 * height * width:
        raise ValueError(f"{len(said) - _SIZE.size} bytes of pixels for an image of {width}x{height}")
    return np.frombuffer(said, np.uint8, offset=_SIZE.size).reshape(height, width, 3)


def size(data: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The size of an image after decoding it completely, for a worker."""
    return _decoded(data, limits, lambda image: b"")


def header_size(data: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The upright size of an image from its header, for a worker."""
    try:
        width, height = probe(data, limits).upright
    except ImageError as error:
        return _refusal(error)
    return _SIZE.pack(_KEPT, height, width)


def read_size(said: bytes | bytearray, data: bytes = b"") -> tuple[int, int] | ImageError:
    """Read the answer of `size` or `header_size`, (height, width); raises ValueError if it is invalid."""
    if said[:1] == bytes([_ERROR]):
        return _read_error(said)
    if len(said) != _SIZE.size:
        raise ValueError("an answer of the wrong length")
    return _read_head(said)


def _decoded(data: bytes, limits: Limits, more: Callable[[Pixels], bytes]) -> bytes:
    try:
        image = decode(data, probe(data, limits), limits)
        return _SIZE.pack(_KEPT, *image.shape[:2]) + more(image)
    except ImageError as error:
        return _refusal(error)
    except MemoryError:
        return _refusal(ImageError("out_of_memory"))


def _read_head(said: bytes | bytearray) -> tuple[int, int]:
    if len(said) < _SIZE.size or said[0] != _KEPT:
        raise ValueError("no answer")
    _, height, width = _SIZE.unpack_from(said)
    if not (0 < height < _EDGE and 0 < width < _EDGE):
        raise ValueError("no image")
    return height, width


def _refusal(found: Dropped | ImageError) -> bytes:
    kind = _DROPPED if isinstance(found, Dropped) else _ERROR
    return bytes([kind]) + reason_bytes(found.reason, found.detail)


def _read_refusal(said: bytes | bytearray) -> Dropped | ImageError:
    reason, detail = read_reason(said[1:])
    return _REFUSED[said[0]](reason, detail)


def _read_error(said: bytes | bytearray) -> ImageError:
    return ImageError(*read_reason(said[1:]))


def reason_bytes(reason: str, detail: str) -> bytes:
    """Encode the reason for rejecting an image, as part of an answer."""
    return f"{reason}\0{detail[:_DETAIL]}".encode(errors="backslashreplace")


def read_reason(said: bytes | bytearray) -> tuple[str, str]:
    """Inverse of :func:`reason_bytes`; raises ValueError if the bytes are invalid."""
    reason, _, detail = said.decode().partition("\0")
    if not _REASON.fullmatch(reason) or len(said) > SMALL:
        raise ValueError("no reason")
    return reason, detail
