"""Reading archives member by member, never extracting: regular files only, sizes and numbers capped, the end seen."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import IO

from pipeline.sources.archives.compression import unpacked
from pipeline.sources.archives.member import Member, Wants
from pipeline.sources.archives.tar import tar_members
from pipeline.sources.archives.zip import zip_members

__all__ = ["Member", "Wants", "check", "members"]

_RATIO = 200  # unpacked bytes per packed byte, beyond a first GiB, that we take for honest
_HONEST = 1 << 30


def members(file: IO[bytes], max_members: int, wants: Wants) -> Iterator[Member]:
    """The members of a tar (plain, gzip, bzip2, xz) or zip file that are wanted, in the archive's order.

    Raises:
        SampleError: ``not_an_archive``, ``truncated_archive``, ``damaged_archive``, ``too_many_members``,
            ``archive_bomb``; after :func:`check` found nothing, none of them.
        OSError: ``file`` cannot be read.
    """
    most = max(_HONEST, file.seek(0, io.SEEK_END) * _RATIO)
    file.seek(0)
    if file.read(4) in (b"PK\3\4", b"PK\5\6"):
        return zip_members(file, max_members, most, wants)
    return tar_members(unpacked(file, most), max_members, wants)


def check(file: IO[bytes], max_members: int, step: Callable[[], None]) -> None:
    """Go through the archive once without taking anything, so that it counts as a whole or not at all.

    Of a plain tar only the headers are read, of a zip the directory; what is compressed as a whole must be unpacked.
    ``step`` is called for each file, and may raise.
    """

    def nothing(name: str, size: int) -> None:
        step()

    for _ in members(file, max_members, nothing):
        pass
