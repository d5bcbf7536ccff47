"""Latents that lie elsewhere: shards are brought into a local cache as they are needed, and read there as local ones.

The downloads themselves are those of mosaicml-streaming, which knows S3, GCS, OCI, Azure, HDFS, SFTP and the Hub.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import ConfigError
from pipeline.loading.latent_folder import Expected, LatentFolder
from pipeline.storage import StorageError

_LOCAL = "file://"
_TRIES = 3
_TIMEOUT = 120.0  # seconds without success for one file
_AT_ONCE = 4  # downloads
_HASHES = ("xxh3_128", "sha256", "sha1", "md5")  # those that are checked, the first that a shard's entry has


def default_cache() -> Path:
    """Where shards go if no ``cache=`` is given."""
    return Path(tempfile.gettempdir()) / f"latentmill-{os.geteuid()}"


class RemoteFolder(LatentFolder):
    """Stored latents elsewhere, by position.

    Processes of one machine may share the cache: a shard is downloaded once, checked against the size and hash that
    ``index.json`` has of it, and then put in place as a whole. A killed process leaves nothing that counts.

    Args:
        place: URL of a folder of MDS shards; ``file://`` for one that is mounted here, but slow.
        cache: local folder; ``""``: a folder below the system's temporary one.

    Raises:
        ConfigError: there is no such folder, or it holds no latents or others than expected.
        StorageError: it cannot be reached.
    """

    def __init__(self, place: str, expected: Expected | None = None, cache: str | Path = "") -> None:
        self._place = place.rstrip("/")
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Path]] = {}
        self._seen = hashlib.sha256(self._place.encode())
        super().__init__(cache or default_cache(), expected)

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
            raise ConfigError(f"{self.name} holds no latents: it is made by stage={manifest.get('stage', '?')}")
        return dict(manifest)

    def _index(self) -> dict[str, Any]:
        """What index.json there says; the cache is that of this content, as the same place may hold another later."""
        try:
            data = self._fresh("index.json")
            index: dict[str, Any] = json.loads(data)
        except FileNotFoundError as error:
            raise ConfigError(f"{self.name}: no MDS folder: index.json: {error.strerror or error}") from None
        except ValueError:
            raise ConfigError(f"{self.name}: no MDS folder: index.json: not JSON") from None
        self._seen.update(data)
        self.path /= self._seen.hexdigest()[:16]
        return index

    def _fresh(self, name: str) -> bytes:
        """A small file; raises FileNotFoundError if it is not there."""
        with _scratch(self.path) as path:
            self._download(name, path)
            return path.read_bytes()

    def _download(self, name: str, path: Path) -> None:
        """Bring a file to ``path``; raises FileNotFoundError if it is not there, StorageError if it does not come."""
        remote = f"{self._place}/{name}"
        for attempt in range(1, _TRIES + 1):
            try:
                _bring(remote, path)
                return
            except FileNotFoundError:
                raise
            except Exception as error:  # each kind of storage has exceptions of its own
                path.unlink(missing_ok=True)
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                if any(word in said.lower() for word in ("not found", "404", "nosuchkey")):
                    raise FileNotFoundError(f"{remote}: {said}") from None
                if attempt == _TRIES:
                    raise StorageError(f"{remote} cannot be downloaded ({said})") from error

    # ---- shards

    def require(self, positions: np.ndarray) -> None:
        """Begin to download the shards that hold these samples; returns at once."""
        numbers = np.unique(np.searchsorted(self._starts, positions, "right") - 1)
        for number in numbers.tolist():
            if number not in self._open and number not in self._coming:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="shards")
                self._coming[number] = self._pool.submit(self._fetched_ahead, number)

    def _fetched_ahead(self, number: int) -> Path:
        if not threading.main_thread().is_alive():
            raise StorageError(f"{self.name}: the program ends")  # which waits for what has begun, and no longer
        return self._fetched(number)

    def _path_of(self, number: int) -> Path:
        future = self._coming.pop(number, None)
        return future.result() if future is not None else self._fetched(number)

    def _fetched(self, number: int) -> Path:
        """The local file of a shard; downloads it unless it is there whole."""
        shard = self._shards[number]
        raw = shard["raw_data"]
        path = self.path / str(raw["basename"])
        if path.is_file() and path.stat().st_size == raw["bytes"]:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            if path.is_file() and path.stat().st_size == raw["bytes"]:
                return path  # another process was faster
            source = shard.get("zip_data") or raw
            with _scratch(self.path) as arrived:
                self._download(str(source["basename"]), arrived)
                self._check(arrived, source)
                if shard.get("zip_data"):
                    self._unpack(arrived, shard)
                os.replace(arrived, path)
        return path

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


def _bring(remote: str, path: Path) -> None:
    if remote.startswith(_LOCAL):
        shutil.copyfile(remote.removeprefix(_LOCAL), path)
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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all threads and processes of this machine that lock ``path``; a lock dies with its process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _hash_of(path: Path, kind: str) -> str:
    import xxhash

    digest: Any = xxhash.xxh3_128() if kind == "xxh3_128" else hashlib.new(kind)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())
