"""Latents that lie elsewhere: shards are brought into a local cache as they are needed, and read there as local ones.

S3, GCS and Azure are read by :mod:`pipeline.stores`; other places (OCI, HDFS, SFTP, the Hub) by mosaicml-streaming.
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
_TIMEOUT = 120.0  # seconds without success for one file
_AT_ONCE = 8  # downloads
_HASHES = ("xxh3_128", "sha256", "sha1", "md5")  # those that are checked, the first that a shard's entry has


class RemoteFolder(LatentFolder):
    """Stored latents elsewhere, by position.

    Processes of one machine may share the cache: a shard is downloaded once, checked against the size and hash that
    ``index.json`` has of it, and then put in place as a whole. A killed process leaves nothing that counts.

    Args:
        place: URL of a folder of MDS shards; ``file://`` for one that is mounted here, but slow.
        cache: local folder; ``""``: that of :func:`pipeline.stores.cache.cache_folder`.
        cache_limit: bytes of all that it may hold, see :class:`pipeline.stores.cache.Cache`.

    Raises:
        ConfigError: there is no such folder, or it holds no latents or others than expected.
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

    # ---- what lies there

    def _manifest(self) -> Mapping[str, Any] | None:
        """What the manifest there says, fetched afresh as it may have changed; None where there is none."""
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
        """What index.json there says; the cache is that of this content, as the same place may hold another later."""
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
        """A small file; raises FileNotFoundError if it is not there."""
        with _scratch(self._cache.folder) as path:
            self._download(name, path)
            return path.read_bytes()

    def _download(self, name: str, path: Path, size: int = -1) -> None:
        """Bring a file to ``path``; raises FileNotFoundError if it is not there, StorageError if it does not come."""
        remote = f"{self._place}/{name}"
        for attempt in range(1, _TRIES + 1):
            try:
                _bring(remote, path, size)
                return
            except (FileNotFoundError, stores.StoreError):  # which has been tried again already
                raise
            except Exception as error:  # each kind of storage has exceptions of its own
                path.unlink(missing_ok=True)
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                if any(word in said.lower() for word in ("not found", "404", "nosuchkey")):
                    raise FileNotFoundError(f"{remote}: {said}") from None
                if attempt == _TRIES:
                    raise StorageError(f"{remote} cannot be downloaded ({said})") from error

    # ---- shards

    def require(self, positions: npt.NDArray[Any]) -> None:
        """Begin to download the shards that hold these samples, those of the first ones first, and let them stay;
        returns at once."""
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
        """Raises ConfigError if the cache cannot hold the shards that samples are shuffled among, and those that come
        meanwhile.

        Args:
            window: shards among which samples are shuffled.
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
            raise StorageError(f"{self.name}: the program ends")  # which waits for what has begun, and no longer
        return self._fetched(number)

    def _mapped(self, number: int) -> npt.NDArray[Any]:
        """The bytes of a shard; those of shards that were evicted since are let go, so that the disk gets its room."""
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
        """Close shards that were evicted: only then the disk gets their room."""
        for number in list(self._open):
            with suppress(FileNotFoundError):
                if os.stat(self._cache.folder / self._cached(number)).st_ino == self._inodes[number]:
                    continue
            del self._open[number]

    def _cached(self, number: int) -> str:
        return f"{self.path.name}/{self._shards[number]['raw_data']['basename']}"

    def _fetched(self, number: int) -> Path:
        """The local file of a shard; downloads it unless it is there whole."""
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
        """Raises StorageError unless a file has the size and the hash that the index says."""
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
    """Write what lies at ``remote`` to ``path``; ``size``: its bytes, if they are known."""
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
    """The name of a file in ``folder`` that is gone afterwards, unless it was moved."""
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
