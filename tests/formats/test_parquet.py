"""Parquet files that we write ourselves, as Arrow reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.formats import parquet, thrift
from pipeline.samples import Row
from pipeline.storage import Folder

SCHEMA = {"key": "str", "jpg": "jpeg", "label": "int", "meta": "json", "mask": "bytes"}


def rows(count: int) -> list[Row]:
    return [
        {
            "key": f"{number} ä€" if number % 7 else None,
            "jpg": number.to_bytes(3, "big") * (number % 50),
            "label": -(5**20) * number if number % 3 else None,
            "meta": {"n": [number]},
            "mask": b"m" * number if number % 2 else None,
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 20, 3000])
def test_arrow_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(parquet, "_PAGE_BYTES", 4000)
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 70)
    given = rows(count)
    with Folder.open(tmp_path) as folder:
        writer = parquet.ParquetWriter(folder.create, SCHEMA, shard_bytes=1_000_000)
        for row in given:
            writer.write(row)
        places = writer.close()
    names = sorted({name for name, _, _ in places})
    assert names == sorted(path.name for path in tmp_path.iterdir()) and (len(names) > 1) == (count > 1000)
    table = pa.concat_tables([pq.read_table(tmp_path / name) for name in names])
    expected = [{**row, "meta": json.dumps(row["meta"])} for row in given]
    assert table.select(list(SCHEMA)).to_pylist() == expected
    assert table.schema.field("jpg").type == pa.large_binary() and table.schema.field("label").type == pa.int64()
    for (name, at, length), row in zip(places, given, strict=True):
        assert (tmp_path / name).read_bytes()[at : at + length] == row["jpg"]


def test_a_value_beyond_what_a_page_can_say_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit into Parquet"):
        parquet._header(1, 2**31, 2**31)


def test_numbers_are_packed_as_thrift_says() -> None:
    # the examples of the protocol's specification, and of fields more than 15 apart
    assert thrift.varint(50399) == bytes([0xDF, 0x89, 0x03])
    assert thrift.packed({1: thrift.I32(-1), 20: thrift.I64(1), 21: [thrift.I32(0)] * 15, 22: {1: "ä"}}) == bytes(
        [0x15, 0x01, 0x06, 0x28, 0x02, 0x19, 0xF5, 0x0F, *[0] * 15, 0x1C, 0x18, 0x02, *"ä".encode(), 0, 0]
    )
