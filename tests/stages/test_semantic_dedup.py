"""stage=dedup method=semantic: like embeddings are found, by any number of ranks, and whatever happens to them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from fake_stage import assert_sound, kept_keys, outcomes, run_ranks
from PIL import Image, ImageOps
from stages.conftest import digests, run_stage

from pipeline.config.schema import ConfigError
from pipeline.curation import semantic, semantic_search
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset
from pipeline.stages.dedup import Dedup
from pipeline.stages.takedown import takedown
from pipeline.stages.trace import stations
from pipeline.storage import Folder

PARTITION = 9
SETTINGS = {"method": "semantic", "cosine": 0.97}


def scene(number: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    small = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, cells and units, of few samples."""
    monkeypatch.setattr(semantic, "_FEW", 8)
    monkeypatch.setattr(semantic, "_ROWS", 4)
    monkeypatch.setattr(semantic, "_COLUMNS", 8)
    monkeypatch.setattr(semantic_search, "ROWS_AT_ONCE", PARTITION)
    monkeypatch.setattr(semantic_search, "_UNITS", 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 scenes; of three there are further ones that a perceptual hash does not know: of other contrast, with a frame,
    and the same bytes; and one image that cannot be read. <place>/data/d/train/{download,filter,score}."""
    folder = tmp_path_factory.mktemp("semantic")
    (folder / "images").mkdir()
    for number in range(45):
        scene(number).save(folder / "images" / f"{number:03d}.png")
    ImageOps.autocontrast(scene(3), cutoff=3).save(folder / "images" / "a-contrast3.png")
    larger = scene(20, (90, 75))
    larger.save(folder / "images" / "z-larger20.png")
    (folder / "images" / "copy30.png").write_bytes((folder / "images" / "030.png").read_bytes())
    (folder / "images" / "broken.png").write_bytes((folder / "images" / "030.png").read_bytes()[:200])
    where = {"data_dir": str(folder / "data"), "dataset": "d"}
    run_stage("download", source="image_folder", input=str(folder / "images"), partition_size=PARTITION, **where)
    run_stage("filter", min_image_size=8, workers="0", max_failed_fraction=0.5, **where)
    run_stage("score", scorers=("embedding:embedded", "sharpness"), workers="0", **where)
    return folder / "data/d/train"


GONE = {
    "a-contrast3-png": "dropped:semantic_duplicate",  # the larger key of two of one size
    "020-png": "dropped:semantic_duplicate",  # the larger one stays
    "copy30-png": "dropped:duplicate",
}


def gone(output: Path) -> dict[str, str]:
    return {key: what for key, what in outcomes(output).items() if what.startswith("dropped")}


def test_any_number_of_ranks_keeps_the_same_samples(place: Path, tmp_path: Path) -> None:
    for world in (1, 2, 3):
        run_ranks(tmp_path / str(world), Dedup, world, input=str(place / "score"), **SETTINGS)
    assert gone(tmp_path / "1") == GONE
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3") != {}
    assert_sound(tmp_path / "1")
    left = {path.name for path in (tmp_path / "1").glob("partial/semantic-*/*")}
    assert left == {"verdicts.parquet", "claims"}, "nothing else is left of the search"


def test_memory_changes_the_pieces_and_not_the_result(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage("dedup", input=str(place / "score"), output=str(tmp_path / "small"), **SETTINGS)
    monkeypatch.setattr(semantic_search, "ROWS_AT_ONCE", 10**6)
    monkeypatch.setattr(semantic_search, "_UNITS", 1)
    run_stage("dedup", input=str(place / "score"), output=str(tmp_path / "large"), **SETTINGS)
    assert digests(tmp_path / "small") == digests(tmp_path / "large")


def test_killed_at_any_file_of_the_search_and_run_again_the_result_is_the_same(place: Path, tmp_path: Path) -> None:
    settings = {"input": str(place / "score"), "lease": 0.1, **SETTINGS}
    run_stage("dedup", output=str(tmp_path / "whole"), **settings)
    expected, steps = digests(tmp_path / "whole"), set()
    for number in range(100):
        output = tmp_path / str(number)
        name = _killed(output, number, settings)
        if not name:
            break
        steps.add(name.partition("-")[0])
        run_stage("dedup", output=str(output), **settings)
        assert digests(output) == expected, f"killed at {name}"
    assert steps == {"rows", "sample", "centres", "cells", "links", "verdicts.parquet"} and number > 20


def _killed(output: Path, at: int, settings: dict) -> str:
    """Run in a process that is killed in place of its file number ``at`` of the search, or, of odd numbers, right after
    it; the file's name, or "" if there are fewer."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            plain, count = Folder.write_stream_by, 0

            def write(self: Folder, name: str, fill):  # type: ignore[no-untyped-def]
                nonlocal count
                mine = "partial" in str(self.path) and count == at
                count += "partial" in str(self.path)
                if mine:
                    os.write(writer, name.encode())
                    if at % 2:
                        plain(self, name, fill)
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(self, name, fill)

            Folder.write_stream_by = write  # type: ignore[method-assign]
            run_stage("dedup", output=str(output), **settings)
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


def test_a_selection_is_searched_by_what_it_was_selected_by(place: Path, tmp_path: Path) -> None:
    run_stage("select", input=str(place / "score"), output=str(tmp_path / "select"), where="sharpness > q20")
    run_stage("dedup", input=str(tmp_path / "select"), output=str(tmp_path / "dedup"), **SETTINGS)
    before = kept_keys(tmp_path / "select")
    pairs = (("a-contrast3-png", "003-png"), ("020-png", "z-larger20-png"), ("copy30-png", "030-png"))
    assert gone(tmp_path / "dedup") == {a: GONE[a] for a, b in pairs if {a, b} <= {*before}}
    assert len(gone(tmp_path / "dedup")) > 0
    run_stage("shard", input=str(tmp_path / "dedup"), output=str(tmp_path / "shard"), partition_size=7)
    shards, images = Dataset.open(tmp_path / "shard"), Dataset.open(place / "filter")
    bytes_of = {s.key: s.read()["jpg"] for n in range(images.partitions) for s in images.samples(n)}
    stored = [s for n in range(shards.partitions) for s in shards.samples(n)]
    assert {s.key for s in stored} == {*before} - {*gone(tmp_path / "dedup")}
    assert all(s.read()["jpg"] == bytes_of[s.key] for s in stored)


def test_scores_of_the_same_samples_may_lie_elsewhere(place: Path, tmp_path: Path) -> None:
    settings = {"input": str(place / "filter"), "scores": str(place / "score"), **SETTINGS}
    run_stage("dedup", output=str(tmp_path / "dedup"), **settings)
    assert gone(tmp_path / "dedup") == GONE
    assert "copy30-png" not in kept_keys(tmp_path / "dedup") and len(kept_keys(tmp_path / "dedup")) == 45
    assert_sound(tmp_path / "dedup")


def test_the_line_finds_its_folders(place: Path) -> None:
    where = {"data_dir": str(place.parents[1]), "dataset": "d"}
    run_stage("dedup", **where, **SETTINGS)
    assert gone(place / "dedup-semantic") == GONE
    run_stage("shard", partition_size=10, **where)
    assert len(kept_keys(place / "shard-mds")) == 45
    way = stations(
        [Dataset.open(place / name) for name in ("download", "filter", "score", "dedup-semantic")], "020-png"
    )
    assert way[-1].facts()["reason"] == "semantic_duplicate"


def test_what_comes_later_gives_way_to_what_is_there(tmp_path: Path) -> None:
    images, hidden = tmp_path / "images", tmp_path / "hidden"
    images.mkdir()
    hidden.mkdir()
    for number in range(12):
        scene(number).save(images / f"{number:03d}.png")
    scene(3, (90, 75)).save(images / "late-larger.png")
    late = [images / "late-larger.png", images / "011.png"]
    where = {"data_dir": str(tmp_path / "data"), "dataset": "d", "max_failed_fraction": 0.5}
    run_stage("download", source="image_folder", input=str(images), partition_size=5, **where)
    for path in late:
        path.rename(hidden / path.name)
    steps = {
        "filter": {"min_image_size": 8, "workers": "0"},
        "score": {"scorers": ("embedding:embedded",), "workers": "0"},
        "dedup": SETTINGS,
    }
    for stage, settings in steps.items():
        run_stage(stage, **settings, **where)
    folder = tmp_path / "data/d/train"
    before = digests(folder / "dedup-semantic")
    assert len(kept_keys(folder / "dedup-semantic")) == 11
    for path in late:
        (hidden / path.name).rename(path)
    for stage, settings in steps.items():
        run_stage(stage, **settings, **where, **({"retry_failed": True} if stage == "filter" else {}))
    assert before.items() <= digests(folder / "dedup-semantic").items()
    assert gone(folder / "dedup-semantic") == {"late-larger-png": "dropped:semantic_duplicate"}
    assert len(kept_keys(folder / "dedup-semantic")) == 12
    assert_sound(folder / "dedup-semantic")

    (tmp_path / "list.txt").write_text("004-png\n")
    assert takedown(tmp_path / "data", tmp_path / "list.txt", Rank()).complete
    assert "004-png" not in kept_keys(folder / "dedup-semantic")
    assert_sound(folder / "dedup-semantic")
    run_stage("dedup", **SETTINGS, **where)


def test_wrong_scores_are_refused(place: Path, tmp_path: Path) -> None:
    plain = {"input": str(place / "filter"), "scorers": ("sharpness",), "workers": "0"}
    run_stage("score", output=str(tmp_path / "sharp"), **plain)
    scores = {**plain, "input": str(place / "download"), "scorers": ("embedding:embedded",)}
    run_stage("score", output=str(tmp_path / "other"), **scores)
    for settings, message in (
        ({"input": str(place / "filter")}, "was made without stage=score; name the folder"),
        ({"input": str(tmp_path / "sharp")}, "has no column embedding: add embedding:<model>"),
        ({"input": str(place / "filter"), "scores": str(place / "filter")}, "is not a folder written by stage=score"),
        ({"input": str(place / "filter"), "scores": str(tmp_path / "sharp")}, "has no column embedding"),
        ({"input": str(place / "score"), "method": "hash"}, "reads the output of filter"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_stage("dedup", output=str(tmp_path / "out"), **{**SETTINGS, **settings})
    with pytest.raises(ConfigError, match="are about .*/filter, which .*/other was not made from"):
        unrelated = {"input": str(tmp_path / "other/../other"), "scores": str(place / "score")}
        run_stage("dedup", output=str(tmp_path / "out"), **SETTINGS, **unrelated)
