"""Objects below an address: listed, read, written whole, and created by exactly one writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage import interposed
from pipeline.stores.address import canonical, is_hub, split
from pipeline.stores.bucket_client import client_of
from pipeline.stores.errors import CUTS, StoreError, explained, retried

HASH = "latentmill_xxh3"
"""Name of the metadata with the XXH3-128 of an object that we wrote."""
PART = 8 << 20  # bytes of a part of a multipart upload, and of a read
_MOST_PARTS = 9000  # stores take 10,000
_PARTS_AT_ONCE = 4  # of one object that is downloaded


@dataclass(frozen=True, slots=True)
class Object:
    """An object as a listing has it; ``path`` is relative to the place that was listed."""

    path: str
    size: int
    etag: str


class Store:
    """A place in an object store; paths are relative to it.

    Args:
        url: ``s3://bucket/prefix``, ``gs://…`` or ``az://…``; ``hf://datasets/owner/name[@revision]/prefix`` can only
            be read.

    Raises:
        ConfigError: it is no such address, or the settings for the store make no sense.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = canonical(url)
        self._root, prefix = split(self.url)
        self._prefix = f"{prefix}/" if prefix else ""
        self._raw  # noqa: B018 - complains now

    @property
    def _raw(self) -> Any:
        return client_of(self._root)

    def _at(self, path: str) -> str:
        return f"{self._prefix}{path}" if path else self._prefix.rstrip("/")

    @property
    def bucket(self) -> str:
        """``scheme://bucket``; of the Hub the repository."""
        return self._root

    @property
    def is_bucket(self) -> bool:
        """Whether this is a whole bucket."""
        return not self._prefix

    @property
    def commit(self) -> str:
        """The commit of a repository that is read; empty for other stores, which have none."""
        return retried(self.url, "read", lambda: self._raw.commit) if is_hub(self.url) else ""

    def look_again(self) -> None:
        """Read the newest commit of a repository from now on, not that which was the newest at first."""
        if is_hub(self.url):
            self._raw.look_again()

    def name(self, path: str) -> str:
        """The address of an object, for messages."""
        return f"{self.url}/{path}" if path else self.url

    def __truediv__(self, path: str) -> Store:
        return Store(self.name(path))

    # ---- reading

    def objects(self, path: str = "") -> Iterator[Object]:
        """All objects in the folder ``path`` and below, in the order of their names."""
        start = self._at(path).rstrip("/") or None
        last: str | None = None
        cuts = 0
        while True:
            before = last
            with explained(self.name(path), "listed"):
                pages = iter(self._raw.list(start, offset=last))
            try:
                while (page := self._page(path, pages)) is not None:
                    for found in page:
                        last = found["path"]
                        yield Object(last.removeprefix(self._prefix), found["size"], found["e_tag"] or "")
                return
            except StoreError as error:  # goes on after the last name that came
                cuts = cuts + 1 if last == before else 0
                if error.kind != "cut" or cuts == CUTS:
                    raise

    def _page(self, path: str, pages: Iterator[Any]) -> Any:
        with explained(self.name(path), "listed"):
            return interposed("listed", self.name(path), lambda: next(pages, None))

    def children(self, path: str = "") -> tuple[list[str], list[Object]]:
        """Names of the folders, and the objects, directly in the folder ``path``."""
        start = self._at(path).rstrip("/") or None
        found = retried(self.name(path), "listed", lambda: self._raw.list_with_delimiter(start))
        folders = [name.rstrip("/").rpartition("/")[2] for name in found["common_prefixes"]]
        objects = [Object(o["path"].removeprefix(self._prefix), o["size"], o["e_tag"] or "") for o in found["objects"]]
        return folders, objects

    def head(self, path: str = "") -> Object:
        """Size and version of an object; raises StoreError, ``missing`` if there is none."""
        return self.described(path)[0]

    def described(self, path: str = "") -> tuple[Object, str]:
        """An object, and the XXH3-128 that it was stored with; empty if there is none."""
        got = retried(self.name(path), "read", lambda: self._raw.get(self._at(path), options={"head": True}))
        return Object(path, got.meta["size"], got.meta["e_tag"] or ""), str(got.attributes.get(HASH, ""))

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        try:
            self.head(path)
        except StoreError as error:
            if not error.not_there:
                raise
            return False
        return True

    def read(self, path: str = "") -> bytes:
        """All bytes of a small object."""
        return self.versioned(path)[0]

    def versioned(self, path: str) -> tuple[bytes, str]:
        """All bytes of a small object, and its version."""

        def do() -> tuple[bytes, str]:
            got = self._raw.get(self._at(path))
            return bytes(got.bytes()), got.meta["e_tag"] or ""

        return retried(self.name(path), "read", do)

    def chunks(self, path: str = "", start: int = 0, etag: str = "") -> Iterator[bytes]:
        """The bytes of an object from ``start`` on, piece by piece.

        Args:
            etag: the version that it must have (empty: any).

        Raises:
            StoreError: ``missing``, ``changed``, or it does not come.
        """
        return self.get(path, start, etag)[1]

    def get(self, path: str = "", start: int = 0, etag: str = "") -> tuple[Object, Iterator[bytes]]:
        """Size and version of an object, and its bytes as :meth:`chunks` has them, by one request."""
        got = retried(self.name(path), "read", lambda: self._asked(path, start, etag))
        found = Object(path, got.meta["size"], got.meta["e_tag"] or "")
        return found, self._pieces(found, start, got)

    def download(self, found: Object, path: Path) -> None:
        """Write the bytes of an object to a file that is there, by several requests at a time.

        Raises:
            StoreError: ``missing``, ``changed``, or it does not come.
        """
        os.truncate(path, found.size)
        spans = [(start, min(start + PART, found.size)) for start in range(0, found.size, PART)]

        def part(span: tuple[int, int]) -> None:
            with open(path, "r+b", buffering=0) as file:
                file.seek(span[0])
                file.write(self._span(found, *span))

        if len(spans) == 1:
            part(spans[0])
        elif spans:
            with ThreadPoolExecutor(_PARTS_AT_ONCE, "parts") as pool:
                list(pool.map(part, spans))

    def _span(self, found: Object, start: int, stop: int) -> Any:
        """Bytes ``start`` to ``stop`` of an object, by one request."""

        def do() -> Any:
            data = self._asked(found.path, start, found.etag, stop).bytes()
            if len(data) != stop - start:
                raise StoreError(f"{self.name(found.path)}: {len(data)} of {stop - start} bytes came", "cut")
            return data

        return retried(self.name(found.path), "read", do)

    def _asked(self, path: str, start: int, etag: str, stop: int = 0) -> Any:
        options: dict[str, Any] = {"range": (start, stop)} if stop else {"range": {"offset": start}} if start else {}
        if etag:
            options["if_match"] = etag
        return self._raw.get(self._at(path), options=options)

    def _pieces(self, found: Object, start: int, got: Any) -> Iterator[bytes]:
        """The bytes of the answer ``got``, and of further ones where it is cut off."""
        path, cuts = found.path, 0
        while start < found.size:
            before = start
            try:
                with explained(self.name(path), "read"):
                    got = got or self._asked(path, start, found.etag)
                    pieces = iter(got.stream(min_chunk_size=1 << 20))
                while (piece := self._piece(path, pieces)) is not None:
                    start += len(piece)
                    yield bytes(piece)
                if start < found.size:
                    said = f"{self.name(path)}: only {start} of {found.size} bytes came; run it again"
                    raise StoreError(said, "cut")
            except StoreError as error:
                cuts = cuts + 1 if start == before else 0
                if error.kind != "cut" or cuts == CUTS:
                    raise
            got = None

    def _piece(self, path: str, pieces: Iterator[Any]) -> Any:
        with explained(self.name(path), "read"):
            return next(pieces, None)

    # ---- writing

    def put(self, path: str, data: bytes, *, hashed: str = "") -> str:
        """Store a small object whole, instead of what is there; its version."""
        return self._put(path, data, hashed, "overwrite")

    def put_new(self, path: str, data: bytes) -> bool:
        """Store a small object unless there is one already, which exactly one writer can do.

        Returns:
            True if the object there is ``data``: put by this call, or by an earlier try whose answer was lost.
        """
        return self._conditional(path, data, "create")

    def replace(self, path: str, data: bytes, etag: str) -> bool:
        """Store a small object instead of the version ``etag``; returns as :meth:`put_new`."""
        mode: dict[str, str | None] = {"e_tag": etag}
        if self._root.startswith("gs:"):  # whose writes know generations only
            found = retried(self.name(path), "read", lambda: self._raw.head(self._at(path)))
            if found["e_tag"] != etag:
                return self._is(path, data)
            mode["version"] = found["version"]
        return self._conditional(path, data, mode)

    def _conditional(self, path: str, data: bytes, mode: Any) -> bool:
        try:
            self._put(path, data, "", mode)
        except StoreError as error:
            if error.kind != "changed":
                raise
        else:
            return True
        return self._is(path, data)

    def _is(self, path: str, data: bytes) -> bool:
        """Whether an object is there and holds ``data``."""
        try:
            return self.read(path) == data
        except StoreError as error:
            if not error.not_there:
                raise
            return False  # it was deleted meanwhile, but was there

    def _put(self, path: str, data: bytes, hashed: str, mode: Any) -> str:
        attributes: Any = {HASH: hashed} if hashed else None
        result = retried(
            self.name(path),
            "written",
            lambda: self._raw.put(self._at(path), data, attributes=attributes, mode=mode, use_multipart=False),
        )
        return result["e_tag"] or ""

    def upload(self, path: str, pieces: Callable[[], Iterable[bytes]], size: int, hashed: str) -> str:
        """Store ``size`` bytes by parallel parts, whole or not at all; its version.

        Requests are signed with the SHA-256 of what they carry where the store has that (S3 and its kin): it refuses
        other bytes. An exception of ``pieces``, which may be called again, leaves nothing.
        """
        if size <= PART:
            return self._put(path, b"".join(pieces()), hashed, "overwrite")
        attributes: Any = {HASH: hashed} if hashed else None
        part = max(PART, -(-size // _MOST_PARTS))
        result = retried(
            self.name(path),
            "written",
            lambda: self._raw.put(self._at(path), iter(pieces()), attributes=attributes, chunk_size=part),
        )
        return result["e_tag"] or ""

    def delete(self, paths: list[str]) -> None:
        """Delete objects; those that are not there do no harm."""
        if paths:
            names = [self._at(path) for path in paths]
            try:
                retried(self.url, "deleted from", lambda: self._raw.delete(names))
            except StoreError as error:
                if error.kind != "missing" or "no such bucket" in str(error):
                    raise
                for path in paths if len(paths) > 1 else ():
                    self.delete([path])
