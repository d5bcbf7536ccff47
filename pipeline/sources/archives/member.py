"""What archives of every kind are read into: one member at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.samples import SampleError

Wants = Callable[[str, int], int | None]
"""Asked for each file of an archive with its name and size: how many bytes of it to read; None: not even its name."""


@dataclass(slots=True)
class Member:
    """A file in an archive: the bytes that were wanted of it, or why they are not to be had.

    ``name`` has lone surrogates instead of bytes that are not UTF-8. ``offset`` is that of the data in the (unpacked)
    archive, -1 where it is not known.
    """

    name: str
    size: int
    offset: int = -1
    data: bytes = b""
    error: SampleError | None = None


def damaged(detail: str) -> SampleError:
    """The archive's structure makes no sense; the server may have a better one another day."""
    return SampleError("damaged_archive", detail, retryable=True)


def truncated(detail: str) -> SampleError:
    """The archive ends before its end marker."""
    return SampleError("truncated_archive", detail, retryable=True)


def too_many(members: int) -> SampleError:
    """More than ``max_members``, which may be raised for another try."""
    return SampleError("too_many_members", f"more than {members}", retryable=True)


def bomb(detail: str) -> SampleError:
    """The archive is out to exhaust us."""
    return SampleError("archive_bomb", detail)
