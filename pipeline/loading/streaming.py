"""Remote latents: shards are downloaded to a local cache as they are needed, and then read like local ones.

S3, GCS and Azure are read by :mod:`pipeline.stores`; other stores (OCI, HDFS, SFTP, the Hub) by mosaicml-streaming.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import stores
from pipeline.config.schema import ConfigError
from pipeline.loading.latent_folder import Expected, LatentFolder
from pipeline.storage import StorageError
from pipeline.stores.cache import Cache

_LOCAL = "file://"
_TRIES = 3
_TIMEOUT = 120.0  # seconds to download a file
_AT_ONCE = 8  # concurrent downloads
_HASHES = ("xxh3_128", "sha256", "sha1", "md5")  # supported hashes; the first that a shard has is checked


class RemoteFolder(LatentFolder):
    """Remote latents, by position.

    Processes of one machine may share the cache: a shard is downloaded once, checked against its size and hash in
    ``index.json``, and then moved into place atomically. A killed process leaves no partial shard behind.

    Args:
        place: URL of a folder of MDS shards; ``file://`` for a folder that is mounted but slow.
        cache: local folder; ``""``: that of :func:`pipeline.stores.cache.cache_folder`.
        cache_limit: bytes that the cache may hold, see :class:`pipeline.stores.cache.Cache`.

    Raises:
        ConfigError: the folder does not exist, or does not hold the expected latents.
        StorageError: it cannot be reached.
    """

    is_far = True

    def __init__(
        self, place: str, expected: Expected | None = None, cache: str | Path = "", cache_limit: int = 0
    ) -> None:
        self._place = place.rstrip("/")
        self._cache = Cache(cache, cache_limit)
        self._inodes: dict[int, int] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Path]] = {}
        self._seen = hashlib.sha256(self._place.encode())
        super().__init__(self._cache.folder, expected)

    @property
    def name(self) -> str:
        return self._place

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pool": None, "_coming": {}, "_seen": None}

    # ---- metadata

    def _manifest(self) -> Mapping[str, Any] | None:
        """The remote manifest, always downloaded as it may have changed; None if there is none."""
        try:
            data = self._fresh("manifest.json")
        except FileNotFoundError:
            return None
        self._seen.update(data)
        manifest = json.loads(data)
        if "shapes" not in manifest:
            raise ConfigError(f"{self.name} holds no latents: it was made by stage={manifest.get('stage', '?')}")
        return dict(manifest)

    def _index(self) -> dict[str, Any]:
        """The remote index.json. Its content selects the cache folder, as the URL may hold other data later."""
        try:
            data = self._fresh("index.json")
            index: dict[str, Any] = json.loads(data)
        except FileNotFoundError as error:
            raise ConfigError(f"{self.name}: not an MDS folder: index.json: {error.strerror or error}") from None
        except ValueError:
            raise ConfigError(f"{self.name}: not an MDS folder: index.json: not JSON") from None
        self._seen.update(data)
        self.path /= self._seen.hexdigest()[:16]
        return index

    def _small_file(self, name: str) -> bytes:
        return self._fresh(name)

    def _fresh(self, name: str) -> bytes:
        """Download a small file; raises FileNotFoundError if it does not exist."""
        with _scratch(self._cache.folder) as path:
            self._download(name, path)
            return path.read_bytes()

    def _download(self, name: str, path: Path, size: int = -1) -> None:
        """Download a file to ``path``; raises FileNotFoundError if it is missing, StorageError if it cannot be read."""
        remote = f"{self._place}/{name}"
        for attempt in range(1, _TRIES + 1):
            try:
                _bring(remote, path, size)
                return
            except (FileNotFoundError, stores.StoreError):  # has been retried already
                raise
            except Exception as error:  # each storage client has its own exceptions
                path.unlink(missing_ok=True)
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                if any(word in said.lower() for word in ("not found", "404", "nosuchkey")):
                    raise FileNotFoundError(f"{remote}: {said}") from None
                if attempt == _TRIES:
                    raise StorageError(f"{remote} cannot be downloaded ({said})") from error

    # ---- shards

    def require(self, positions: npt.NDArray[Any]) -> None:
        """Start to download the shards of these samples, in the order in which they are needed, and keep cached ones
        from being evicted; returns at once."""
        numbers, first = np.unique(np.searchsorted(self._starts, positions, "right") - 1, return_index=True)
        for number in numbers[np.argsort(first)].tolist():
            if number in self._open:
                with suppress(FileNotFoundError):
                    os.utime(self._cache.folder / self._cached(number))
            elif number not in self._coming:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="shards")
                self._coming[number] = self._pool.submit(self._fetched_ahead, number)

    def check_cache(self, window: int) -> None:
        """Raises ConfigError if the cache is too small for the shards in the shuffle window and those being downloaded.

        Args:
            window: number of shards among which samples are shuffled.
        """
        sizes = sorted((int(shard["raw_data"]["bytes"]) for shard in self._shards), reverse=True)
        least = sum(sizes[: 2 * window + _AT_ONCE])
        if least > self._cache.most_bytes:
            raise ConfigError(
                f"cache_limit={self._cache.most_bytes}: samples of {self.name} are shuffled within {window} shards, "
                f"for which the cache needs {least} bytes"
            )

    def _fetched_ahead(self, number: int) -> Path:
        if not threading.main_thread().is_alive():
            raise StorageError(f"{self.name}: the program ends")  # exit waits for started downloads only
        return self._fetched(number)

    def _mapped(self, number: int) -> npt.NDArray[Any]:
        """The bytes of a shard, memory-mapped; also closes evicted shards."""
        future = self._coming.pop(number, None)
        if future is not None:
            future.result()
        raw = self._shards[number]["raw_data"]
        fd = self._cache.opened(self._cached(number), raw["bytes"], lambda path: self._bring(number, path))
        with os.fdopen(fd, "rb", buffering=0) as file:
            self._let_go()
            self._inodes[number] = os.fstat(fd).st_ino
            return np.memmap(file, np.uint8, "r").view(np.ndarray)

    def _let_go(self) -> None:
        """Close shards that were evicted, as the disk space is only freed then."""
        for number in list(self._open):
            with suppress(FileNotFoundError):
                if os.stat(self._cache.folder / self._cached(number)).st_ino == self._inodes[number]:
                    continue
            del self._open[number]

    def _cached(self, number: int) -> str:
        return f"{self.path.name}/{self._shards[number]['raw_data']['basename']}"

    def _fetched(self, number: int) -> Path:
        """The local file of a shard, downloaded unless it is complete."""
        size = self._shards[number]["raw_data"]["bytes"]
        return self._cache.file(self._cached(number), size, lambda path: self._bring(number, path))

    def _bring(self, number: int, path: Path) -> None:
        shard = self._shards[number]
        source = shard.get("zip_data") or shard["raw_data"]
        self._download(str(source["basename"]), path, int(source["bytes"]))
        self._check(path, source)
        if shard.get("zip_data"):
            self._unpack(path, shard)

    def _check(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Raises StorageError unless a file has the size and hash recorded in the index."""
        name = f"{self.name}/{entry['basename']}"
        found = path.stat().st_size
        if found != entry["bytes"]:
            raise StorageError(f"{name} has {found} bytes, but index.json says {entry['bytes']}")
        hashes = entry.get("hashes") or {}
        kind = next((kind for kind in _HASHES if kind in hashes), "")
        if kind and _hash_of(path, kind) != hashes[kind]:
            raise StorageError(f"{name}: its bytes are not those that index.json has the {kind} of")

    def _unpack(self, path: Path, shard: Mapping[str, Any]) -> None:
        from streaming.base.compression import decompress

        data = decompress(shard["compression"], path.read_bytes())
        if len(data) != shard["raw_data"]["bytes"]:
            raise StorageError(f"{self.name}/{shard['zip_data']['basename']}: {len(data)} bytes come out of it")
        path.write_bytes(data)


def _bring(remote: str, path: Path, size: int) -> None:
    """Download ``remote`` to ``path``; ``size``: in bytes, -1 if unknown."""
    if remote.startswith(_LOCAL):
        shutil.copyfile(remote.removeprefix(_LOCAL), path)
        return
    if stores.is_url(remote):
        try:
            store = stores.Store(remote)
            if size >= 0:
                store.download(stores.Object("", size, ""), path)
            else:
                path.write_bytes(store.read())
        except stores.StoreError as error:
            if error.kind == "missing":
                raise FileNotFoundError(str(error)) from None
            raise
        return
    from streaming.base.storage.download import CloudDownloader

    CloudDownloader.get(remote).download(remote, str(path), _TIMEOUT)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary file name in ``folder``; the file is deleted afterwards unless it was moved."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def _hash_of(path: Path, kind: str) -> str:
    import xxhash

    digest: Any = xxhash.xxh3_128() if kind == "xxh3_128" else hashlib.new(kind)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())
