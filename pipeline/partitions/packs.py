"""Ledgers and records of finished partitions, packed into one file for each bucket of 1,000 partitions.

A pack is an uncompressed zip file, ``packed/BBB.G.zip``. For every partition of bucket ``BBB``, in its state as of
generation ``G``, it contains unchanged copies of ``<slot>/record.json`` and ``<slot>/ledger.parquet``. The data files
stay in the partition's folder. The name of a slot is never reused for different content, so either copy may be read.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.storage import GONE, Folder, HashedFile, StorageError

FOLDER = "packed"
_NAME = re.compile(r"(\d+)\.(\d+)\.zip")
_LOCAL_HEADER = 30  # bytes, before the name and the extra field; APPNOTE.TXT of PKWARE, section 4.3.7
_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class PackName:
    """Name of a pack: its bucket, and the generation as of which it was made."""

    bucket: int
    generation: int

    def __str__(self) -> str:
        return f"{self.bucket:03d}.{self.generation}.zip"

    @classmethod
    def parse(cls, name: str) -> PackName | None:
        found = _NAME.fullmatch(name)
        return cls(int(found[1]), int(found[2])) if found else None


def list_packs(root: Folder) -> list[PackName]:
    """The packs of a dataset directory by bucket, the newest first."""
    try:
        with root.folder(FOLDER) as folder:
            names = folder.listdir()
    except OSError as error:
        if error.errno not in GONE:
            raise
        return []
    found = [pack for name in names if (pack := PackName.parse(name))]
    return sorted(found, key=lambda pack: (pack.bucket, -pack.generation))


class Pack:
    """An open pack, which several threads and processes may read at the same time.

    Raises:
        OSError: it does not exist.
        StorageError: it is damaged.
    """

    def __init__(self, root: Folder, name: PackName) -> None:
        self.name = name
        self._file = os.fdopen(root.open_file(f"{FOLDER}/{name}"), "rb")
        try:
            with zipfile.ZipFile(self._file) as archive:
                self._members = {info.filename: (info.header_offset, info.file_size) for info in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            self._file.close()
            raise StorageError(f"{root.path / FOLDER / str(name)} is damaged: {error}") from None

    @property
    def members(self) -> Iterable[str]:
        """Names of the members: ``<slot>/<file>``."""
        return self._members.keys()

    def read(self, member: str) -> bytes | None:
        """The bytes of a member, unchecked; None if there is no member of this name."""
        if member not in self._members:
            return None
        start, size = self._members[member]
        fd = self._file.fileno()
        header = os.pread(fd, _LOCAL_HEADER, start)
        start += _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return os.pread(fd, size, start)


def write_pack(file: HashedFile, members: Iterator[tuple[str, bytes]]) -> None:
    """Write a pack; equal members give equal bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name, _TIME), data)


class Packs:
    """Finds the small files of partitions in their folders or in packs, which are opened when needed."""

    def __init__(self, root: Folder) -> None:
        self._root = root
        self._opened: dict[PackName, Pack | StorageError] = {}
        self._names: dict[int, list[PackName]] | None = None

    def _of(self, bucket: int, again: bool = False) -> list[PackName]:
        """Packs of a bucket, the newest first; ``again`` lists the folder again instead of using the cached names."""
        if self._names is None or again:
            names: dict[int, list[PackName]] = {}
            for name in list_packs(self._root):
                names.setdefault(name.bucket, []).append(name)
            self._names = names
        return self._names.get(bucket, [])

    def read(self, bucket: int, slot: str, file: str) -> bytes | None:
        """The content of a slot's ``file``, from its folder or from a pack; None if neither has it.

        Raises:
            StorageError: it may have been in a pack that is damaged.
        """
        member, path = f"{slot}/{file}", f"data/{bucket:03d}/{slot}/{file}"
        if (data := self._in_packs(self._of(bucket), member)) is not None:
            return data
        if (data := self._in_folder(path)) is not None:
            return data
        names = self._of(bucket, again=True)  # it may have been packed since the last listing
        if (data := self._in_packs(names, member)) is not None:
            return data
        for name in names:
            if isinstance(damage := self._opened.get(name), StorageError):
                raise damage
        return None

    def _in_folder(self, path: str) -> bytes | None:
        try:
            return self._root.read(path)
        except OSError as error:
            if error.errno in (*GONE, 20):  # ENOTDIR
                return None
            raise

    def _in_packs(self, names: Iterable[PackName], member: str) -> bytes | None:
        for name in names:
            pack = self._open(name)
            if pack is not None and (data := pack.read(member)) is not None:
                return data
        return None

    def _open(self, name: PackName) -> Pack | None:
        if name not in self._opened:
            try:
                self._opened[name] = Pack(self._root, name)
            except StorageError as error:
                self._opened[name] = error
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return None  # replaced by a newer pack
        found = self._opened[name]
        return None if isinstance(found, StorageError) else found
