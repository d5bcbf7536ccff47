"""Lists as people have them: separators, quotation marks, marks of encodings, packed files; no row is swallowed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ConfigError
from pipeline.sources import text_files
from pipeline.sources.lists import open_list


def listed(folder: Path, name: str, data: bytes) -> list[list[Any]]:
    """The values of the rows, which must be the same when they are read row by row."""
    (folder / name).write_bytes(data)
    rows = list(open_list(folder / name).rows())
    one_by_one = [row for span in open_list(folder / name).spans(1) for row in open_list(folder / name).rows(span)]
    assert [(row.values, row.error) for row in one_by_one] == [(row.values, row.error) for row in rows]
    return [[*row.values.values(), *([row.error] if row.error else [])] for row in rows]


TABLES: dict[str, tuple[str, list[list[str]]]] = {
    "quotes": ('url,caption\nu,"a, ""b""\nc"\n', [["u", 'a, "b"\nc']]),
    "an open quote": ('url,caption\nu,"cut\nv,"two"\nw,three\n', [["u", '"cut'], ["v", "two"], ["w", "three"]]),
    "an open quote at the end": ('url,caption\nu,one\nv,"cut', [["u", "one"], ["v", '"cut']]),
    "two open quotes": ('url,caption\nu,"a\nv,"b\nw,c\n', [["u", '"a'], ["v", '"b'], ["w", "c"]]),
    "a quote within": ('url,caption\nu,12" pipe\nv,two\n', [["u", '12" pipe'], ["v", "two"]]),
    "text after a quote": ('url,caption\nu,"a" b\nv,two\n', [["u", "a b"], ["v", "two"]]),
    "commas without quotes": ("url,caption\nu,one, two, three\n", [["u", "one, two, three"]]),
    "too many fields": ("url,caption,w\nu,one, two,3\n", [["u", "one", " two", "4 fields in place of 3"]]),
    "too few fields": ("url,caption,w\nu\n", [["u"]]),
    "semicolons": ("url;caption\nu;one, two\n", [["u", "one, two"]]),
    "tabs": ('url\tcaption\nu\t"one", two\n', [["u", '"one", two']]),
    "bars": ("url|caption\nu|one\n", [["u", "one"]]),
    "no heading": ("http://h/1,one\nhttp://h/2,two\n", [["http://h/1", "one"], ["http://h/2", "two"]]),
    "no heading, semicolons": ("http://h/1;one\nhttp://h/2;two\n", [["http://h/1", "one"], ["http://h/2", "two"]]),
    "no heading, no first URL": (",one\nhttp://h/2,two\n", [["", "one"], ["http://h/2", "two"]]),
    "names of images": ("a.jpg,one\nb.jpg,two, three\n", [["a.jpg", "one"], ["b.jpg", "two, three"]]),
    "blank lines": ("url,caption\n\nu,one\n   \n", [["u", "one"]]),
    "NULs": ("url,caption\nu,o\0ne\n", [["u", "one"]]),
    "a long text": (f'url,caption\nu,"{"x" * 200_000}"\n', [["u", "x" * 200_000]]),
    "an index": (",url,caption\n0,http://h/1,one\n", [["0", "http://h/1", "one"]]),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_gives_all_of_its_rows(tmp_path: Path, case: str) -> None:
    text, expected = TABLES[case]
    assert listed(tmp_path, "l.csv", text.encode()) == expected
    assert listed(tmp_path, "dos.csv", text.replace("\n", "\r\n").encode()) == [
        [value.replace("\n", "\n") for value in row] for row in expected
    ]


ENCODINGS = {
    "utf-8-sig": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-be": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "gz": lambda text: gzip.compress(text.encode()),
    "bz2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode()),
    "mac": lambda text: text.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_list_is_read_in_any_encoding_that_says_so(tmp_path: Path, encoding: str) -> None:
    packed = f".{encoding}" if encoding in ("gz", "bz2", "xz") else ""
    data = ENCODINGS[encoding]("url,caption\nhttp://h/1,é\nhttp://h/2,two\n")
    assert listed(tmp_path, f"l.CSV{packed}", data) == [["http://h/1", "é"], ["http://h/2", "two"]]
    data = ENCODINGS[encoding]('{"url": "http://h/1"}\n{"url": "cut\n"x"\n')
    assert listed(tmp_path, f"l.jsonl{packed}", data) == [["http://h/1"], ["no JSON"], ["x"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["u", {"url": "v"}, 3]', [["u"], ["v"], ["no JSON object"]]),
        ('{"a.jpg": "one", "b.jpg": ["two"]}', [["a.jpg", "one"], ["b.jpg", ["two"]]]),
        ('{"version": 1, "data": [{"url": "u"}]}', [["u"]]),
        ('{"url": "u"}\n{"url": "v"}\n', [["u"], ["v"]]),
        ('\ufeff["u"]', [["u"]]),
    ],
)
def test_json_of_every_shape_gives_rows(tmp_path: Path, text: str, expected: list[Any]) -> None:
    assert listed(tmp_path, "l.json", text.encode()) == expected


def test_rows_of_parquet_that_python_cannot_hold_are_repaired_or_say_so(tmp_path: Path) -> None:
    table = pa.table({"text": _invalid(), "at": pa.array([0, 10**15, 0], pa.timestamp("ms"))})
    pq.write_table(table, tmp_path / "l.parquet")
    rows = list(open_list(tmp_path / "l.parquet").rows())
    assert [row.values["text"] for row in rows] == ["caf\ufffd", "two", "three"]
    assert [row.error for row in rows] == ["", "column at: OverflowError", ""]


def _invalid() -> pa.Array:
    binary = pa.array([b"caf\xe9", b"two", b"three"], pa.binary())
    return pa.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.xml", b"<a/>", "l.xml: a list is one of .txt, .csv"),
        ("l.json", b"{", "l.json: no JSON: "),
        ("l.json", b"3", "l.json: expected a list"),
        ("l.json", b"[" * 100_000, "l.json: no JSON: nested too deeply"),
        ("l.parquet", b"PAR1xx", "l.parquet: cannot be read"),
        ("l.parquet", b"x", "l.parquet: .*no parquet file"),
        ("l.csv.gz", gzip.compress(b"url\n" * 1000, mtime=0)[:-20], "l.csv.gz: (truncated|damaged)_archive"),
        ("l.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "l.csv: lfs_pointer: .*git lfs pull"),
        ("l.parquet", b"version https://git-lfs.github.com/spec/v1\n", "l.parquet: lfs_pointer"),
    ],
)
def test_a_file_that_is_no_list_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        list(open_list(tmp_path / name).rows())


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LONGEST", 100)
    (tmp_path / "l.jsonl").write_bytes(json.dumps("x" * 200).encode())
    with pytest.raises(ConfigError, match="l.jsonl: line_too_long: line 1"):
        list(open_list(tmp_path / "l.jsonl").rows())


def test_columns_of_one_name_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("url,text,text\nu,a,b\n")
    (row,) = open_list(tmp_path / "l.csv").rows()
    assert row.values == {"url": "u", "text": "a", "text.2": "b"} and row.line == 2
