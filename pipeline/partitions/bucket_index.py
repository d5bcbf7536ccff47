"""Which samples of a finished dataset of latents are in which bucket: ``buckets.parquet``.

Samples lie bucket by bucket in each partition, so that a few rows of the index say it for a partition of any size: a
loader plans epochs of all samples without opening a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.imaging.buckets import Size

NAME = "buckets.parquet"
_ROWS = 1 << 16
"""Rows that are written at once."""


def write(file: Any, columns: Iterable[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Write the index of partitions with these ``records``, in the order of their samples.

    A row is a run of samples of the same buckets: ``partition``, ``count``, and for each of the ``columns`` of latents,
    ``latents_R``, its bucket in pixels, ``height_R`` and ``width_R``.
    """
    edges = [f"{edge}_{column.rpartition('_')[2]}" for column in columns for edge in ("height", "width")]
    fields = [("partition", pa.int64()), ("count", pa.int64()), *((edge, pa.int32()) for edge in edges)]
    schema = pa.schema(fields)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        rows: list[list[int]] = []
        for record in records:
            for sizes, count in record["buckets"]:
                rows.append([record["partition"], count, *(edge for size in sizes for edge in size)])
            if len(rows) >= _ROWS:
                writer.write_table(_table(rows, schema))
                rows = []
        writer.write_table(_table(rows, schema))


def _table(rows: list[list[int]], schema: pa.Schema) -> pa.Table:
    values = np.array(rows, np.int64).reshape(-1, len(schema))
    return pa.table([pa.array(values[:, n], f.type) for n, f in enumerate(schema)], schema=schema)


@dataclass(frozen=True)
class BucketIndex:
    """The buckets of one column of latents.

    Attributes:
        sizes: of the buckets that hold samples, height and width in pixels, in ascending order.
        starts: first sample of each run of samples of one bucket, and the number of all at the end: int64 (runs + 1,).
        owners: which of ``sizes`` each run is of: int32 (runs,).
    """

    sizes: tuple[Size, ...]
    starts: npt.NDArray[Any]
    owners: npt.NDArray[Any]

    @classmethod
    def parse(cls, data: bytes, column: str) -> BucketIndex:
        """Of the bytes of ``buckets.parquet``.

        Raises:
            ValueError: the file has no such column.
        """
        resolution = column.rpartition("_")[2]
        names = ["count", f"height_{resolution}", f"width_{resolution}"]
        file = pq.ParquetFile(BytesIO(data))
        if missing := set(names) - set(file.schema_arrow.names):
            raise ValueError(f"{NAME} has no column {sorted(missing)[0]}")
        table = file.read(names, use_threads=False)
        counts, heights, widths = (table[name].to_numpy() for name in names)
        pairs, owners = np.unique(np.stack([heights, widths], 1), axis=0, return_inverse=True)
        owners = owners.reshape(-1)
        first = np.flatnonzero(np.diff(owners, prepend=-1))  # neighbours of one bucket become one run
        counts = np.add.reduceat(counts, first) if len(first) else counts
        sizes = tuple((int(height), int(width)) for height, width in pairs.tolist())
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(sizes, starts, owners[first].astype(np.int32))

    @classmethod
    def of_one(cls, size: Size, samples: int) -> BucketIndex:
        """That of samples which all have the same size."""
        return cls((size,), np.array([0, samples], np.int64), np.zeros(1, np.int32))

    def __len__(self) -> int:
        """Samples."""
        return int(self.starts[-1])

    def counts(self) -> npt.NDArray[Any]:
        """Samples in each bucket: int64 (sizes,)."""
        return np.bincount(self.owners, np.diff(self.starts), len(self.sizes)).astype(np.int64)

    def size_at(self, sample: int) -> Size:
        """The bucket of a sample, by its position."""
        return self.sizes[self.owners[np.searchsorted(self.starts, sample, "right") - 1]]
