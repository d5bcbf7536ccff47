"""Assigns images to splits according to a file, such as Karpathy's ``dataset_flickr30k.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config.schema import ConfigError
from pipeline.samples import make_key
from pipeline.samples.captions import shown_counts, shown_names
from pipeline.sources.lists import NAME_COLUMNS, open_list

_MEANS = {"restval": "train", "val": "valid", "dev": "valid", "validation": "valid"}


class Splits:
    """Splits of images by file name or by the last components of the path, independent of the folder or archive.

    The file is JSON, ``{"images": [{"filename": …, "split": …}, …]}`` as published by Karpathy and Fei-Fei (CVPR 2015),
    or another list with a column of names (filename, file_name, image, …) and a column ``split``. ``restval`` counts as
    train; val, dev and validation as valid.

    Raises:
        ConfigError: the file is missing or has another layout, or a name has two different splits.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._of: dict[str, str] = {}
        try:
            for name, split in self._read():
                known = self._of.setdefault(make_key(name), split)
                if known != split:
                    raise ConfigError(f"split_file={path}: {name} is in {known} and in {split}")
        except ConfigError as error:
            raise ConfigError(f"split_file={str(error).removeprefix('split_file=')}") from None

    def _read(self) -> Iterator[tuple[str, str]]:
        for number, row in enumerate(open_list(self.path, "a file of splits").rows(), 1):
            lower = {str(name).lower(): value for name, value in row.values.items()}
            name = next((lower[column] for column in NAME_COLUMNS if isinstance(lower.get(column), str)), None)
            split = lower.get("split")
            if row.error or not name or not isinstance(split, str):
                raise ConfigError(
                    f"{self.path}: {f'line {row.line}' if row.line else f'row {number}'}: "
                    f"{row.error or f'it has {shown_names(row.values)}'}: expected JSON with images, each with "
                    "filename and split, or a list with these columns"
                )
            yield name, self.name(split.strip())

    @staticmethod
    def name(split: str) -> str:
        """Normalized name of a split."""
        return _MEANS.get(split, split)

    def of(self, name: str) -> str:
        """The split of a file, or of the sample with this key; "" if it is not listed."""
        parts = name.split("/")
        ends = ("/".join(parts[first:]) for first in range(len(parts)))
        return next((self._of[key] for end in ends for key in (end, make_key(end)) if key in self._of), "")

    def chosen(self, keys: Sequence[str], split: str) -> list[int]:
        """Indices of the ``keys`` that are in ``split``.

        Raises:
            ConfigError: there are none.
        """
        found = [place for place, key in enumerate(keys) if self.of(key) == split]
        if not found:
            raise ConfigError(
                f"split_file={self.path}: assigns none of these {len(keys)} images to {split}; all that it names are "
                f"in {shown_counts(Counter(self._of.values()))}"
            )
        return found
