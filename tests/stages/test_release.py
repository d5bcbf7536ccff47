"""keep_raw=false, keep=latents: data go when what was made from them is sound, ledgers stay, and nothing is stale."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_stage import assert_sound, rows
from PIL import Image
from stages.conftest import Run

from pipeline.config import cli
from pipeline.config.schema import ConfigError
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset, Released
from pipeline.partitions.verify import verify
from pipeline.stages import filter as filter_stage
from pipeline.stages import release, trace
from pipeline.stages.release import release_upstream
from pipeline.stages.repair import repair
from pipeline.stages.takedown import takedown
from pipeline.stages.verify import findings_in
from pipeline.storage import StorageError

KEY = "pic03-png"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"data_dir": str(tmp_path / "data"), "dataset": "image_folder", "workers": "0", "min_image_size": 32}


@pytest.fixture
def line(tmp_path: Path, run: Run, settings: dict[str, Any]) -> Path:
    """Twelve images through download, filter and shard, three to a partition."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        edge = 24 if number == 5 else 40
        pixels = np.random.default_rng(number).integers(0, 255, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/pic{number:02d}.png")
    place = {name: settings[name] for name in ("data_dir", "dataset")}
    images = str(tmp_path / "images")
    run("download", source="image_folder", input=images, copy=True, partition_size=3, **place)
    run("filter", **settings)
    run("shard", shuffle=True, partition_size=3, **place)
    return tmp_path / "data/image_folder/train"


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("data/*/*/*")}


def bare(folder: Path) -> bool:
    """Whether nothing but ledgers and records is left, one folder for each partition."""
    dataset = Dataset.open(folder)
    return files_of(folder) == {"ledger.parquet", "record.json"} and len(list(folder.glob("data/*/*"))) == (
        dataset.partitions
    )


def digest_of(folder: Path) -> str:
    return str(Dataset.open(folder).require_success()["content_digest"])


def test_raw_data_go_and_everything_else_is_as_before(line: Path, run: Run, settings: dict[str, Any]) -> None:
    before = {stage: digest_of(line / stage) for stage in ("download", "filter", "shard-mds")}
    ledger = list(rows(line / "download"))
    release_upstream(line / "filter", Rank(), whole_line=False)

    assert bare(line / "download") and not bare(line / "filter")
    assert {stage: digest_of(line / stage) for stage in before} == before
    assert list(rows(line / "download")) == ledger
    for stage in before:
        assert_sound(line / stage)
    success = Dataset.open(line / "download").require_success()
    assert success["counts"]["released"] > 0.8 * success["counts"]["bytes"]

    way = trace.stations([Dataset.open(line / stage) for stage in before], KEY)
    assert [station.dataset.stage for station in way] == ["download", "filter", "shard"]
    assert way[0].facts()["source"] == "pic03.png" and way[0].facts()["released"]
    assert [station.read() is None for station in way] == [True, False, False]

    for path in (line.parents[2] / "images").iterdir():
        path.unlink()  # nobody looks at them again
    run("download", source="image_folder", input=str(path.parent), copy=True, partition_size=3, **place(settings))
    run("filter", **settings)
    assert digest_of(line / "filter") == before["filter"]


def place(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("data_dir", "dataset")}


def test_only_the_latents_stay(line: Path, run: Run, settings: dict[str, Any]) -> None:
    """What comes last in the line may be anything; here shards, made by way of pointers."""
    run("dedup", hamming=-1, **place(settings))
    run("shard", variant="last", **place(settings))
    release_upstream(line / "shard-mds", Rank(), whole_line=True)
    release_upstream(line / "shard-last", Rank(), whole_line=True)
    stages = ("download", "filter", "dedup", "shard-last")
    assert [bare(line / stage) for stage in stages] == [True, True, False, False]
    for stage in stages:
        assert list(verify(Dataset.open(line / stage))) == []
        assert list(findings_in(Dataset.open(line / stage), deep=True)) == []
    assert len(trace.stations([Dataset.open(line / stage) for stage in stages], KEY)) == 4


def test_who_needs_the_data_is_told_how_to_bring_them_back(line: Path, run: Run, settings: dict[str, Any]) -> None:
    before = digest_of(line / "download")
    release_upstream(line / "filter", Rank(), whole_line=False)
    with pytest.raises(ConfigError, match="stage=download restore=true restores the data"):
        run("filter", variant="other", **settings)
    with pytest.raises(Released, match="stage=download restore=true"):
        next(Dataset.open(line / "download").samples(0)).read()
    images = {"source": "image_folder", "input": str(line.parents[2] / "images"), "copy": True, "partition_size": 3}
    run("download", restore=True, **images, **place(settings))
    assert digest_of(line / "download") == before and not bare(line / "download")
    run("filter", variant="other", **settings)
    assert_sound(line / "filter-other")
    assert_sound(line / "download")
    release_upstream(line / "filter-other", Rank(), whole_line=False)
    assert bare(line / "download")


def test_data_stay_as_long_as_something_else_is_to_be_made_of_them(
    line: Path, run: Run, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run("filter", variant="other", **settings)
    (line / "filter-other/_SUCCESS").unlink()
    with caplog.at_level(logging.WARNING):
        release_upstream(line / "filter", Rank(), whole_line=False)
    assert "filter-other is not finished" in caplog.text
    assert not bare(line / "download")


def test_data_stay_when_what_was_made_of_them_is_damaged(line: Path) -> None:
    damaged = next((line / "filter").rglob("*.tar"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="its bytes have changed.*stage=repair"):
        release_upstream(line / "filter", Rank(), whole_line=False)
    assert not bare(line / "download")
    assert repair(line / "filter", Rank())
    release_upstream(line / "filter", Rank(), whole_line=False)
    assert bare(line / "download")


def test_a_damaged_ledger_is_made_again_with_its_data(line: Path) -> None:
    release_upstream(line / "filter", Rank(), whole_line=False)
    before = digest_of(line / "download")
    dataset = Dataset.open(line / "download")
    (line / "download" / dataset.path_of(1) / "ledger.parquet").write_bytes(b"x")
    after = repair(line / "download", Rank())
    assert after is not None and after["content_digest"] == before
    assert len(Dataset.open(line / "download").released) == dataset.partitions - 1
    release_upstream(line / "filter", Rank(), whole_line=False)
    assert bare(line / "download") and digest_of(line / "download") == before


def test_samples_can_be_taken_down_of_which_only_the_ledger_is_left(line: Path) -> None:
    release_upstream(line / "filter", Rank(), whole_line=False)
    wanted = line / "wanted.txt"
    wanted.write_text(KEY)
    assert set(takedown(line, wanted, Rank()).removed.values()) == {1}
    for stage in ("download", "filter", "shard-mds"):
        assert_sound(line / stage)
        (row,) = [row for row in rows(line / stage) if row["key"] == KEY]
        assert (row["outcome"], row["reason"], row["source"]) == ("dropped", "takedown", "")
    assert bare(line / "download")


def test_pictures_that_were_not_copied_are_none_of_ours(tmp_path: Path, run: Run, line: Path) -> None:
    run("download", source="image_folder", input=str(tmp_path / "images"), output=str(tmp_path / "r/download"))
    run("filter", input=str(tmp_path / "r/download"), output=str(tmp_path / "r/filter"), min_image_size=8, workers="0")
    release_upstream(tmp_path / "r/filter", Rank(), whole_line=False)
    assert "samples.jsonl" in files_of(tmp_path / "r/download")
    assert len(list((tmp_path / "images").iterdir())) == 12


def test_a_run_that_was_killed_half_way_is_finished_by_the_next(
    line: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the plan of the release and its partitions, the upstream is not finished."""
    config = cli.build(cli.STAGES["filter"], {**settings, "keep_raw": False})
    with monkeypatch.context() as patch:
        patch.setattr(release, "finish_release", lambda place, rank: None)
        patch.setattr(release, "collect", lambda dataset, older_than: 1 / 0)
        with pytest.raises((ZeroDivisionError, ConfigError)):
            release.main(filter_stage.Filter, config, Rank(), release_raw=True, whole_line=False)
    assert Dataset.open(line / "download").success is None
    release.main(filter_stage.Filter, config, Rank(), release_raw=True, whole_line=False)
    assert bare(line / "download")
    assert_sound(line / "filter")
