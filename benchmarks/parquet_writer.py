"""The whole stage=shard with our Parquet writer, and with pyarrow's in its place.

    python benchmarks/parquet_writer.py [samples=2000] [kilobytes=133] [rounds=5] [folder=<where to work>]

Both write the same JPEG files from the page cache, with the same row groups and pages, image bytes uncompressed and the
other columns in zstd, and hash and sync their output. The two take turns, and a ratio is the median of the ratios of
single rounds. pyarrow's writer does not report where each image is in the file, which our readers need; the cost of
finding out is not included. ``disk`` is the limit: the same bytes hashed, written to one file and synced.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from formats import prepare

from pipeline.config.cli import build
from pipeline.config.schema import ShardConfig
from pipeline.distributed import Rank
from pipeline.formats.base import Create, Location, Writer
from pipeline.formats.columns import WIDE, arrow_schema, stored
from pipeline.formats.parquet import Parquet, ParquetWriter
from pipeline.partitions import engine
from pipeline.registry import formats as registry
from pipeline.samples import Schema
from pipeline.stages.shard import Shard

_PAGE = 1 << 20  # bytes, as in our writer


class ArrowWriter(ParquetWriter):
    """The row groups of our writer, written by pyarrow."""

    _arrow: pq.ParquetWriter | None = None

    def _flush(self) -> None:
        if self._arrow is None:
            self._file = self._create(f"samples.{self._files:05d}.parquet")
            self._files += 1
            compression = {name: "none" if self._schema[name] in WIDE else "zstd" for name in self._names}
            self._arrow = pq.ParquetWriter(
                pa.PythonFile(self._file, mode="w"),
                arrow_schema(self._schema, self._names),
                compression=compression,
                use_dictionary=False,
                write_statistics=False,
                data_page_size=_PAGE,
            )
        schema = arrow_schema(self._schema, self._names)
        columns = [
            pa.array([stored(self._schema[name], row[name]) for row in self._rows], schema.field(name).type)
            for name in self._names
        ]
        self._arrow.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(self._rows))
        assert self._file is not None
        self._locations += [(self._file.name, 0, len(row[self._names[-1]])) for row in self._rows]
        self._written += self._size
        self._rows, self._size = [], 0

    def _finish(self) -> None:
        if self._rows:
            self._flush()
        if self._arrow is not None and self._file is not None:
            self._arrow.close()
            self._file.close()
            self._arrow = self._file = None
        self._written = 0

    def close(self) -> list[Location]:
        self._finish()
        return self._locations


class ArrowParquet(Parquet):
    name = "parquet_arrow"

    def writer(self, create: Create, partition: int, schema: Schema, shard_bytes: int, compression: str = "") -> Writer:
        return ArrowWriter(create, schema, shard_bytes)


def shard(source: Path, output: Path, format: str) -> float:
    """Seconds that the stage takes."""
    shutil.rmtree(output, ignore_errors=True)
    settings: dict[str, Any] = {"input": str(source), "output": str(output), "format": format}
    stage = Shard(build(ShardConfig, settings), Rank())
    begin = perf_counter()
    engine.run(stage)
    return perf_counter() - begin


def bare(source: Path, output: Path) -> float:
    """Seconds to read the files, hash the bytes, write them to one file and sync it."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    begin = perf_counter()
    digest = xxhash.xxh3_128()
    with (output / "all").open("wb") as file:
        for path in sorted(source.glob("*/*.jpg")):
            data = path.read_bytes()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return perf_counter() - begin


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    samples, kilobytes = int(given.get("samples", 2000)), int(given.get("kilobytes", 133))
    registry.add(ArrowParquet.name, ArrowParquet())
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as work:
        source, output = Path(work) / "photos", Path(work) / "out"
        prepare(source, samples, kilobytes)
        times: dict[str, list[float]] = {"parquet": [], "parquet_arrow": [], "disk": []}
        for number in range(int(given.get("rounds", 5)) + 1):
            seconds = {name: shard(source, output, name) for name in ("parquet", "parquet_arrow")}
            seconds["disk"] = bare(source, output)
            for name, value in seconds.items():
                times[name] += [value] if number else []  # the first round fills the page cache
    for name, values in times.items():
        print(f"{name:<14} {median(values):.2f} s, {samples / median(values):.0f} images/s")
    for name in ("parquet_arrow", "disk"):
        ratio = median(other / ours for other, ours in zip(times[name], times["parquet"], strict=True))
        print(f"stage=shard with {name} takes {ratio:.2f} times as long as with our writer")


if __name__ == "__main__":
    main(sys.argv[1:])
