"""The order in which the images of a partition are encoded and stored: bucket by bucket.

So batches are full and of one shape, and a few numbers say which samples of a partition are in which bucket.
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
"""What workers run."""
Sizes = tuple[Size, ...]
"""The bucket of a sample at each resolution; empty where it has none, or its size is not known."""


def by_bucket(
    samples: Iterable[Stored],
    buckets: Sequence[Buckets],
    headers: Pool | None,
) -> list[tuple[Stored, Sizes, Size | None]]:
    """``samples`` in the order of their buckets, and of their places within a bucket; with the buckets and the size of
    the image, which is None where it is not known. Those without a bucket come first.

    Args:
        headers: :func:`header_pool`, if the samples have no columns ``width`` and ``height``.
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
    """Processes that read the headers of images."""
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
