"""A folder with a publisher's files that replaces the network: ``mirror=``."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from pipeline.config.schema import ConfigError


class Mirror:
    """Finds the local copy of a URL, or of a path in a repository.

    The file may be at the URL's path (with or without the host), or at any trailing part of the path, in the folder;
    the longest existing one is used. Otherwise, it is the only file of this name in any subfolder. If there is none,
    the same is tried without the compression suffix, for files that have been unpacked.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, folder: str, setting: str = "mirror") -> None:
        self.root = Path(folder).absolute()
        self.said = f"{setting}={folder}"
        if not self.root.is_dir():
            raise ConfigError(f"{self.said}: {'a file, not a folder' if self.root.is_file() else 'no such folder'}")

    def find(self, place: str) -> Path | None:
        """The local copy of ``place``; None if there is none."""
        path = place
        if "://" in place:
            parts = urlsplit(place)
            path = f"{parts.hostname or ''}/{unquote(parts.path)}"
        names = [part for part in PurePosixPath(path).parts if part not in ("", ".", "..", "/") and "\0" not in part]
        if not names:
            return None
        bare = re.sub(r"(\.tar)?\.(gz|tgz|bz2|xz)$|\.tgz$", "", names[-1])
        return self._found(names) or (self._found([*names[:-1], bare]) if bare != names[-1] else None)

    def _found(self, names: list[str]) -> Path | None:
        for first in range(len(names)):
            file = self.root.joinpath(*names[first:])
            try:
                if file.is_file():
                    return file
            except OSError:  # the name is too long for the file system
                continue
        return self._elsewhere(names)

    def _elsewhere(self, names: list[str]) -> Path | None:
        """The file of this name in any subfolder whose path has most in common with ``names``; None if not unique."""

        def common(path: str) -> int:
            pairs = zip(reversed(path.split("/")), reversed(names), strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

        found = sorted(self._by_name.get(names[-1], ()), key=common, reverse=True)
        if not found or (len(found) > 1 and common(found[0]) == common(found[1])):
            return None
        return self.root / found[0]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        named: dict[str, list[str]] = defaultdict(list)
        for path in self.paths():
            named[path.rpartition("/")[2]].append(path)
        return named

    def paths(self) -> list[str]:
        """Sorted paths of all files below the folder, relative to it, without hidden ones."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))
