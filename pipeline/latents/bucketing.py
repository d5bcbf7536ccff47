"""Orders the images of a partition by bucket, for encoding and storage.

Thus batches are full and of one shape, and a few numbers record which samples of a partition are in which bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.imaging.buckets import Buckets, Size
from pipeline.imaging.headers import ImageError
from pipeline.imaging.worker_pool import Lost, Pool, WorkerLimits
from pipeline.imaging.worker_protocol import SMALL, read_size
from pipeline.partitions.dataset import Stored
from pipeline.samples import SampleError

HEADER = "pipeline.imaging.worker_protocol:header_size"
"""Function that the workers run."""
Sizes = tuple[Size, ...]
"""A sample's bucket at each resolution; empty if it has none or its size is unknown."""


def by_bucket(
    samples: Iterable[Stored],
    buckets: Sequence[Buckets],
    headers: Pool | None,
) -> list[tuple[Stored, Sizes, Size | None]]:
    """Sort ``samples`` by bucket, keeping their order within a bucket; samples without a bucket come first.

    Args:
        headers: :func:`header_pool`, if the samples have no columns ``width`` and ``height``.

    Returns:
        (sample, buckets, image size) triples; the size is None if unknown.
    """
    found = _stored_sizes(samples) if headers is None else _sizes_in_headers(samples, headers)
    placed = [(stored, _buckets_of(size, buckets), size) for stored, size in found]
    return sorted(placed, key=lambda entry: entry[1])


def _buckets_of(size: Size | None, buckets: Sequence[Buckets]) -> Sizes:
    sizes = [each.size_of(*size) for each in buckets] if size else []
    return () if None in sizes else tuple(size for size in sizes if size)


def _stored_sizes(samples: Iterable[Stored]) -> Iterator[tuple[Stored, Size | None]]:
    for stored in samples:
        try:
            row = stored.read(("width", "height"))
        except SampleError:
            yield stored, None
            continue
        yield stored, (int(row["height"]), int(row["width"]))


def header_pool(workers: int, limits: WorkerLimits) -> Pool:
    """Worker processes that read image headers."""
    return Pool(HEADER, workers=workers, timeout=limits.timeout, memory=limits.memory, read=read_size, largest=SMALL)


def _sizes_in_headers(samples: Iterable[Stored], headers: Pool) -> Iterator[tuple[Stored, Size | None]]:
    for stored, found in headers.map((stored, _image(stored)) for stored in samples):
        yield stored, None if found is None or isinstance(found, Lost | ImageError) else _size(found)


def _size(found: Any) -> Size:
    height, width = found
    return int(height), int(width)


def _image(stored: Stored) -> bytes | None:
    try:
        return bytes(stored.read(("jpg",))["jpg"])
    except SampleError:
        return None
