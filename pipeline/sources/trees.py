"""The files that ``input=`` names: one file, or all files in a folder, locally or in an object store."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from pipeline import stores
from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import file_state
from pipeline.sources.ranges import expand
from pipeline.stores import Object, Store, StoreError


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Convert permanent errors of a store into a ConfigError that names the setting."""
    try:
        yield
    except StoreError as error:
        if error.kind in ("missing", "denied"):
            raise ConfigError(f"{setting}: {error}") from None
        raise
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from None


def objects(setting: str, addresses: Iterable[str]) -> list[Object]:
    """Return the objects that match addresses with ranges and patterns; their paths are full addresses.

    Raises:
        ConfigError: an address matches nothing or is not readable.
        StoreError: the store does not answer.
    """
    with _named(setting):
        return stores.matching(expand(list(addresses)))


class Tree(ABC):
    """Files by name relative to the folder; names are sorted by component.

    Attributes:
        is_folder: whether the tree is a folder, not a file or a pattern.
    """

    is_folder: bool

    def __init__(self, given: str) -> None:
        self.said = f"input={given}"

    @abstractmethod
    def ending(self, suffixes: Sequence[str]) -> list[str]:
        """Names of files with one of ``suffixes``, ignoring case; for a single file or a pattern, all names."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether the file ``name`` exists."""

    @abstractmethod
    def has_folder(self, name: str) -> bool:
        """Whether the folder ``name`` exists."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Size of a file in bytes."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read a small file.

        Raises:
            OSError: it cannot be read; FileNotFoundError: it does not exist.
        """

    @abstractmethod
    def place(self, name: str) -> str:
        """The path or address of a file."""

    @abstractmethod
    def state(self, name: str) -> str:
        """State of a file; it changes when the file changes."""


def _of_pattern(given: str) -> str:
    """A hint for the message if ``given`` is a pattern that matches no local file."""
    return ": patterns are for object stores; give the folder" if re.search(r"[*?{]", given) else ""


class LocalTree(Tree):
    """A local folder or file."""

    def __init__(self, given: str) -> None:
        super().__init__(given)
        self._path = Path(given).absolute()
        self.is_folder = self._path.is_dir()
        if not self.is_folder and not self._path.is_file():
            raise ConfigError(f"{self.said}: no such file or folder{_of_pattern(given)}")
        self._root = self._path if self.is_folder else self._path.parent

    def ending(self, suffixes: Sequence[str]) -> list[str]:
        if not self.is_folder:
            return [self._path.name]
        ends = tuple(suffixes)
        found = sorted(p for p in self._root.rglob("*") if p.name.lower().endswith(ends) and p.is_file())
        return [str(path.relative_to(self._root)) for path in found]

    def has(self, name: str) -> bool:
        return os.path.isfile(self._root / name)  # also False for invalid file names

    def has_folder(self, name: str) -> bool:
        return os.path.isdir(self._root / name)

    def size(self, name: str) -> int:
        return (self._root / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def place(self, name: str) -> str:
        return str(self._root / name)

    def state(self, name: str) -> str:
        return file_state(self._root / name)


class StoreTree(Tree):
    """A prefix in an object store, a single object, or a pattern.

    Attributes:
        found: the objects by name, listed once.
    """

    def __init__(self, given: str) -> None:
        super().__init__(given)
        self._given = given
        self.found: dict[str, Object] = {}
        self.is_folder = not re.search(r"[*?]|\{\d+\.\.\d+\}", given)
        if not self.is_folder:
            self._root = re.split(r"[*?{]", given)[0].rpartition("/")[0]
            self._add(objects(self.said, [given]))
            return
        with _named(self.said):
            self._root = stores.canonical(given)
            may_be_object = not given.endswith("/") and not Store(self._root).is_bucket
        if may_be_object:
            with _named(self.said):
                try:
                    one = Store(self._root).head()
                except StoreError as error:
                    if not error.not_there:
                        raise
                else:
                    self.is_folder = False
                    self._add([Object(self._root, one.size, one.etag)], self._root.rpartition("/")[0])
                    return
        self._add(objects(self.said, [f"{self._root}/"]))

    def _add(self, found: list[Object], root: str = "") -> None:
        self._root = root or self._root
        self.found = {o.path.removeprefix(f"{self._root}/"): o for o in found}

    def ending(self, suffixes: Sequence[str]) -> list[str]:
        ends = tuple(suffixes)
        return [name for name in self.found if not self.is_folder or name.lower().endswith(ends)]

    def has(self, name: str) -> bool:
        return name in self.found

    @cached_property
    def _folders(self) -> set[str]:
        parts = (name.split("/")[:-1] for name in self.found)
        return {"/".join(folders[:count]) for folders in parts for count in range(1, len(folders) + 1)}

    def has_folder(self, name: str) -> bool:
        return name in self._folders

    def size(self, name: str) -> int:
        return self.found[name].size

    def read(self, name: str) -> bytes:
        if name not in self.found:
            raise FileNotFoundError(2, "no such object", self.place(name))
        with _named(self.said):
            return b"".join(Store(self.place(name)).chunks(etag=self.found[name].etag))

    def place(self, name: str) -> str:
        return f"{self._root}/{name}"

    def state(self, name: str) -> str:
        return self.found[name].etag if name in self.found else ""


def get_tree(given: str) -> Tree:
    """Return the files that ``input=given`` refers to.

    Raises:
        ConfigError: there is nothing, or it is not readable.
        StoreError: the store does not answer.
    """
    return StoreTree(given) if stores.is_url(given) else LocalTree(given)
