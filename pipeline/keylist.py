"""Lists of keys in files, to keep or to deny samples by: of 100 million keys, 1.6 GB in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.config import ConfigError

_BLOCK = 1 << 22
_ROWS = 1 << 16


class KeyList:
    """The keys in a text file, one on each line, or in the column `key` of a parquet file (or its only one).

    Of each its XXH3-128 is held, 16 bytes: two keys of one hash are not to be expected before 2^64 of them.

    Raises:
        ConfigError: the file cannot be read, or there is no key in it.
    """

    def __init__(self, path: str) -> None:
        try:
            digests = bytearray()
            for key in _parquet_keys(path) if path.endswith(".parquet") else _text_keys(path):
                digests += xxhash.xxh3_128_digest(key)
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise ConfigError(f"{path}: no list of keys: {error}") from None
        hashes = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self._high, self._low = hashes[order, 0], hashes[order, 1]
        if not len(order):
            raise ConfigError(f"{path}: there is no key in it")

    def __len__(self) -> int:
        return len(self._high)

    def __contains__(self, key: object) -> bool:
        digest = xxhash.xxh3_128_digest(str(key))
        high, low = (np.uint64(int.from_bytes(half, "big")) for half in (digest[:8], digest[8:]))
        first = int(np.searchsorted(self._high, high))
        while first < len(self._high) and self._high[first] == high:
            if self._low[first] == low:
                return True
            first += 1
        return False


def _text_keys(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        yield from filter(None, (line.strip() for line in file))


def _parquet_keys(path: str) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if "key" not in names and len(names) != 1:
            raise ConfigError(f"{path}: it has no column key, but {', '.join(names)}")
        column = "key" if "key" in names else names[0]
        for batch in file.iter_batches(_ROWS, columns=[column], use_threads=False):
            for key in batch.column(0).cast(pa.string()).to_pylist():
                if key:
                    yield key


def key_digest(path: str) -> str:
    """XXH3-128 of the file; empty for no path. Raises ConfigError if it cannot be read."""
    whole = xxhash.xxh3_128()
    try:
        if path:
            with Path(path).open("rb") as file:
                while block := file.read(_BLOCK):
                    whole.update(block)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return f"xxh3:{whole.hexdigest()}" if path else ""
