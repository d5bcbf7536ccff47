"""A member of an archive, and the errors that all archive readers raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.samples import SampleError

Wants = Callable[[str, int], int | None]
"""Called with the name and size of each file in an archive; returns how many bytes to read, None to skip the file."""


@dataclass(slots=True)
class Member:
    """A file in an archive: the requested bytes, or the reason why they cannot be read.

    Bytes of ``name`` that are not UTF-8 become lone surrogates. ``offset`` is the position of the data in the
    (unpacked) archive, -1 if unknown.
    """

    name: str
    size: int
    offset: int = -1
    data: bytes = b""
    error: SampleError | None = None


def damaged(detail: str) -> SampleError:
    """The archive's structure is invalid; retryable because the server may replace the file."""
    return SampleError("damaged_archive", detail, retryable=True)


def truncated(detail: str) -> SampleError:
    """The archive ends before its end marker."""
    return SampleError("truncated_archive", detail, retryable=True)


def too_many(members: int) -> SampleError:
    """More than ``max_members`` members; retryable with a higher limit."""
    return SampleError("too_many_members", f"more than {members}", retryable=True)


def bomb(detail: str) -> SampleError:
    """The archive is built to exhaust resources."""
    return SampleError("archive_bomb", detail)
