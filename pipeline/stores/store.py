"""Lists, reads and writes the objects below an address; conditional writes let exactly one writer create an object."""

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
PART = 8 << 20  # bytes per part of a multipart upload
_RANGE = 16 << 20  # bytes per request of a download: smaller objects take a single request
_MOST_PARTS = 9000  # stores accept 10,000
_PARTS_AT_ONCE = 4  # parallel requests when an object is downloaded


@dataclass(frozen=True, slots=True)
class Object:
    """An object in a listing; ``path`` is relative to the :class:`Store`."""

    path: str
    size: int
    etag: str


class Store:
    """An address in an object store; paths are relative to it.

    Args:
        url: ``s3://bucket/prefix``, ``gs://…`` or ``az://…``; ``hf://datasets/owner/name[@revision]/prefix`` can only
            be read.

    Raises:
        ConfigError: ``url`` is not such an address, or the settings for the store are invalid.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = canonical(url)
        self._root, prefix = split(self.url)
        self._prefix = f"{prefix}/" if prefix else ""
        self._raw  # noqa: B018 - raises errors in the settings now

    @property
    def _raw(self) -> Any:
        return client_of(self._root)

    def _at(self, path: str) -> str:
        return f"{self._prefix}{path}" if path else self._prefix.rstrip("/")

    @property
    def bucket(self) -> str:
        """``scheme://bucket``; on the Hub, the repository."""
        return self._root

    @property
    def is_bucket(self) -> bool:
        """Whether this is a whole bucket."""
        return not self._prefix

    @property
    def commit(self) -> str:
        """The commit of the repository that is read; empty for other stores."""
        return retried(self.url, "read", lambda: self._raw.commit) if is_hub(self.url) else ""

    def look_again(self) -> None:
        """Read the newest commit of a repository from now on, instead of the one that was the newest before."""
        if is_hub(self.url):
            self._raw.look_again()

    def name(self, path: str) -> str:
        """The address of an object, for messages."""
        return f"{self.url}/{path}" if path else self.url

    def __truediv__(self, path: str) -> Store:
        return Store(self.name(path))

    # ---- reading

    def objects(self, path: str = "") -> Iterator[Object]:
        """All objects in the folder ``path`` and its subfolders, ordered by name."""
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
            except StoreError as error:  # the next request continues after the last name received
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
        """Size and version of an object; raises StoreError, of kind ``missing`` if it does not exist."""
        return self.described(path)[0]

    def described(self, path: str = "") -> tuple[Object, str]:
        """An object, and the XXH3-128 in its metadata; empty if it has none."""
        got = retried(self.name(path), "read", lambda: self._raw.get(self._at(path), options={"head": True}))
        return Object(path, got.meta["size"], got.meta["e_tag"] or ""), str(got.attributes.get(HASH, ""))

    def exists(self, path: str) -> bool:
        """Whether the object exists."""
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
        """The bytes of an object from ``start`` on, in pieces.

        Args:
            etag: the version that it must have (empty: any).

        Raises:
            StoreError: the object does not exist, has another version, or cannot be read.
        """
        return self.get(path, start, etag)[1]

    def get(self, path: str = "", start: int = 0, etag: str = "") -> tuple[Object, Iterator[bytes]]:
        """Size and version of an object, and its bytes as from :meth:`chunks`, with a single request."""
        got = retried(self.name(path), "read", lambda: self._asked(path, start, etag))
        found = Object(path, got.meta["size"], got.meta["e_tag"] or "")
        return found, self._pieces(found, start, got)

    def download(self, found: Object, path: Path) -> None:
        """Write the bytes of an object to an existing file, with several parallel requests.

        Raises:
            StoreError: the object does not exist, has changed, or cannot be read.
        """
        os.truncate(path, found.size)
        spans = [(start, min(start + _RANGE, found.size)) for start in range(0, found.size, _RANGE)]

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
        """Bytes ``start`` to ``stop`` of an object, with one request."""

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
        """The bytes of the response ``got``, and of further requests if it is cut off."""
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
        """Store a small object, replacing an existing one; returns its version."""
        return self._put(path, data, hashed, "overwrite")

    def put_new(self, path: str, data: bytes) -> bool:
        """Create a small object if it does not exist; of several writers, exactly one succeeds.

        Returns:
            True if the object contains ``data``: from this call, or from an earlier attempt whose response was lost.
        """
        return self._conditional(path, data, "create")

    def replace(self, path: str, data: bytes, etag: str) -> bool:
        """Replace a small object if it still has the version ``etag``; returns as :meth:`put_new`."""
        mode: dict[str, str | None] = {"e_tag": etag}
        if self._root.startswith("gs:"):  # Google's conditional writes only support generations
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
        """Whether an object exists and contains ``data``."""
        try:
            return self.read(path) == data
        except StoreError as error:
            if not error.not_there:
                raise
            return False  # it existed, but was deleted in the meantime

    def _put(self, path: str, data: bytes, hashed: str, mode: Any) -> str:
        attributes: Any = {HASH: hashed} if hashed else None
        result = retried(
            self.name(path),
            "written",
            lambda: self._raw.put(self._at(path), data, attributes=attributes, mode=mode, use_multipart=False),
        )
        return result["e_tag"] or ""

    def upload(self, path: str, pieces: Callable[[], Iterable[bytes]], size: int, hashed: str) -> str:
        """Store ``size`` bytes in parallel parts, completely or not at all; returns the version of the object.

        S3 and compatible stores get requests signed with the SHA-256 of their body, and refuse other bytes. ``pieces``
        may be called again; if it raises an exception, nothing is stored.
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
        """Delete objects; missing ones are ignored."""
        if paths:
            names = [self._at(path) for path in paths]
            try:
                retried(self.url, "deleted from", lambda: self._raw.delete(names))
            except StoreError as error:
                if error.kind != "missing" or "no such bucket" in str(error):
                    raise
                for path in paths if len(paths) > 1 else ():
                    self.delete([path])
