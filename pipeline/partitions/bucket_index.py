"""``buckets.parquet``: the bucket of each sample of a finished dataset of latents.

The samples of a partition are ordered by bucket, so that a few rows of the index describe a partition of any size, and
a loader plans epochs over all samples without opening a shard.
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
"""Rows per write."""


def write(file: Any, columns: Iterable[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Write the index of the partitions with these ``records``, in the order of their samples.

    A row describes a run of samples with the same buckets: ``partition``, ``count``, and for each column ``latents_R``
    of ``columns`` its bucket in pixels as ``height_R`` and ``width_R``.
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
        sizes: height and width in pixels of the buckets that contain samples, in ascending order.
        starts: first sample of each run of samples of one bucket, then the number of samples: int64 (runs + 1,).
        owners: index into ``sizes`` of each run: int32 (runs,).
    """

    sizes: tuple[Size, ...]
    starts: npt.NDArray[Any]
    owners: npt.NDArray[Any]

    @classmethod
    def parse(cls, data: bytes, column: str) -> BucketIndex:
        """The index of one ``column`` of latents, from the bytes of ``buckets.parquet``.

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
        first = np.flatnonzero(np.diff(owners, prepend=-1))  # adjacent rows of one bucket become one run
        counts = np.add.reduceat(counts, first) if len(first) else counts
        sizes = tuple((int(height), int(width)) for height, width in pairs.tolist())
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(sizes, starts, owners[first].astype(np.int32))

    @classmethod
    def of_one(cls, size: Size, samples: int) -> BucketIndex:
        """The index of samples that all have the same size."""
        return cls((size,), np.array([0, samples], np.int64), np.zeros(1, np.int32))

    def __len__(self) -> int:
        """The number of samples."""
        return int(self.starts[-1])

    def counts(self) -> npt.NDArray[Any]:
        """Number of samples in each bucket: int64 (sizes,)."""
        return np.bincount(self.owners, np.diff(self.starts), len(self.sizes)).astype(np.int64)

    def size_at(self, sample: int) -> Size:
        """The bucket of the sample at this position."""
        return self.sizes[self.owners[np.searchsorted(self.starts, sample, "right") - 1]]
