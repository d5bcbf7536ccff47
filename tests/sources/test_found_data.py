"""What holds for every source, whatever the data are like: nothing vanishes, nothing is invented, changes are named."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import struct
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import fake_stage
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sources.found import LAYOUTS, download, download_by_retry, jsonl, kept, photo, write
from sources.packing import tar_of, zip_of
from sources.server import Server
from sources.test_datasets import CASES, NAMES, OWN
from sources.test_datasets import run as run_stage
from stages.conftest import run_stage as run_with

from pipeline.config.options import condition_of, holds
from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.curation.splits import Splits
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.finalize import Unbalanced
from pipeline.partitions.planning import Stale
from pipeline.sources import torchvision
from pipeline.sources.torch_dataset import import_dataset
from pipeline.stages import report
from pipeline.stages.download import Download
from pipeline.stages.takedown import takedown

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
BY_TEXT = (
    *("image_folder with texts", "image_folder with captions.csv", "url_list csv", "url_list parquet"),
    *("parquet", "ipc file", "ipc stream", "hdf5", "npy", "npz"),
)
"""Layouts whose captions have no type but text."""


# ---- nothing is invented, texts are clean


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_are_repaired_where_samples_are_made(memory: Path, layout: str) -> None:
    settings = LAYOUTS[layout](memory, [(photo(0), "cut \ud83d"), (photo(1), "whole \U0001f600")])
    assert download(memory, settings)["counts"]["kept"] == 2
    first, second = [row["caption"] for row in kept(memory)]
    assert first.startswith("cut \ufffd") and second == "whole \U0001f600"
    fake_stage.assert_sound(memory / "download")
    for format in ("mds", "tar", "parquet", "ipc"):
        run_with("shard", input=str(memory / "download"), output=str(memory / format), format=format)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_null_is_no_caption(memory: Path, layout: str) -> None:
    settings = LAYOUTS[layout](memory, [(photo(0), None), (photo(1), "two")])
    assert download(memory, settings)["counts"]["kept"] == 2
    assert [row["captions"] for row in kept(memory)] == [[], ["two"]]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in BY_TEXT])
@pytest.mark.parametrize(
    ("value", "expected"), [(3, []), ({"caption": "x"}, ["x"]), (float("nan"), []), (["a", None, "b"], ["a", "b"])]
)
def test_only_texts_are_captions(memory: Path, layout: str, value: Any, expected: list[str]) -> None:
    download(memory, LAYOUTS[layout](memory, [(photo(0), value), (photo(1), "two")]))
    assert [row["captions"] for row in kept(memory)] == [expected, ["two"]]


# ---- one bad row never ends a stage


def bad_parquet(folder: Path) -> dict[str, Any]:
    labels = pa.array(["1", "cat", None])
    table = pa.table({"image": [photo(0), photo(1), photo(2)], "caption": ["a", "b", "c"], "label": labels})
    pq.write_table(table, folder / "0.parquet")
    return {"source": "parquet", "input": str(folder / "0.parquet"), "labels": True}


def test_labels_that_are_none_fail_their_rows(memory: Path) -> None:
    success = download(memory, bad_parquet(memory))
    assert success["reasons"] == {"failed:bad_label": 1, "failed:no_label": 1}
    (row,) = [row for row in fake_stage.rows(memory / "download") if row["reason"] == "bad_label"]
    assert row["detail"] == "'cat' is not a class index"


def test_labels_beside_images_of_archives_fail_their_samples(memory: Path) -> None:
    files = {"a.jpg": photo(0), "a.cls": b"cat", "b.jpg": photo(1), "b.cls": b"3\n", "c.jpg": photo(2)}
    write(memory / "a.tar", tar_of(files))
    success = download(memory, {"source": "webdataset", "input": str(memory / "a.tar"), "labels": True})
    assert success["reasons"] == {"failed:bad_label": 1, "failed:no_label": 1}


def test_fields_that_json_cannot_hold_fail_their_rows(memory: Path) -> None:
    struct = pa.array([{"a": b"text"}, {"a": b"\xff\xfe"}, None], pa.struct([("a", pa.binary())]))
    at = pa.array([0, 1, 2], pa.timestamp("s"))
    pq.write_table(pa.table({"image": [photo(n) for n in range(3)], "more": struct, "at": at}), memory / "0.parquet")
    settings = {"source": "parquet", "input": str(memory / "0.parquet"), "columns": ("more", "at")}
    assert download(memory, settings)["reasons"] == {"failed:bad_field": 1}
    assert [row["meta"] for row in kept(memory)] == [
        {"more": {"a": "text"}, "at": "1970-01-01T00:00:00"},
        {"more": None, "at": "1970-01-01T00:00:02"},
    ]


def test_a_column_of_nulls_gives_way_to_one_with_texts(memory: Path) -> None:
    nulls = pa.array([None, None], pa.string())
    pq.write_table(
        pa.table({"image": [photo(0), photo(1)], "captions": nulls, "caption": ["a", "b"]}), memory / "0.parquet"
    )
    download(memory, {"source": "parquet", "input": str(memory / "0.parquet")})
    assert [row["caption"] for row in kept(memory)] == ["a", "b"]


def test_rows_of_lists_that_make_no_sense_are_rows_of_the_ledger(memory: Path) -> None:
    for number in range(3):
        write(memory / f"m/{number}.jpg", photo(number))
    rows = [
        "https://h.example/0.jpg,one,1",
        ",two,2",
        "https://h.example/1.jpg,three, four,3",
        "https://h.example/2.jpg",
    ]
    write(memory / "l.csv", "url,caption,n\n" + "\n".join(rows))
    success = download(memory, {"source": "url_list", "input": str(memory / "l.csv"), "mirror": str(memory / "m")})
    assert success["counts"] | {"in": 4, "kept": 2, "failed": 2} == success["counts"]
    assert success["reasons"] == {"failed:bad_url": 1, "failed:bad_row": 1}


@pytest.mark.parametrize("kind", ["url_list", "image_folder"])
@pytest.mark.parametrize("first", [True, False])
def test_a_quote_that_is_never_closed_swallows_no_rows(memory: Path, kind: str, first: bool) -> None:
    for number in range(3):
        write(memory / f"i/{number}.jpg", photo(number))
    texts = ['"one', "two", '"three"'] if first else ["one", '"two', "three"]
    url = "https://h.example/" if kind == "url_list" else ""
    rows = "".join(f"{url}{number}.jpg,{text}\n" for number, text in enumerate(texts))
    if kind == "url_list":
        path = write(memory / "l.csv", f"url,caption\n{rows}")
        settings = {"source": kind, "input": str(path), "mirror": str(memory / "i")}
    else:
        write(memory / "i/captions.csv", f"image,caption\n{rows}")
        settings = {"source": kind, "input": str(memory / "i")}
    success = download(memory, settings)
    assert success["counts"]["in"] == success["counts"]["kept"] == 3
    assert [row["caption"].strip('"') for row in kept(memory)] == ["one", "two", "three"]


@pytest.mark.parametrize("layout", ["jdb", "flickr30k"])
def test_a_cut_line_of_annotations_is_left_out_and_counted(memory: Path, layout: str) -> None:
    settings = LAYOUTS[layout](memory, [(photo(number), f"c{number}") for number in range(3)])
    (path,) = map(Path, settings["metadata"])
    lines = path.read_text().splitlines()
    lines[-2] = lines[-2][:-9]
    path.write_text("\n".join([lines[0], "", *lines[1:]]))
    download(memory, settings)
    assert [row["captions"] for row in kept(memory)] == [["c0"], [], ["c2"]]
    assert json.loads((memory / "download/manifest.json").read_text())["metadata_left_out"] == {"bad_row": 1}


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("coco", "[]"),
        ("coco", '{"images": []}'),
        ("textcaps", '{"data": 3}'),
        ("jdb", "no\njson\n"),
        ("flickr30k", "a,b\n1,2\n"),
        ("coco", "[" * 100_000),
        ("coco", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    ],
)
def test_a_file_of_annotations_that_is_none_is_named_before_the_work(memory: Path, layout: str, text: str) -> None:
    settings = LAYOUTS[layout](memory, [(photo(0), "one")])
    Path(settings["metadata"][0]).write_text(text)
    with pytest.raises(ConfigError, match=r"metadata: .*m\.(json|jsonl|csv)"):
        download(memory, settings)


# ---- a failure says why itself


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failure_says_its_commonest_reasons_with_an_example(memory: Path, layout: str) -> None:
    settings = LAYOUTS[layout](memory, [(photo(0), "one")])
    settings["max_member_bytes"] = 10
    with pytest.raises(
        Unbalanced, match=r"1 of 1 samples failed.*: too_many_bytes: \d+ bytes, 1 time \(for example .+\)\. If"
    ):
        download(memory, settings, max_failed_fraction=0.5)


def test_an_archive_that_failed_says_why(memory: Path) -> None:
    write(memory / "i/a.tar", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    write(memory / "i/b.tar", b"")
    with pytest.raises(
        Unbalanced, match=r"lfs_pointer: .*git lfs pull`, 1 time \(for example a.tar\); empty: .*\(for example b.tar\)"
    ):
        download(memory, {"source": "webdataset", "input": str(memory / "i")}, max_failed_fraction=0.5)


# ---- changed inputs are noticed


@pytest.mark.parametrize("retried", [False, True], ids=["plain", "retried"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_was_changed_is_named(memory: Path, layout: str, retried: bool) -> None:
    settings = LAYOUTS[layout](memory, [(photo(0), "one"), (photo(1), "two")])
    before = download_by_retry(memory, settings) if retried else download(memory, settings)
    assert before["counts"]["kept"] == 2 and download(memory, settings) == before
    for path in sorted(path for path in memory.rglob("*") if path.is_file() and "download" not in path.parts):
        old, times = path.read_bytes(), path.stat()
        path.write_bytes(old + b"\n")
        name = path.name if path.suffix != ".txt" else path.with_suffix(".jpg").name
        with pytest.raises(Stale, match=rf"{name}\b.* was modified"):
            download(memory, settings, retry_failed=retried)
        path.write_bytes(old)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert download(memory, settings) == before


def test_changed_labels_of_a_published_set_are_named(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision, "SETS", {"mnist": replace(torchvision.SETS["mnist"], splits=_unhashed())})
    images, labels = np.zeros((2, 4, 4), np.uint8), np.array([3, 7], np.uint8)
    write(memory / "f/images-idx3-ubyte", struct.pack(">4I", 0x803, *images.shape) + images.tobytes())
    settings = {"source": "torchvision", "files": ("mnist",), "input": str(memory / "f")}
    with pytest.raises(ConfigError, match=r"input=.*: labels-idx1-ubyte.* is not below"):
        download(memory, settings)
    write(memory / "f/labels-idx1-ubyte", struct.pack(">2I", 0x801, 2) + labels.tobytes())
    before = download(memory, settings)
    assert [row["label"] for row in kept(memory)] == [3, 7] and download(memory, settings) == before
    write(memory / "f/labels-idx1-ubyte", struct.pack(">2I", 0x801, 2) + labels[::-1].tobytes())
    with pytest.raises(Stale, match="labels-idx1-ubyte.gz was modified"):
        download(memory, settings)


def _unhashed() -> dict[str, tuple[torchvision.Part, ...]]:
    return {"train": (torchvision.Part("images-idx3-ubyte.gz", "", ("labels-idx1-ubyte.gz", "")),)}


def test_a_file_of_captions_that_was_added_or_removed_is_named(memory: Path) -> None:
    settings = LAYOUTS["image_folder with captions.jsonl"](memory, [(photo(0), "one")])
    download(memory, settings)
    (memory / "i/captions.jsonl").unlink()
    with pytest.raises(Stale, match="captions.jsonl was removed since"):
        download(memory, settings)
    download(memory, settings, overwrite=True)
    write(memory / "i/captions.csv", "image,caption\n0.jpg,x\n")
    with pytest.raises(Stale, match="captions.csv was added since"):
        download(memory, settings)


def test_a_retry_takes_what_was_added_to_the_mirror_and_nothing_else(memory: Path) -> None:
    write(memory / "list.txt", "https://h.example/a.jpg\nhttps://h.example/b.jpg\n")
    write(memory / "m/a.jpg", photo(0))
    settings = {"source": "url_list", "input": str(memory / "list.txt"), "mirror": str(memory / "m")}
    assert download(memory, settings)["reasons"] == {"failed:not_in_mirror": 1}
    write(memory / "m/b.jpg", photo(1))
    before = download(memory, settings, retry_failed=True)
    assert before["counts"]["kept"] == 2 and download(memory, settings) == before
    write(memory / "m/a.jpg", photo(2))
    for retry in (True, False):
        with pytest.raises(Stale, match="the input has changed since it was planned"):
            download(memory, settings, retry_failed=retry)


def test_only_the_inputs_of_samples_that_were_taken_down_may_be_removed(memory: Path) -> None:
    settings = LAYOUTS["image_folder with texts"](memory, [(photo(number), str(number)) for number in range(3)])
    download(memory, settings)
    write(memory / "optouts.txt", "1-jpg\n")
    assert takedown(memory / "download", memory / "optouts.txt", Rank()).complete
    (memory / "i/1.jpg").unlink()
    (memory / "i/1.txt").unlink()
    assert download(memory, settings)["counts"]["kept"] == 2
    (memory / "i/2.jpg").unlink()
    with pytest.raises(Stale, match=r"was removed"):
        download(memory, settings)


def test_an_older_plan_is_compared_by_what_it_names(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LAYOUTS["image_folder with texts"](memory, [(photo(0), "one")])
    download(memory, settings)
    kept_header = dict(Dataset.open(memory / "download").header)
    write(memory / "i/._0.jpg", photo(1))
    older = {name: value for name, value in kept_header.items() if name not in ("watched", "left_out")}
    older |= {"inputs_digest": "of other rules"}
    monkeypatch.setattr(Dataset, "header", property(lambda self: older))
    download(memory, settings)
    write(memory / "i/0.jpg", photo(2))
    with pytest.raises(Stale, match="0.jpg"):
        download(memory, settings)


# ---- nothing vanishes


def left_out(folder: Path) -> dict[str, tuple[int, list[str]]]:
    said = json.loads((folder / "download/manifest.json").read_text())["left_out"]
    return {reason: (found["count"], found["examples"]) for reason, found in said.items()}


def test_what_looks_like_data_in_a_folder_but_is_not_used_is_counted(memory: Path) -> None:
    images = memory / "i"
    for name in ("cat/0.jpg", "cat/._0.jpg", "dog/1.jpg", "__MACOSX/cat/0.jpg", ".ipynb_checkpoints/0.jpg"):
        write(images / name, photo(0))
    for name in ("Thumbs.db", "cat/2.heic", "cat/3.PSD", "cat/9.txt", "cat/0.json", "list.xlsx"):
        write(images / name, "x")
    (images / ".hidden").mkdir()
    (images / "dog/round").symlink_to(images)
    (images / "dog/nowhere").symlink_to(memory / "nothing")
    write(images / "captions.json", json.dumps({"cat/0.jpg": "a cat", "cat/7.jpg": "gone", "8.jpg": "gone"}))
    write(images / "captions.csv", "image,caption\n")
    download(memory, {"source": "image_folder", "input": str(images), "copy": True})
    assert [(row["label"], row["caption"]) for row in kept(memory)] == [(0, "a cat"), (1, "dog")]
    assert left_out(memory) == {
        "clutter": (4, [".hidden", ".ipynb_checkpoints", "__MACOSX"]),
        "unread_image_format": (2, ["cat/2.heic", "cat/3.PSD"]),
        "text_without_image": (1, ["cat/9.txt"]),
        "link_in_a_circle": (1, ["dog/round"]),
        "link_to_nowhere": (1, ["dog/nowhere"]),
        "other_file": (3, ["captions.csv", "list.xlsx", "cat/0.json"]),
        "caption_row_without_image": (2, ["cat/7.jpg", "8.jpg"]),
    }
    shown = report.page(memory, 0)
    assert "unread_image_format" in shown and "cat/2.heic, cat/3.PSD" in shown


ARCHIVES: dict[str, dict[str, Any]] = {
    "webdataset": {"input": "{}/a.tar"},
    "http_archive": {"urls": ("https://h.example/a.tar",), "mirror": "{}"},
    "huggingface": {"repo": "o/n", "files": ("a.tar",), "mirror": "{}"},
}


@pytest.mark.parametrize("source", ARCHIVES)
@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_what_looks_like_data_in_an_archive_but_is_not_used_is_counted(memory: Path, pack: Any, source: str) -> None:
    files = {name: photo(0) for name in ("cat/0.jpg", "cat/._0.jpg", "__MACOSX/cat/0.jpg", ".x/1.jpg")}
    files |= {"cat/2.heic": b"x", "lost.txt": b"x", "cat/1.jpg": photo(1), "cat/1.json": b"{cut", "inner.zip": b"x"}
    write(memory / "a.tar", pack(files))
    settings = {k: v.format(memory) if isinstance(v, str) else v for k, v in ARCHIVES[source].items()}
    download(memory, {"source": source, **settings})
    assert [row["member"] for row in fake_stage.rows(memory / "download") if row["member"]] == [
        "cat/0.jpg",
        "cat/1.jpg",
    ]
    assert json.loads((memory / "download/manifest.json").read_text())["noted"] == {
        "clutter": 3,
        "unread_image_format": 1,
        "text_without_image": 1,
        "unreadable_json": 1,
        "other_member": 1,
    }


@pytest.mark.parametrize("layout", ["webdataset", "webdataset zip", "parquet", "ipc file", "mds", "hdf5", "npy"])
def test_files_that_a_source_does_not_read_are_counted(memory: Path, layout: str) -> None:
    settings = LAYOUTS[layout](memory, [(photo(0), "one")])
    for name in ("more.rar", "sub/part.tar.zst", "._a.tar", ".part.crc", "_SUCCESS"):
        write(memory / "i" / name, b"x")
    download(memory, settings)
    assert left_out(memory) == {"other_file": (2, ["more.rar", "sub/part.tar.zst"])}


def test_every_row_of_a_list_is_in_the_ledger_and_other_files_next_to_lists_are_counted(memory: Path) -> None:
    for number in range(2):
        write(memory / f"m/{number}.jpg", photo(number))
    rows = ["https://h.example/0.jpg,one", "https://h.example/1.jpg,two", "https://h.example/9.jpg,gone", ",lost"]
    write(memory / "l/a.csv", "url,caption\n" + "".join(f"{row}\n" for row in rows))
    for name in ("more.rar", "list.xlsx", "._a.csv", ".hidden", "a.csv.md5"):
        write(memory / "l" / name, b"x")
    success = download(memory, {"source": "url_list", "input": str(memory / "l"), "mirror": str(memory / "m")})
    assert success["counts"]["in"] == 4 and success["counts"]["kept"] == 2
    assert success["reasons"] == {"failed:not_in_mirror": 1, "failed:bad_url": 1}
    assert left_out(memory) == {"other_file": (3, ["a.csv.md5", "list.xlsx", "more.rar"])}


def test_a_choice_that_matches_no_row_says_what_there_is(memory: Path) -> None:
    rows = ["0,train", "1,train", "2,test"]
    write(memory / "l.csv", "url,fold\n" + "".join(f"https://h.example/{row}\n" for row in rows))
    settings = {"source": "url_list", "input": str(memory / "l.csv"), "split_column": "fold"}
    with pytest.raises(ConfigError, match=r"split_values=\[dev\]: .* column fold, which has train \(2\), test \(1\)$"):
        download(memory, {**settings, "split_values": ("dev",)})
    settings = LAYOUTS["flickr30k"](memory, [(photo(0), "one"), (photo(1), "two")])
    with pytest.raises(ConfigError, match=r"metadata_split=dev: no row has this split; train \(2\)"):
        download(memory, {**settings, "metadata_split": "dev"})
    split_file = write(memory / "s.csv", "filename,split\na.jpg,train\nb.jpg,train\nc.jpg,val\n")
    with pytest.raises(ConfigError, match=r"assigns none of these 2 images to test; .* in train \(2\), valid \(1\)"):
        Splits(split_file).chosen(["a.jpg", "b.jpg"], "test")


# ---- a setting that has no effect is an error

ELSEWHERE = frozenset(("dataset", "data_dir", "split", "subset", "variant", "expect_world_size", "rank_offset"))
ELSEWHERE |= {"world_size", "hang_timeout", "run_id"}
"""Options that place the output or the process: the launcher and the engine read them."""
ON_A_NETWORK = frozenset(["allow_private_hosts", "expected_gb", "opt_outs", "revision", "robots_txt"])
OF_TABLES = frozenset(("caption_column", "image_column"))
"""Of archives too, which may hold tables."""


def test_a_source_reads_each_option_that_it_takes(memory: Path) -> None:
    taken: dict[str, set[str]] = defaultdict(set)
    read: dict[str, set[str]] = defaultdict(set)
    names = {field.name: field for field in fields(DownloadConfig)}

    class Recording(DownloadConfig):
        def __getattribute__(self, name: str) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            if name in names and "/pipeline/" in caller and "/pipeline/config/" not in caller:
                read[object.__getattribute__(self, "source")].add(name)
            return object.__getattribute__(self, name)

    drawn = {"source": "shapes", "count": 2, "image_size": 16}
    for number, layout in enumerate([*LAYOUTS.values(), lambda *_: drawn]):
        folder = memory / str(number)
        folder.mkdir()
        settings = layout(folder, [(photo(0), "one"), (photo(1), "two")])
        config = Recording(output=str(folder / "download"), max_failed_fraction=1.0, retries=0, **settings)
        values = {name: object.__getattribute__(config, name) for name in names}
        taken[config.source] |= {n for n, field in names.items() if holds(condition_of(DownloadConfig, field), values)}
        engine.run(Download(config, Rank()))
    unread = {source: taken[source] - read[source] - ELSEWHERE - ON_A_NETWORK - OF_TABLES for source in taken}
    assert not any(unread.values()), unread
    assert len(taken) >= 11


def test_archives_and_tables_without_a_single_sample_are_an_error(memory: Path) -> None:
    write(memory / "t/a.tar", tar_of({"a.txt": b"one", "b.bin": b"x"}))
    write(memory / "t/b.tar", tar_of({}))
    with pytest.raises(
        Unbalanced, match=r"none of the 2 archives or tables has a sample \(other_member: 1, text_without"
    ):
        download(memory, {"source": "webdataset", "input": str(memory / "t")})
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), memory / "0.parquet")
    with pytest.raises(Unbalanced, match="none of the 1 archives or tables has a sample .they are empty"):
        download(memory / "p", {"source": "parquet", "input": str(memory / "0.parquet")})
    write(memory / "t/c.tar", tar_of({"c.jpg": photo(0)}))
    assert download(memory / "c", {"source": "webdataset", "input": str(memory / "t")})["counts"]["kept"] == 1


def test_a_folder_of_nothing_that_is_read_says_what_is_in_it(memory: Path) -> None:
    write(memory / "i/a.heic", b"x")
    write(memory / "i/b.docx", b"x")
    message = r"the input has no samples; left out: unread_image_format: 1, as a.heic; other_file: 1, as b.docx"
    with pytest.raises(ConfigError, match=message):
        download(memory, {"source": "image_folder", "input": str(memory / "i")})


def test_a_pattern_of_this_machine_is_an_error_that_says_what_to_give(memory: Path) -> None:
    for given in (f"{memory}/*.tar", f"{memory}/{{0..9}}.tar"):
        with pytest.raises(
            ConfigError, match="no such file or folder: patterns are for object stores; give the folder"
        ):
            download(memory, {"source": "webdataset", "input": given})


def test_a_file_of_captions_without_a_single_text_is_an_error(memory: Path) -> None:
    write(memory / "i/a.jpg", photo(0))
    write(memory / "i/captions.json", json.dumps({"a.jpg": {"de": "eins", "en": "one"}}))
    with pytest.raises(ConfigError, match=r"captions=.*: none of its 1 rows has a text as caption"):
        download(memory, {"source": "image_folder", "input": str(memory / "i")})


@pytest.mark.parametrize("end", ["txt", "TXT", "caption", "text"])
@pytest.mark.parametrize("source", ["image_folder", "webdataset"])
def test_texts_beside_images_have_several_extensions(memory: Path, source: str, end: str) -> None:
    files = {"a.jpg": photo(0), f"a.{end}": "\ufeffone\r\n".encode()}
    for name, data in files.items():
        write(memory / "i" / name, data)
    write(memory / "a.tar", tar_of(files))
    place = memory / ("i" if source == "image_folder" else "a.tar")
    download(memory, {"source": source, "input": str(place), "copy": source == "image_folder"})
    assert [row["captions"] for row in kept(memory)] == [["one"]]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_metadata_of_the_hugging_face_library_are_captions(memory: Path, name: str) -> None:
    write(memory / "i/a.jpg", photo(0))
    if name.endswith("parquet"):
        pq.write_table(pa.table({"file_name": ["a.jpg"], "text": ["one"]}), memory / "i" / name)
    else:
        write(memory / "i" / name, jsonl([{"file_name": "a.jpg", "text": "one"}]) if "jsonl" in name else FOUND_CSV)
    download(memory, {"source": "image_folder", "input": str(memory / "i")})
    assert [row["captions"] for row in kept(memory)] == [["one"]]


FOUND_CSV = "file_name,text\na.jpg,one\n"


def test_a_table_made_of_webdataset_has_its_captions(memory: Path) -> None:
    pq.write_table(pa.table({"__key__": ["a"], "jpg": [photo(0)], "txt": ["one"]}), memory / "0.parquet")
    download(memory, {"source": "parquet", "input": str(memory / "0.parquet")})
    assert [row["captions"] for row in kept(memory)] == [["one"]]


def test_a_repository_that_is_not_named_is_no_fault_of_the_network(memory: Path) -> None:
    with pytest.raises(ConfigError, match=r"^source=huggingface needs repo=<owner>/<name>$"):
        download(memory, {"source": "huggingface", "files": ("*.tar",)})


def test_metadata_without_captions_are_no_file_of_captions(memory: Path) -> None:
    write(memory / "i/a.jpg", photo(0))
    write(memory / "i/metadata.json", '{"version": 3}')
    download(memory, {"source": "image_folder", "input": str(memory / "i")})
    assert left_out(memory) == {"other_file": (1, ["metadata.json"])}


def test_captions_in_another_encoding_are_named(memory: Path) -> None:
    write(memory / "i/a.jpg", photo(0))
    write(memory / "i/captions.csv", "image,caption\na.jpg,café\n".encode("cp1252"))
    download(memory, {"source": "image_folder", "input": str(memory / "i")})
    assert left_out(memory) == {"caption_not_in_utf8": (1, ["line 2: caf\ufffd"])}


def test_an_image_of_a_row_may_be_in_a_list_or_in_base64(memory: Path) -> None:
    text = base64.b64encode(photo(0)).decode()
    rows = {
        "one": [{"bytes": photo(0), "path": "a"}],
        "two": [{"bytes": photo(0), "path": None}, {"bytes": photo(1), "path": None}],
        "none": [],
    }
    (memory / "i").mkdir()
    pq.write_table(pa.table({"images": list(rows.values()), "text": list(rows)}), memory / "i/0.parquet")
    texts = [text, f"data:image/jpeg;base64,{text}", text[:40] + "!", "a.jpg", base64.b64encode(b"no image").decode()]
    pq.write_table(pa.table({"image": texts, "text": list("abcde")}), memory / "i/1.parquet")
    success = download(memory, {"source": "parquet", "input": str(memory / "i")})
    assert [(row["jpg"], row["caption"]) for row in kept(memory)] == [
        (photo(0), "one"),
        (photo(0), "a"),
        (photo(0), "b"),
    ]
    assert success["reasons"] == {"failed:several_images": 1, "failed:no_image": 4}


def test_a_file_in_place_of_a_folder_says_which_source_reads_files(memory: Path) -> None:
    write(memory / "a.zip", zip_of({"a.jpg": photo(0)}))
    with pytest.raises(
        ConfigError, match="a.zip: a file, but .*reads a folder; it is an archive: source=webdataset reads it"
    ):
        download(memory, {"source": "image_folder", "input": str(memory / "a.zip")})


def test_a_linked_class_folder_counts(memory: Path) -> None:
    write(memory / "elsewhere/1.jpg", photo(0))
    write(memory / "i/dog/1.jpg", photo(1))
    (memory / "i/cat").symlink_to(memory / "elsewhere")
    download(memory, {"source": "image_folder", "input": str(memory / "i")})
    assert [(row["label"], row["caption"]) for row in kept(memory)] == [(0, "cat"), (1, "dog")]


def test_each_image_of_an_archive_has_the_sidecar_of_the_longest_equal_stem(memory: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(12):
        files |= {f"v.{number}.jpg": photo(0), f"v.{number}.json": b"{}", f"v.{number}.txt": f"of {number}".encode()}
    files |= {
        "w.1.jpg": photo(1),
        "w.2.jpg": photo(1),
        "w.txt": b"of both",
        "x.jpg": photo(2),
        "x.caption.txt": b"of x",
    }
    write(memory / "a.tar", tar_of(files))
    download(memory, {"source": "webdataset", "input": str(memory / "a.tar")})
    assert [row["caption"] for row in kept(memory)] == [*(f"of {n}" for n in range(12)), "of both", "of both", "of x"]


# ---- captions in a file of their own


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("captions.csv", "Image,Caption\n./a.jpg,one\nother/b/é.jpg,two\n", ["one", "two"]),
        ("captions.csv", "image;caption\na.jpg;one; two\nb\\e\u0301.jpg;two\n", ["one; two", "two"]),
        ("captions.csv", "a.jpg,one, two, three\nb/é.jpg,four\n", ["one, two, three", "four"]),
        ("captions.CSV", "file_name,caption\nA.JPG,one\né,two\n", ["one", "two"]),
        ("captions.tsv", 'image\tcaption\na.jpg\t"one", she said\n', ['"one", she said', ""]),
        ("captions.json", '\ufeff{"/data/x/a.jpg": "one", "C:\\\\y\\\\b\\\\é.jpg": null}', ["one", ""]),
        ("captions.jsonl", '{"img_path": "a.jpg", "prompt": "one"}\n', ["one", ""]),
        ("captions.csv", f'image,caption\na.jpg,"{"x" * 200_000}"\n', ["x" * 200_000, ""]),
    ],
)
def test_rows_find_their_images_however_they_name_them(memory: Path, name: str, text: str, expected: list[str]) -> None:
    write(memory / "i/a.jpg", photo(0))
    write(memory / "i/b/é.jpg", photo(1))
    write(memory / f"i/{name}", text)
    download(memory, {"source": "image_folder", "input": str(memory / "i"), "captions": name})
    assert [row["caption"] for row in kept(memory)] == expected


def test_a_row_about_another_image_that_is_there_is_not_borrowed(memory: Path) -> None:
    for name in ("train/1.jpg", "valid/1.jpg"):
        write(memory / "i" / name, photo(0))
    write(memory / "i/captions.json", '{"train/1.jpg": "of train"}')
    download(memory, {"source": "image_folder", "input": str(memory / "i"), "captions": "captions.json"})
    assert [row["captions"] for row in kept(memory)] == [["of train"], []]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,caption\nx.jpg,one\n",
            r"none of its 1 rows names an image in this folder: line 2 names 'x.jpg', an image is",
        ),
        ("photo,about\na.jpg,one\n", r"line 2: a row needs a name .* but has photo, about"),
        ("image,other\na.jpg,one\n", r"a caption .* but has image, other"),
    ],
)
def test_a_file_of_captions_about_nothing_here_is_an_error(memory: Path, text: str, message: str) -> None:
    write(memory / "i/a.jpg", photo(0))
    write(memory / "i/captions.csv", text)
    with pytest.raises(ConfigError, match=message):
        download(memory, {"source": "image_folder", "input": str(memory / "i")})


# ---- objects


def test_images_in_memory_come_upright_and_in_colours_that_files_hold(memory: Path) -> None:
    image = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    palette = image.convert("P")
    items = [(image.convert(mode), 0) for mode in ("CMYK", "YCbCr", "HSV", "LAB", "L", "RGBA")]
    items += [(turned, 1), (palette, 2), (np.ones((5, 7), bool), 3), (np.zeros((4, 4, 1), np.uint8), 4)]
    success = import_dataset(items, output=str(memory / "download"))
    assert success["reasons"] == {}
    rows = kept(memory)
    assert [row["label"] for row in rows] == [0] * 6 + [1, 2, 3, 4]
    decoded = [Image.open(io.BytesIO(row["jpg"])) for row in rows]
    assert [im.size for im in decoded[:8]] == [(6, 4)] * 6 + [(4, 6), (6, 4)]
    assert decoded[7].mode == "RGB" and np.asarray(decoded[8]).max() == 255


def test_labels_may_be_left_and_items_say_what_is_wrong_with_them(memory: Path) -> None:
    items = [(photo(0), 1), (photo(1), 2, 3), {"picture": photo(0)}, (photo(2), "a caption")]
    import_dataset(items, output=str(memory / "download"), labels=False, max_failed_fraction=1.0)
    failed = {row["reason"]: row["detail"] for row in fake_stage.rows(memory / "download") if row["reason"]}
    assert failed["bad_item"].startswith("3 parts; expected (image, label or captions)")
    assert failed["no_image"].startswith("a mapping with picture; expected image")
    assert "label" not in kept(memory)[0]


# ---- without a network


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN])
def test_every_published_set_takes_a_folder_in_place_of_the_network(
    server: Server, memory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (memory / "given").mkdir()
    case = CASES[name](server, memory / "given")
    for path in [path for path in server.replies if not path.startswith("/api/")]:
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(server.url(path)) as reply:
            write(memory / f"mirror{path}", reply.read())
    server.replies.clear()
    server.requests.clear()
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    given = [
        f"dataset={name}",
        f"data_dir={memory / 'data'}",
        "max_failed_fraction=0.9",
        *case.arguments,
        "check_space=false",
    ]
    if (memory / "mirror").is_dir():
        given.append(f"mirror={memory / 'mirror'}")
    success = run_stage("download", *given)
    assert success["counts"]["kept"] == (len(case.captions) or len(case.labels))
    reasons = {reason.replace("http_404", "not_in_mirror"): count for reason, count in case.reasons.items()}
    assert success["reasons"] == reasons and not server.requests
    assert run_stage("download", *given) == success


def test_files_that_a_partial_mirror_lacks_are_counted(memory: Path) -> None:
    write(memory / "m/1.tar", tar_of({"a.jpg": photo(0)}))
    settings = {"source": "http_archive", "urls": ("https://h.example/x/{0..2}.tar",), "mirror": str(memory / "m")}
    assert download(memory, settings)["counts"]["kept"] == 1
    assert left_out(memory) == {"not_in_mirror": (2, ["0.tar", "2.tar"])}
    with pytest.raises(ConfigError, match=r"mirror=.*: none of the 1 files is in it: 9.tar is not below"):
        download(memory / "other", settings | {"urls": ("https://h.example/x/9.tar",)})


def test_the_setting_that_names_no_folder_is_the_one_that_was_given(memory: Path) -> None:
    settings = {"source": "torchvision", "files": ("mnist",)}
    for setting in ("mirror", "input"):
        with pytest.raises(ConfigError, match=rf"^{setting}=.*nowhere: no such folder"):
            download(memory, {**settings, setting: str(memory / "nowhere")})


def test_a_mirror_is_checked_against_the_same_hashes(memory: Path) -> None:
    write(memory / "m/a.tar", tar_of({"a.jpg": photo(0)}))
    settings = {"source": "http_archive", "urls": ("https://h.example/a.tar",), "mirror": str(memory / "m")}
    assert download(memory, settings | {"sha256": ("0" * 64,)})["reasons"] == {"failed:wrong_hash": 1}
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        write(memory / f"f/{name}", gzip.compress(b"other"))
    settings = {"source": "torchvision", "files": ("fashion_mnist",), "input": str(memory / "f")}
    assert download(memory / "fashion", settings)["reasons"] == {"failed:wrong_hash": 1}


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist_comes_from_debians_package(memory: Path) -> None:
    given = ["dataset=fashion_mnist", f"input={FASHION_MNIST}", "split=test", "fraction=0.01"]
    success = run_stage("download", *given, f"output={memory / 'download'}")
    assert success["counts"]["kept"] == 100 and success["reasons"] == {}
    rows = kept(memory)
    assert [row["label"] for row in rows[:5]] == [9, 2, 1, 1, 6] and rows[0]["caption"] == "Ankle boot"


def test_ranges_of_archives_are_expanded_in_every_list_of_urls(memory: Path) -> None:
    for number in range(3):
        write(memory / f"m/{number:02d}.tar", tar_of({"a.jpg": photo(number)}))
        write(memory / f"m/{number}.jsonl", jsonl([{"url": f"https://h.example/{number}.jpg"}]))
        write(memory / f"m/{number}.jpg", photo(number))
    for source, url in (("http_archive", "{00..02}.tar"), ("webdataset", "{00..02}.tar"), ("url_list", "{0..2}.jsonl")):
        settings = {"source": source, "urls": (f"https://h.example/{url}",), "mirror": str(memory / "m")}
        assert download(memory / source, settings)["counts"]["kept"] == 3


@pytest.mark.parametrize("unpacked", [True, False])
@pytest.mark.parametrize("setting", ["input", "mirror"])
def test_journeydb_as_it_was_fetched_by_hand(memory: Path, setting: str, unpacked: bool) -> None:
    """Archives and annotations in a folder, in whatever depth, packed or not, and not all of them."""
    notes = [{"img_path": f"./007/{n}.jpg", "prompt": f"prompt {n}"} for n in range(3)]
    annotations = "train_anno_realease_repath.jsonl"
    images = {f"./007/{n}.jpg": photo(n) for n in range(3)}
    write(memory / "raw/train/imgs/007.tgz", gzip.compress(tar_of(images)))
    if unpacked:
        write(memory / "raw/train" / annotations, jsonl(notes))
    else:
        packed = gzip.compress(tar_of({annotations: jsonl(notes).encode()}))
        write(memory / f"raw/train/{annotations}.tgz", packed)
    success = run_stage("download", "dataset=jdb", f"{setting}={memory / 'raw'}", f"output={memory / 'download'}")
    assert [row["caption"] for row in kept(memory)] == ["prompt 0", "prompt 1", "prompt 2"]
    assert left_out(memory)["not_in_mirror"][0] == 199 and success["counts"]["kept"] == 3


def test_journeydb_unpacked_with_its_list_of_captions(memory: Path) -> None:
    notes = [{"img_path": f"./007/{n}.jpg", "prompt": f"prompt {n}"} for n in range(3)]
    for number in range(3):
        write(memory / f"imgs/007/{number}.jpg", photo(number))
    captions = write(memory / "train_anno_realease_repath.jsonl", jsonl(notes))
    download(memory, {"source": "image_folder", "input": str(memory / "imgs"), "captions": str(captions)})
    assert [row["caption"] for row in kept(memory)] == ["prompt 0", "prompt 1", "prompt 2"]


@pytest.mark.parametrize(
    "line",
    [
        "{name}\t{url}",
        "{name} {url}",
        "{name},{url}",
        '"{name}","{url}"',
        "'{name}' '{url}'",
    ],
)
def test_a_list_of_archives_may_have_commas_in_its_urls(memory: Path, line: str) -> None:
    write(memory / "m/a,b.tar", tar_of({"a.jpg": photo(0)}))
    said = line.format(name="a.tar", url="https://h.example/a,b.tar?sig=1,2")
    write(memory / "l.txt", f"\ufeffname\turl\n{said}\n")
    download(memory, {"source": "http_archive", "input": str(memory / "l.txt"), "mirror": str(memory / "m")})
    (container,) = [row for row in fake_stage.rows(memory / "download") if row["container"]]
    assert container["source"] == "a.tar" and len(kept(memory)) == 1
