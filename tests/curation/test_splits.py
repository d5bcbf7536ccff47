"""Files that say which image belongs to which split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.schema import ConfigError
from pipeline.curation.splits import Splits

ROWS = [("1000092795.jpg", "train"), ("a b.c.jpg", "restval"), ("10.png", "val"), ("2.jpg", "test")]


def written(path: Path, kind: str) -> Path:
    file = path / f"splits.{kind}"
    if kind == "json":
        images = [{"filename": name, "split": split, "sentids": [0], "imgid": 0} for name, split in ROWS]
        file.write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        column = {"csv": "file_name", "tsv": "image"}[kind]
        lines = [("x", column, "split"), *(("1", name, split) for name, split in ROWS)]
        file.write_text("".join(mark.join(line) + "\r\n" for line in lines), encoding="utf-8-sig")
    return file


@pytest.mark.parametrize("kind", ["json", "csv", "tsv"])
def test_splits_go_by_file_name_wherever_the_file_lies(tmp_path: Path, kind: str) -> None:
    splits = Splits(written(tmp_path, kind))
    assert splits.of("flickr30k-images=2Ezip/flickr30k-images/1000092795-jpg") == "train"
    assert splits.of("some folder/a b.c.jpg") == splits.of("a=20b=2Ec-jpg") == "train"
    assert (splits.of("10.png"), splits.of("2-jpg"), splits.of("3.jpg")) == ("valid", "test", "")
    assert splits.chosen(["x/2-jpg", "3-jpg", "10-png", "y/10-png"], "valid") == [2, 3]
    with pytest.raises(ConfigError, match=r"split_file=.*none of these 1 images to train"):
        splits.chosen(["3-jpg"], "train")


def test_names_with_folders_tell_files_of_one_name_apart(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("filename,split\nbirds/1.png,train\nfish/1.png,test\n")
    splits = Splits(tmp_path / "a.csv")
    assert [splits.of(name) for name in ("animals/birds/1-png", "fish/1.png", "1.png")] == ["train", "test", ""]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"images": [{"filename": "a.jpg"}]}', "expected JSON with images"),
        ("a.json", "[1, 2]", "expected JSON with images"),
        ("a.json", "{", "a.json: no JSON"),
        ("a.csv", "about,split\na.jpg,train\n", "line 2: it has about, split: expected JSON with images"),
        ("a.csv", "name,split\na.jpg,\nb.jpg\n", "line 3: it has name: expected"),
        ("a.csv", "filename,split\na.jpg,train\na.jpg,test\n", "a.jpg is in train and in test"),
        ("", "", "No such file"),
    ],
)
def test_files_that_tell_nothing_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        Splits(tmp_path / (name or "none.json"))
