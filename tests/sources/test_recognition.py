"""A file that was given where another was expected: the message says what it is, and which setting takes it."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources.found import LAYOUTS, download, jsonl, kept, photo, write
from sources.packing import tar_of, zip_of

from pipeline.config.schema import ConfigError
from pipeline.partitions.finalize import Unbalanced
from pipeline.sources.annotations import READERS
from pipeline.sources.recognition import kind_of


def parquet(**columns: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def arrow(make: Callable[[Any, pa.Schema], Any]) -> bytes:
    table = pa.table({"image": [photo(0)]})
    file = io.BytesIO()
    with make(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def array(save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, np.zeros((2, 4, 4), np.uint8))
    return file.getvalue()


def coco(first: dict[str, Any] | None = None, images: int = 1, **note: Any) -> str:
    pictured = [{"id": number, "file_name": f"{number}.jpg"} for number in range(images)]
    notes = [{"image_id": number, **note} for number in range(images)]
    return json.dumps({**(first or {}), "images": pictured, "annotations": notes})


MDS_INDEX = json.dumps({"shards": [{"format": "mds", "raw_data": {"basename": "shard.00000.mds"}}], "version": 2})
STATISTICS = json.dumps({"count": 3, "successes": 2, "failed_to_download": 1, "status_dict": {"success": 2}})
TALK = json.dumps([{"id": 1, "image": "a.jpg", "conversations": [{"from": "human", "value": "what?"}]}])
TEXTCAPS = json.dumps({"data": [{"image_id": "0", "caption_str": "one"}]})

FILES: dict[str, tuple[bytes | str, str]] = {
    "captions.json": (coco({"info": {}}, caption="one"), "an annotation file of COCO: captions= takes it"),
    "bare.json": (coco(images=3000, caption="one"), "an annotation file of COCO"),
    "textcaps.json": (TEXTCAPS, "an annotation file of TextCaps"),
    "flickr.csv": ("raw,filename,split\n", "an annotation file of Flickr30k"),
    "index.json": (MDS_INDEX, "the index of MDS shards: source=mds reads the folder that it is in"),
    "00000_stats.json": (STATISTICS, "the statistics of a shard of img2dataset"),
    "dataset_info.json": ('{"features": {}, "splits": {}}', "what the Hugging Face library notes of a dataset"),
    "talk.json": (TALK, "a list of conversations"),
    "a.tar": (tar_of({"a.jpg": photo(0)}), "an archive: source=webdataset reads it"),
    "a.tgz": (gzip.compress(tar_of({"a.jpg": photo(0)})), "an archive: source=webdataset reads it"),
    "a.zip": (zip_of({"a.jpg": photo(0)}), "an archive: source=webdataset reads it"),
    "a.npz": (array(np.savez), "an archive of NumPy arrays: source=npy reads it"),
    "a.npy": (array(np.save), "a NumPy array: source=npy reads it"),
    "a.xlsx": (zip_of({"xl/workbook.xml": b"<x/>"}), "an office document: save its table as CSV"),
    "model.pt": (zip_of({"archive/data.pkl": b"x"}), "a file of torch.save"),
    "a.pkl": (pickle.dumps({"a": 1}), "a Python pickle: pickles are never read"),
    "urls.parquet": (parquet(URL=["https://h.example/a.jpg"]), "a Parquet table of URLs: source=url_list reads it"),
    "images.parquet": (parquet(image=[b"x"]), "a Parquet table: source=parquet reads tables of images"),
    "file.arrow": (arrow(pa.ipc.new_file), "an Arrow file: source=ipc reads it"),
    "stream.arrow": (arrow(pa.ipc.new_stream), "an Arrow stream: source=ipc reads it"),
    "a.h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file: source=hdf5 reads it"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(9), "a 7z archive: unpack it, or pack the images as tar or zip"),
    "a.tar.zst": (b"\x28\xb5\x2f\xfd" + bytes(9), "a file packed by zstd: unpack it"),
    "a.jpg": (photo(0), "an image: input= of source=image_folder takes the folder that it is in"),
    "pointer.tar": ("version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS: fetch the file itself"),
    "login.json": ("<!DOCTYPE html><title>Log in</title>", "a web page: what a server shows instead of a file"),
    "a.xml": ("<annotation/>", "an XML document"),
    "empty.csv": ("", "an empty file"),
    "mine.yaml": ("source: url_list\ninput: x\n", "the YAML file of a dataset: dataset= takes it"),
    "urls.txt": ("https://h.example/a.jpg\nhttps://h.example/b.jpg\n", "a list of URLs: source=url_list reads it"),
    "urls.csv": ("url,caption\nhttps://h.example/a.jpg,one\n", "a list of URLs"),
    "urls.jsonl": ('{"url": "https://h.example/a.jpg"}\n', "a list of URLs"),
    "table.csv": ("file_name,caption\na.jpg,one\n", "a table of captions: captions= of source=image_folder takes it"),
    "images.txt": ("a.jpg\nb/c.PNG\n", "a list of images: it has no captions, nor URLs"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_known_by_what_is_in_it(memory: Path, name: str) -> None:
    content, said = FILES[name]
    found = kind_of(write(memory / "file", content))
    assert str(found).startswith(said)
    assert found and (found.source in ("", "captions") or found.source in _sources())
    assert not found.annotations or found.annotations in READERS


def _sources() -> set[str]:
    from pipeline.registry import sources

    return set(sources)


def test_what_is_unknown_has_no_name(memory: Path) -> None:
    for content in ("some words\nand more\n", b"\x00\x01\x02", '{"a": 1}', b"PAR1 no more", '"text"'):
        assert kind_of(write(memory / "file", content)) is None
    database = sqlite3.connect(memory / "a.sqlite")
    database.execute("create table a (b)")
    database.close()
    assert str(kind_of(memory / "a.sqlite")) == "an SQLite database: export a table as CSV or Parquet"
    assert kind_of(memory / "nothing") is None


def folder_of_images(memory: Path) -> dict[str, Any]:
    for number in range(2):
        write(memory / f"i/{number}.jpg", photo(number))
    return {"source": "image_folder", "input": str(memory / "i")}


@pytest.mark.parametrize(
    "name", [name for name in FILES if name not in ("captions.json", "bare.json", "textcaps.json")]
)
def test_what_is_no_file_of_captions_is_named(memory: Path, name: str) -> None:
    content, said = FILES[name]
    path = write(memory / name, content)
    with pytest.raises(ConfigError) as error:
        download(memory, {**folder_of_images(memory), "captions": str(path)})
    if name not in ("table.csv", "flickr.csv", "pointer.tar"):  # these say themselves what is wrong
        assert f"{name} is {said}" in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["image_folder", "webdataset", "url_list", "mds", "ipc", "hdf5", "npy", "http_archive"]
)
@pytest.mark.parametrize("name", ["captions.json", "a.7z", "login.json", "a.jpg", "a.pkl"])
def test_an_input_that_is_something_else_is_named(memory: Path, source: str, name: str) -> None:
    content, said = FILES[name]
    path = write(memory / name, content)
    with pytest.raises((ConfigError, Unbalanced)) as error:
        download(memory, {"source": source, "input": str(path)}, max_failed_fraction=0.0)
    assert f" is {said}" in str(error.value)


@pytest.mark.parametrize("layout", ["coco", "jdb", "textcaps", "flickr30k"])
@pytest.mark.parametrize("name", ["a.xlsx", "urls.csv", "talk.json"])
def test_metadata_that_are_something_else_are_named(memory: Path, layout: str, name: str) -> None:
    settings = LAYOUTS[layout](memory, [(photo(0), "one")])
    path = write(memory / name, FILES[name][0])
    with pytest.raises(ConfigError, match=rf"{name}.* is {FILES[name][1]}"):
        download(memory, {**settings, "metadata": (str(path),)})


def test_a_damaged_file_of_the_right_kind_gets_no_advice(memory: Path) -> None:
    write(memory / "a.h5", FILES["a.h5"][0])
    with pytest.raises(Unbalanced) as error:
        download(memory, {"source": "hdf5", "input": str(memory / "a.h5")}, max_failed_fraction=0.0)
    assert "damaged_hdf5" in str(error.value) and " is an HDF5 file" not in str(error.value)


# ---- published annotations as captions of a folder


CAPTIONS = {
    "captions_val2017.json": coco({"info": {}, "licenses": []}, 2, caption="one "),
    "dense.json": coco(images=2, caption="one"),
    "TextCaps.json": json.dumps({"data": [{"image_id": str(n), "reference_strs": ["one"]} for n in range(2)]}),
    "dataset_flickr30k.csv": 'raw,filename,split\n"[""one""]",0.jpg,train\n"[""one""]",1.jpg,val\n',
    "results.txt": "0.jpg#0\tone\n1.jpg#0\tone\n",
    "captions.txt": "image,caption\n0.jpg,one\n1.jpg,one\n",
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_published_annotations_are_captions_of_a_folder(memory: Path, name: str) -> None:
    path = write(memory / name, CAPTIONS[name])
    download(memory, {**folder_of_images(memory), "captions": str(path)})
    assert [row["captions"] for row in kept(memory)] == [["one"], ["one"]]


def test_all_captions_of_an_image_are_taken_and_entries_about_no_image_counted(memory: Path) -> None:
    document = json.loads(coco({"info": {}}, 3, caption="one"))
    document["annotations"] += [
        {"image_id": 0, "caption": "two"},
        {"image_id": 1, "caption": None},
        {"caption": "lost"},
    ]
    path = write(memory / "c.json", json.dumps(document))
    download(memory, {**folder_of_images(memory), "captions": str(path)})
    assert [row["captions"] for row in kept(memory)] == [["one", "two"], ["one"]]
    said = json.loads((memory / "download/manifest.json").read_text())["left_out"]
    assert said["bad_caption_row"]["examples"] == ["annotations[5]: bad_row"]
    assert said["caption_row_without_image"]["examples"] == ["2.jpg"]


@pytest.mark.parametrize("way", ["captions", "metadata"])
def test_boxes_are_no_captions(memory: Path, way: str) -> None:
    path = write(memory / "instances.json", coco({"info": {}}, 2, category_id=1, bbox=[0, 0, 1, 1]))
    settings = {**folder_of_images(memory), "captions": str(path)}
    if way == "metadata":
        settings = {**LAYOUTS["coco"](memory / "z", [(photo(0), "one")]), "metadata": (str(path),)}
    with pytest.raises(
        ConfigError, match=r"none of its 2 annotations has a caption; they have image_id, category_id, bbox"
    ):
        download(memory, settings)


def test_a_list_without_a_single_url_is_an_error_before_the_work(memory: Path) -> None:
    path = write(memory / "l.jsonl", jsonl([{"url": "images/a.jpg"}, {"url": ""}]))
    with pytest.raises(
        ConfigError, match=r"url_column=url: no row of l.jsonl has a URL there, the first has 'images/a.jpg'"
    ):
        download(memory, {"source": "url_list", "input": str(path)})
