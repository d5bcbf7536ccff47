"""Key lists in files, to keep or drop samples; 100 million keys need 1.6 GB of memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from pipeline.config.schema import ConfigError
from pipeline.samples.captions import shown_names
from pipeline.sources.lists import SUFFIXES, open_list
from pipeline.sources.text_files import lines_of, list_errors, suffix_of

_BLOCK = 1 << 22


class KeyList:
    """The keys in a file: a text with one per line, a table or Parquet file with a column of keys (or only one column),
    or a ``.npy`` like DataComp's subsets, with pairs of uint64 for uids of 32 hexadecimal digits.

    Only the XXH3-128 of each key is stored (16 bytes); collisions are not expected for fewer than 2^64 keys.

    Args:
        path: the file.
        column: the column of keys in a file that has several.

    Raises:
        ConfigError: the file cannot be read, or it contains no keys.
    """

    def __init__(self, path: str, column: str = "key") -> None:
        digests = bytearray()
        for key in _keys(Path(path), column):
            digests += xxhash.xxh3_128_digest(key)
        hashes = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self._high, self._low = hashes[order, 0], hashes[order, 1]
        if not len(order):
            raise ConfigError(f"{path}: it contains no keys")

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


def _keys(path: Path, column: str) -> Iterator[str]:
    suffix = suffix_of(path)
    if suffix == ".npy":
        return _array_keys(path)
    return _listed_keys(path, column) if suffix in SUFFIXES and suffix != ".txt" else lines_of(path)


def _listed_keys(path: Path, column: str) -> Iterator[str]:
    """Yield the keys in a column of a list; numbers are converted to text."""
    listed = open_list(path, "a list of keys")
    names = listed.columns or list(dict.fromkeys(name for row in islice(listed.rows(), 100) for name in row.values))
    found = next((name for name in names if name.lower() == column.lower()), "")
    if not found:
        if len(names) != 1:
            raise ConfigError(f"{path}: it has no column {column}; it has {shown_names(names)}")
        found = names[0]
        if suffix_of(path) in (".csv", ".tsv"):  # the apparent header is a key
            listed = open_list(path, heading=False)
            found = "0"
    for number, row in enumerate(listed.rows(), 1):
        key = row.values.get(found)
        if row.error or isinstance(key, float | list | dict):
            raise ConfigError(f"{path}: row {number}: {row.error or f'{key!r} is not a key'}")
        if key is not None and (text := str(key).strip()):
            yield text


def _array_keys(path: Path) -> Iterator[str]:
    """Yield the keys in an array: texts, integers, or pairs of uint64 with the upper and lower half of a uid."""
    with list_errors(path):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ConfigError(f"{path}: not an array of keys: {error}") from None
    if array.dtype.names and len(array.dtype.names) == 2:
        high, low = (array[name] for name in array.dtype.names)
    elif array.ndim == 2 and array.shape[1] == 2 and array.dtype == np.uint64:
        high, low = array[:, 0], array[:, 1]
    elif array.ndim == 1 and array.dtype.kind in "iuUS":
        yield from (key.decode() if isinstance(key, bytes) else str(key) for key in array)
        return
    else:
        raise ConfigError(f"{path}: an array {array.shape} of {array.dtype} is not a list of keys")
    for upper, lower in zip(high, low, strict=True):
        yield f"{int(upper):016x}{int(lower):016x}"


def key_digest(path: str) -> str:
    """XXH3-128 of a file; empty if ``path`` is empty. Raises ConfigError if the file cannot be read."""
    whole = xxhash.xxh3_128()
    try:
        if path:
            with Path(path).open("rb") as file:
                while block := file.read(_BLOCK):
                    whole.update(block)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return f"xxh3:{whole.hexdigest()}" if path else ""
