"""Durations and sizes as text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h 05 min`` or ``2 d 03 h``."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    if whole < 172_800:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(count: int) -> str:
    """Bytes as text: ``812 MB``, ``1.5 GB``; empty for 0."""
    if not count:
        return ""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def counted(count: int, noun: str) -> str:
    """``1 partition``, ``1,200 partitions``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
