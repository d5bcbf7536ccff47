"""Reads archives member by member without extracting them: only regular files, with limited sizes and counts, and up
to the end marker."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import IO

from pipeline.sources.archives.compression import unpacked
from pipeline.sources.archives.member import Member, Wants
from pipeline.sources.archives.tar import tar_members
from pipeline.sources.archives.zip import zip_members

__all__ = ["Member", "Wants", "check", "members"]

_RATIO = 200  # plausible unpacked bytes per packed byte, beyond the first _HONEST bytes
_HONEST = 1 << 30


def members(file: IO[bytes], max_members: int, wants: Wants) -> Iterator[Member]:
    """Yield the wanted members of a tar (plain, gzip, bzip2, xz) or zip file, in the archive's order.

    Raises:
        SampleError: ``not_an_archive``, ``truncated_archive``, ``damaged_archive``, ``too_many_members``,
            ``archive_bomb``. Never raised after :func:`check` has succeeded.
        OSError: ``file`` cannot be read.
    """
    most = max(_HONEST, file.seek(0, io.SEEK_END) * _RATIO)
    file.seek(0)
    if file.read(4) in (b"PK\3\4", b"PK\5\6"):
        return zip_members(file, max_members, most, wants)
    return tar_members(unpacked(file, most), max_members, wants)


def check(file: IO[bytes], max_members: int, step: Callable[[], None]) -> None:
    """Read the archive once without yielding members, so that a damaged one is rejected as a whole.

    Of an uncompressed tar, only the headers are read, of a zip only the central directory; a compressed tar is
    unpacked. ``step`` is called for each file and may raise.
    """

    def nothing(name: str, size: int) -> None:
        step()

    for _ in members(file, max_members, nothing):
        pass
