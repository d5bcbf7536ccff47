"""Writes Thrift's compact protocol, as far as headers and footers of Parquet files need it.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any


class I32(int):
    """A 32-bit integer or an enumeration value."""


class I64(int):
    """A 64-bit integer."""


_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_SHORT = 15
"""Field steps and list lengths below this share a byte with the type."""


def packed(struct: dict[int, Any]) -> bytes:
    """Encode a struct, given as a dict of ordered field numbers to I32, I64, str, structs, or non-empty lists."""
    parts = []
    before = 0
    for number, value in struct.items():
        kind, step = _kind(value), number - before
        parts.append(bytes([step << 4 | kind]) if step < _SHORT else bytes([kind]) + _number(number))
        parts.append(_packed(value))
        before = number
    return b"".join(parts) + b"\0"


def _packed(value: Any) -> bytes:
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, str):
        text = value.encode()
        return varint(len(text)) + text
    if isinstance(value, dict):
        return packed(value)
    kind, count = _kind(value[0]), len(value)
    head = bytes([count << 4 | kind]) if count < _SHORT else bytes([0xF0 | kind]) + varint(count)
    return head + b"".join(map(_packed, value))


def _kind(value: Any) -> int:
    return next(kind for type, kind in _KINDS.items() if isinstance(value, type))


_KINDS = {I32: _I32, I64: _I64, str: _BINARY, list: _LIST, dict: _STRUCT}


def _number(value: int) -> bytes:
    """Zigzag encoding: numbers with small absolute values are short."""
    return varint(value << 1 if value >= 0 else ~(value << 1))


def varint(value: int) -> bytes:
    """Seven bits per byte, lowest first; all bytes except the last have the top bit set."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
