"""Checks of captions and columns give the reason that they promise, in any script."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ConfigError
from pipeline.curation.keylist import KeyList, key_digest
from pipeline.curation.rules import CAPTION_CHECKS, at_least, denied_by, good_captions, kept_by, score


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red fox", ""),
        ("", "caption_empty"),
        (" .-- !", "caption_empty"),
        ("\u8d64\u3044\u72d0", ""),
        ("https://example.org/a.jpg", "caption_url"),
        (" WWW.example.org ", "caption_url"),
        ("from https://example.org", ""),
        ("buy now " * 10, "caption_repetitive"),
        ("very very nice", ""),
        ("a long sentence that tells of a dog, a cat, and the house in which they live together", ""),
        ("short", "caption_short"),
    ],
)
def test_a_caption_is_left_out_for_a_reason(caption: str, reason: str) -> None:
    checks = [*CAPTION_CHECKS.values(), *([at_least(8)] if reason == "caption_short" else [])]
    assert good_captions([caption], checks) == ([] if reason else [caption], reason)


def test_a_sample_goes_only_with_its_last_caption() -> None:
    checks = list(CAPTION_CHECKS.values())
    assert good_captions(["", "a fox"], checks) == (["a fox"], "")
    assert good_captions(["www.a.b", ""], checks) == ([], "caption_url")
    assert good_captions([], checks) == ([], "caption_empty")
    assert good_captions([], []) == ([], "")


def test_scores_are_conditions_on_columns() -> None:
    assert score("nsfw<0.5")({"nsfw": 0.4}) == ""
    assert score("nsfw < 0.5")({"nsfw": 0.5}) == "score_nsfw"
    assert score("aesthetic>=5")({"aesthetic": 5}) == ""
    assert score("aesthetic>=5")({"aesthetic": "6", "meta": {"aesthetic": 4}}) == ""
    assert (
        score("aesthetic>=5")({"meta": {"Aesthetic": 6.5}}) == score("aesthetic>=5")({"meta": {"aesthetic": "5"}}) == ""
    )
    for value in (None, True, "six", float("nan"), [6]):
        assert score("aesthetic>=5")({"meta": {"aesthetic": value}}) == "score_aesthetic"
    assert score("aesthetic>=5")({}) == "score_aesthetic"
    with pytest.raises(ConfigError, match="scores=nsfw"):
        score("nsfw")


@pytest.mark.parametrize("kind", ["txt", "key", "only"])
def test_lists_of_keys(kind: str, tmp_path: Path) -> None:
    keys = [f"folder/k{number}-jpg" for number in range(0, 3000, 3)]
    path = tmp_path / ("list.txt" if kind == "txt" else "list.parquet")
    if kind == "txt":
        path.write_bytes("\ufeff".encode() + "\r\n".join([*keys, "", " spaced ", "\u8d64"]).encode())
    else:
        more = {"other": np.arange(1002)} if kind == "key" else {}
        name = "key" if kind == "key" else "id"
        pq.write_table(pa.table({name: [*keys, "spaced", "\u8d64"], **more}), path)
    found = KeyList(str(path))
    assert len(found) == 1002
    assert [number for number in range(3000) if f"folder/k{number}-jpg" in found] == list(range(0, 3000, 3))
    assert "spaced" in found and "\u8d64" in found and "" not in found
    assert (kept_by(found)("nobody"), kept_by(found)("spaced")) == ("key_not_kept", "")
    assert (denied_by(found)("nobody"), denied_by(found)("spaced")) == ("", "key_denied")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "csv.gz"])
def test_keys_in_a_column_of_a_table(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"list.{suffix}"
    separator = "\t" if suffix == "tsv" else ","
    text = '{"uid": "a", "n": 1}\n{"uid": "b", "n": 2}\n'
    text = text if suffix == "jsonl" else f"n{separator}UID\n1{separator}a\n2{separator}b\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    assert len(KeyList(str(path), "uid")) == 2 and "b" in KeyList(str(path), "uid")
    assert "2" in KeyList(str(path), "n")
    with pytest.raises(ConfigError, match="no column key; it has"):
        KeyList(str(path))


def test_a_table_of_one_column_may_lack_a_heading(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a-jpg\nb-jpg\n")
    assert len(KeyList(str(tmp_path / "list.csv"))) == 2
    (tmp_path / "list.csv").write_text("key\nb-jpg\n")
    assert len(KeyList(str(tmp_path / "list.csv"))) == 1


def test_subsets_as_datacomp_has_them(tmp_path: Path) -> None:
    uids = ["000000000000000100000000000000ff", "ffffffffffffffff0000000000000000"]
    pairs = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids]
    np.save(tmp_path / "fields.npy", np.array(pairs, np.dtype("u8,u8")))
    np.save(tmp_path / "columns.npy", np.array(pairs, np.uint64))
    np.save(tmp_path / "texts.npy", np.array(uids))
    for name in ("fields", "columns", "texts"):
        found = KeyList(str(tmp_path / f"{name}.npy"))
        assert len(found) == 2 and all(uid in found for uid in uids)
    np.save(tmp_path / "floats.npy", np.ones((3, 3)))
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    for name in ("floats.npy", "objects.npy"):
        with pytest.raises(ConfigError, match=name):
            KeyList(str(tmp_path / name))


def test_what_is_no_list_of_keys(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "two.parquet")
    for name in ("empty.txt", "bad.parquet", "latin.txt", "two.parquet", "missing.txt"):
        with pytest.raises(ConfigError, match=name):
            KeyList(str(tmp_path / name))
    with pytest.raises(ConfigError, match="missing.txt"):
        key_digest(str(tmp_path / "missing.txt"))
