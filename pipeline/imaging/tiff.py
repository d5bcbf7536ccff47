"""Removes metadata that point beyond the end of the file from TIFF directories (TIFF 6.0, section 2)."""

from __future__ import annotations

import struct

_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes per value of each field type."""
_PIXELS = frozenset(
    number
    for first, last in ((254, 266), (273, 274), (277, 284), (290, 301), (317, 325), (330, 347), (512, 532), (559, 559))
    for number in range(first, last + 1)
)
"""Tags that may affect pixels."""


def without_lost_fields(data: bytes) -> bytes:
    """Remove the fields of the first directory that do not affect pixels and whose values lie beyond the file's end.

    Decoders ignore all fields after such a field. Returns ``data`` itself if there are none or it is not a TIFF.
    """
    order = _ORDERS.get(data[:4])
    try:
        if order is None:
            return data
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        fields = [data[start + 2 + 12 * number :][:12] for number in range(count)]
        stop = start + 2 + 12 * count
        kept = [field for field in fields if not _is_lost(field, order, len(data))]
    except struct.error:
        return data
    if len(kept) == len(fields):
        return data
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + data[stop : stop + 4]
    return data[:start] + directory.ljust(stop + 4 - start, b"\0") + data[stop + 4 :]


def _is_lost(field: bytes, order: str, end: int) -> bool:
    tag, kind, count, offset = struct.unpack(order + "HHII", field)
    size = _SIZES.get(kind, 0) * count
    return tag not in _PIXELS and size > 4 and offset + size > end
