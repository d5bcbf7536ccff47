"""Finds the columns of image tables among named arrays, from common naming patterns.

``x_train`` belongs to ``y_train``, ``images.00000`` to ``labels.00000``, ``test/images`` to ``test/captions``: these
names differ in one part only, and that part is the name of the column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.config.schema import ConfigError, SourceConfig
from pipeline.samples import SampleError
from pipeline.samples.captions import shown_names
from pipeline.sources.parquet_rows import IMAGE_COLUMNS, LABEL_COLUMNS, Roles, roles_of

IMAGES = (*IMAGE_COLUMNS, "imgs", "x", "pixels", "data")
LABELS = (*LABEL_COLUMNS, "labels", "classes", "y", "target", "targets")
_SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), "valid"
)


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables made of arrays: ``columns`` maps each array of images to its table's columns and their arrays."""

    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    image: dict[str, str] = field(default_factory=dict)
    """Column name of each array of images."""
    other_split: list[str] = field(default_factory=list)
    """Arrays of images of another split."""
    unused: list[str] = field(default_factory=list)
    """Arrays that belong to no table."""

    def roles(self, name: str, config: SourceConfig) -> tuple[Roles, dict[str, str]]:
        """Return the roles of the columns in the table of the image array ``name``, and the array of each column.

        Raises:
            SampleError: ``no_column``.
        """
        columns = self.columns[name]
        return roles_of(config, list(columns), image=self.image[name], labels=LABELS), columns


def tables(names: Sequence[str], config: SourceConfig, *, alone: bool = False) -> Tables:
    """Find the tables among the arrays ``names``; if their names contain splits, only those of ``split=``.

    Args:
        alone: if no name marks an array of images, treat each array as a table of images.

    Raises:
        ConfigError: there are other splits but not this one.
    """
    parts = {name: re.split(r"[._\-/ ]+|(?<=[a-z])(?=\d)", name.lower()) for name in names}
    wanted = config.image_column.lower()
    words = (wanted,) if wanted else IMAGES

    def place(name: str) -> int:
        """Index of the part of ``name`` that marks an array of images; -1 if there is none."""
        return next((n for n, part in enumerate(parts[name]) if part in words), -1)

    exact = [name for name in names if wanted and name.lower() == wanted]
    images = exact or [name for name in names if place(name) >= 0]
    if not images and alone and not wanted:
        return Tables({name: {"images": name} for name in names}, dict.fromkeys(names, "images"))
    splits = {name: next((s for part in parts[name] if (s := _SPLITS.get(part))), "") for name in images}
    there = set(filter(None, splits.values()))
    split = _SPLITS.get(config.split.lower(), config.split)
    if there and not exact and split not in there and not all(there & {s} for s in splits.values()):
        there = set()  # some names contain no split: these arrays belong to the requested one
    if there and not exact and split not in there:
        raise ConfigError(f"split={config.split}: there are arrays of images of the splits {', '.join(sorted(there))}")
    found = Tables(other_split=[name for name in images if not exact and splits[name] not in ("", split)])
    used: set[str] = set()
    for name in images:
        at = place(name) if place(name) >= 0 else len(parts[name]) - 1
        own = parts[name][at]
        columns = {parts[other][at]: other for other in names if _siblings(parts[name], parts[other], at)}
        columns = {column: other for column, other in columns.items() if column not in words} | {own: name}
        used.update(columns.values())
        if name not in found.other_split:
            found.columns[name], found.image[name] = columns, own
    found.unused.extend(name for name in names if name not in used)
    return found


def _siblings(one: list[str], other: list[str], at: int) -> bool:
    """Whether two names differ in part ``at`` and nowhere else."""
    return len(one) == len(other) and [n for n, part in enumerate(one) if part != other[n]] == [at]


def the_table(names: Sequence[str], config: SourceConfig) -> tuple[Roles, dict[str, str]]:
    """Return the only table among the arrays of a file: its roles, and the array of each column.

    Raises:
        SampleError: ``no_column`` if there is none or more than one.
    """
    try:
        found = tables(names, config)
    except ConfigError as error:
        raise SampleError("no_column", str(error), retryable=True) from None
    if len(found.columns) != 1:
        which = "several arrays of images" if found.columns else "no array of images"
        shown = shown_names(found.columns or names)
        raise SampleError("no_column", f"image_column={config.image_column}: {which}; it has {shown}", retryable=True)
    (name,) = found.columns
    return found.roles(name, config)


def check_lengths(lengths: Iterable[tuple[str, int]], most: int) -> int:
    """Return the number of rows of a table whose arrays have these lengths.

    Raises:
        SampleError: ``uneven_arrays``, ``too_many_members``.
    """
    known = dict(lengths)
    if len(set(known.values())) > 1:
        said = ", ".join(f"{count} {name}" for name, count in known.items())
        raise SampleError("uneven_arrays", said[:300], retryable=True)
    count = next(iter(known.values()))
    if count > most:
        raise SampleError("too_many_members", f"{count} rows")
    return count
