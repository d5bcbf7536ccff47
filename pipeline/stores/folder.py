"""A folder in an object store, with the interface of a local one."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.storage import Folder, StorageError
from pipeline.stores.cache import Cache
from pipeline.stores.store import Object, Store

_AT_ONCE = 4  # files prefetched at the same time


def absent(place: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)


class StoreFolder(Folder):
    """A folder in an object store that is read like a local one; files are cached when they are opened.

    The listing of a folder is cached, and shows its state at the first access. A folder that was committed in the store
    contains only its proof, which names the attempt whose folder has the other files (see
    :mod:`pipeline.stores.output`): they are found as if they were next to the proof. Likewise, the files of the attempt
    that ``_SUCCESS`` names take precedence over those of the same name at the root.

    Args:
        store: the root of the dataset directory.
        at: path of this folder below it.
    """

    def __init__(self, store: Store, cache: Cache, at: str = "") -> None:
        super().__init__(-1, Path(store.name(at)))
        self.store = store
        self.at = at
        self._cache = cache
        self._folders: dict[str, dict[str, Object | None]] = {}
        self._fetching: tuple[int, ThreadPoolExecutor] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def in_place(self) -> bool:
        return True

    def _below(self, name: str) -> str:
        """The path of ``name`` relative to the root."""
        return "/".join(filter(None, (self.at, name)))

    def _inside(self, path: str) -> StoreFolder:
        inner = type(self)(self.store, self._cache, path)
        inner._folders = self._folders
        return inner

    def _children(self, path: str) -> dict[str, Object | None]:
        """Contents of a folder: name → the object, or None for a subfolder."""
        if path not in self._folders:
            found = self._listed(path)
            proofs = [name for name in found if name in PROOFS]
            if len(found) == len(proofs) == 1:
                found |= self._listed(attempt_folder(path, self.store.read(f"{path}/{proofs[0]}")))
            self._folders[path] = found
        return self._folders[path]

    def _listed(self, path: str) -> dict[str, Object | None]:
        folders, objects = self.store.children(path)
        found: dict[str, Object | None] = dict.fromkeys(folders)
        found.update({o.path.rpartition("/")[2]: o for o in objects})
        return found

    def _find(self, name: str) -> Object:
        path = self._below(name)
        parent, _, last = path.rpartition("/")
        found = self._children(parent).get(last)
        if not parent and last != SUCCESS and SUCCESS in self._children(""):
            found = self._children(finish_folder(self.store.read(SUCCESS))).get(last) or found
        if found is None:
            raise absent(self.store.name(path))
        return found

    def folder(self, name: str) -> Folder:
        path = self._below(name)
        if not self._children(path):
            raise absent(self.store.name(path))
        return self._inside(path)

    def listdir(self) -> list[str]:
        return sorted(self._children(self.at))

    def exists(self, name: str) -> bool:
        parent, _, last = self._below(name).rpartition("/")
        return last in self._children(parent)

    def place(self, name: str) -> str:
        path = self._below(name)
        found = next(filter(None, (o for n, o in self._children(path).items() if n not in PROOFS)), None)
        return found.path.rpartition("/")[0] if found else path

    def stat(self, name: str) -> os.stat_result:
        with os.fdopen(self.open_file(name), "rb") as file:
            return os.fstat(file.fileno())

    def open_file(self, name: str) -> int:
        return self._cache.open(self.store, self._find(name))

    def fetch(self, names: Callable[[], list[str]]) -> None:
        """Start fetching files into the cache and return at once; errors are raised when a file is opened."""
        if self._fetching is None or self._fetching[0] != os.getpid():  # threads do not survive a fork
            self._fetching = os.getpid(), ThreadPoolExecutor(_AT_ONCE, "fetch")

        def bring() -> None:
            with suppress(OSError, StorageError):
                for name in names():
                    if threading.main_thread().is_alive():  # otherwise the program is ending
                        os.close(self.open_file(name))

        self._fetching[1].submit(bring)

    def _refused(self, *args: Any, **options: Any) -> Any:
        raise StorageError(
            f"{self.path} can only be read: change the local folder that it was published from, and run "
            "stage=publish again"
        )

    mkdir = create = rename = unlink = sync = delete = _write_small = _refused


SUCCESS = "_SUCCESS"
FINISH = ".final."
"""Prefix of folders with the files that an attempt to finish a dataset has written for its root."""
PROOFS = ("record.json", "plan.json")
"""Files that commit a folder; they contain the id of its attempt."""


def attempt_folder(path: str, proof: bytes) -> str:
    """The folder of the attempt from which the folder ``path`` was committed.

    Raises:
        StorageError: the proof is damaged.
    """
    try:
        value = json.loads(proof)
        name = str(value.get("attempt") or value["id"])
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StorageError(f"{path} is damaged: its record names no attempt") from None
    parent, slash, last = path.rpartition("/")
    return f"{parent}{slash}.{last}.{name}"


def finish_folder(success: bytes) -> str:
    """The folder with the files that ``_SUCCESS`` refers to, if it was written in the store; empty if at the root."""
    try:
        attempt = json.loads(success).get("attempt", "")
    except (ValueError, AttributeError):
        return ""  # its reader reports the damage
    return f"{FINISH}{attempt}" if attempt else ""


def open_folder(url: str | Path) -> StoreFolder:
    """Open a dataset directory in a store for reading.

    Raises:
        FileNotFoundError: there are no objects below ``url``.
    """
    store = Store(url)
    store.look_again()
    folder = StoreFolder(store, Cache())
    if not folder.listdir():
        raise absent(folder.store.url)
    return folder
