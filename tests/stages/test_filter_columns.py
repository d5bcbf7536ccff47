"""Filtering by what lists, archives and tables say of samples: scores, and lists of uids or URLs."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sources.found import download, jsonl, kept, photo, write
from sources.packing import tar_of
from stages.conftest import run_stage

from pipeline.config.schema import ConfigError, FilterConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.stages.filter import Filter

UIDS = [f"{number:016x}{7 * number:016x}" for number in range(4)]
SCORES = [4.0, 5.0, 6.5, None]


def from_webdataset(folder: Path) -> dict[str, Any]:
    files: dict[str, bytes] = {}
    for number in range(4):
        said = {"caption": "x", "aesthetic": SCORES[number], "uid": UIDS[number]}
        files |= {f"{number}.jpg": photo(number), f"{number}.json": json.dumps(said).encode()}
    return {"source": "webdataset", "input": str(write(folder / "a.tar", tar_of(files)))}


def from_url_list(folder: Path) -> dict[str, Any]:
    rows = [f"https://h.example/{n}.jpg,x,{'' if SCORES[n] is None else SCORES[n]},{UIDS[n]}\n" for n in range(4)]
    write(folder / "l.csv", "url,caption,Aesthetic,uid\n" + "".join(rows))
    for number in range(4):
        write(folder / f"m/{number}.jpg", photo(number))
    settings = {"source": "url_list", "input": str(folder / "l.csv"), "mirror": str(folder / "m")}
    return settings | {"columns": ("Aesthetic", "uid")}


def from_parquet(folder: Path) -> dict[str, Any]:
    table = {"image": [photo(n) for n in range(4)], "aesthetic": SCORES, "uid": UIDS}
    pq.write_table(pa.table(table), folder / "0.parquet")
    return {"source": "parquet", "input": str(folder / "0.parquet"), "columns": ("aesthetic", "uid")}


SOURCES = {"webdataset": from_webdataset, "url_list": from_url_list, "parquet": from_parquet}


def filtered(folder: Path, name: str = "filter", **settings: Any) -> dict[str, Any]:
    """Run stage=filter on the download in ``folder``."""
    given = {"min_image_size": 0, "workers": "0", "input": str(folder / "download"), **settings}
    return run_stage("filter", output=str(folder / name), **given)


@pytest.mark.parametrize("source", SOURCES)
def test_scores_are_judged_by_the_fields_that_downloads_keep(tmp_path: Path, source: str) -> None:
    download(tmp_path, SOURCES[source](tmp_path))
    success = filtered(tmp_path, scores=("aesthetic>=5",))
    assert success["counts"]["kept"] == 2 and success["reasons"] == {"dropped:score_aesthetic": 2}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["npy", "txt", "csv", "parquet"])
def test_samples_are_chosen_by_a_column(tmp_path: Path, source: str, kind: str) -> None:
    download(tmp_path, SOURCES[source](tmp_path))
    chosen = UIDS[1:3]
    path = tmp_path / f"list.{kind}"
    if kind == "npy":
        np.save(path, np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in chosen], np.dtype("u8,u8")))
    elif kind == "parquet":
        pq.write_table(pa.table({"uid": chosen, "other": [1, 2]}), path)
    else:
        write(path, "other,uid\n" * (kind == "csv") + "".join(f"{'1,' * (kind == 'csv')}{uid}\n" for uid in chosen))
    success = filtered(tmp_path, keep_keys=str(path), key_column="uid")
    assert success["counts"]["kept"] == 2 and success["reasons"] == {"dropped:key_not_kept": 2}
    success = filtered(tmp_path, "denied", deny_keys=str(path), key_column="uid")
    assert success["counts"]["kept"] == 2 and success["reasons"] == {"dropped:key_denied": 2}


def test_urls_are_a_column_too(tmp_path: Path) -> None:
    download(tmp_path, from_url_list(tmp_path))
    write(tmp_path / "deny.txt", "https://h.example/2.jpg\n")
    success = filtered(tmp_path, deny_keys=str(tmp_path / "deny.txt"), key_column="url")
    assert success["reasons"] == {"dropped:key_denied": 1}


@pytest.mark.parametrize("settings", [{"scores": ("aestetic>=5",)}, {"keep_keys": "list.txt", "key_column": "uuid"}])
def test_a_column_that_is_nowhere_is_an_error_before_the_work(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "list.txt", "x\n")
    download(tmp_path, from_webdataset(tmp_path))
    with pytest.raises(ConfigError, match=r"has a column or field (aestetic|uuid); there are .*aesthetic, uid"):
        filtered(tmp_path, **settings)
    given = {**from_url_list(tmp_path), "fuse": True, "min_image_size": 0, "workers": "0", **settings}
    with pytest.raises(ConfigError, match="no sample has a column or field"):
        run_stage("filter", output=str(tmp_path / "fused"), **given)


def warned(folder: Path, caplog: pytest.LogCaptureFixture, **settings: Any) -> list[str]:
    given = {"min_image_size": 0, "workers": "0", "input": str(folder / "download"), "output": str(folder / "filter")}
    rank = Rank()
    rank.log.propagate = True
    with caplog.at_level(logging.WARNING, logger=rank.log.name):
        engine.main(Filter, FilterConfig(**{**given, **settings}), rank)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_rule_that_drops_nearly_everything_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    download(tmp_path, from_webdataset(tmp_path))
    (said,) = warned(tmp_path, caplog, scores=("aesthetic>=500",))
    assert "4 of 4 samples were dropped for one reason, score_aesthetic: is that setting right?" in said


def test_keys_that_no_sample_has_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    download(tmp_path, from_webdataset(tmp_path))
    key = kept(tmp_path)[0]["key"]
    write(tmp_path / "deny.txt", f"{key}\n{key}x\n")
    (said,) = warned(tmp_path, caplog, deny_keys=str(tmp_path / "deny.txt"))
    assert said.endswith("deny.txt: 2 keys, but 1 samples have one of them")


def test_lists_of_urls_without_the_column_are_refused_before_they_are_fetched(tmp_path: Path) -> None:
    write(tmp_path / "l.jsonl", jsonl([{"url": "https://h.example/1.jpg"}]))
    settings = {"source": "url_list", "input": str(tmp_path / "l.jsonl"), "columns": ("score",)}
    with pytest.raises(ConfigError, match="columns=score: l.jsonl has no such column; it has url"):
        download(tmp_path, settings)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", ["webdataset", "url_list", "parquet"])
def test_boxes_of_a_column_are_blurred_and_without_it_no_sample_is_kept(tmp_path: Path, kind: str, fuse: bool) -> None:
    """As img2dataset's ``bbox_col`` does with DataComp's face boxes."""
    boxes: list[Any] = [[[0.0, 0.0, 0.5, 0.5]], [], None, [[1, 2, 3]]]
    if kind == "webdataset":
        files: dict[str, bytes] = {}
        for n in range(4):
            files |= {f"{n}.jpg": photo(n), f"{n}.json": json.dumps({"face_bboxes": boxes[n]}).encode()}
        settings: dict[str, Any] = {"source": kind, "input": str(write(tmp_path / "a.tar", tar_of(files)))}
    elif kind == "url_list":
        rows = [{"url": f"https://h.example/{n}.jpg", "caption": "x", "face_bboxes": boxes[n]} for n in range(4)]
        for n in range(4):
            write(tmp_path / f"m/{n}.jpg", photo(n))
        path = write(tmp_path / "l.jsonl", jsonl(rows))
        settings = {"source": kind, "input": str(path), "mirror": str(tmp_path / "m"), "columns": ("face_bboxes",)}
    else:
        column = pa.array(boxes, pa.list_(pa.list_(pa.float64())))
        pq.write_table(pa.table({"image": [photo(n) for n in range(4)], "face_bboxes": column}), tmp_path / "0.parquet")
        settings = {"source": kind, "input": str(tmp_path / "0.parquet"), "columns": ("face_bboxes",)}
    given: dict[str, Any] = {"blur_column": "face_bboxes", "max_failed_fraction": 1.0, "encode_format": "png"}
    if fuse:
        given |= {"fuse": True, "input": settings.pop("input"), **settings}
    else:
        download(tmp_path, settings)
    success = filtered(tmp_path, **given)
    assert success["reasons"] == {"failed:no_boxes": 1, "failed:bad_boxes": 1}
    first, second = [sample.read() for sample in Dataset.open(tmp_path / "filter").samples(0)]
    assert first["format"] == "png" and second["jpg"] == photo(1)
    pixels = np.asarray(Image.open(io.BytesIO(first["jpg"])), float)
    before = np.asarray(Image.open(io.BytesIO(photo(0))).convert("RGB"), float)
    assert np.abs(pixels - before)[:8, :8].mean() > 5 * np.abs(pixels - before)[12:, 12:].mean()


def test_a_column_of_boxes_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    download(tmp_path, from_webdataset(tmp_path))
    with pytest.raises(ConfigError, match="blur_column=faces: no sample has a column or field faces; there are"):
        filtered(tmp_path, blur_column="faces")
