"""stage=dedup: the same survivors under any number of ranks, and shards without the rest."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_stage import assert_sound, kept_keys, outcomes, run_ranks
from PIL import Image
from stages.conftest import digests, run_stage

from pipeline.config.schema import ConfigError
from pipeline.curation import duplicates, search
from pipeline.curation.duplicates import Links, Rows, Unit
from pipeline.stages.dedup import Dedup
from pipeline.storage import StorageError


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, two of them twice, and one also as a smaller JPEG."""
    place = tmp_path_factory.mktemp("dedup")
    (place / "images").mkdir()
    for number in range(40):
        small = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
        image = Image.fromarray(small).resize((60, 50), Image.Resampling.BICUBIC)
        image.save(place / "images" / f"{number:03d}.png")
        if number in (3, 4):
            image.save(place / "images" / f"copy{number}.png")
        if number == 30:
            image.resize((54, 45)).save(place / "images" / "000-small.jpg", quality=90)
    run_stage(
        "download", source="image_folder", input=str(place / "images"), output=str(place / "download"), partition_size=9
    )
    run_stage("filter", input=str(place / "download"), output=str(place / "filter"), min_image_size=8, workers="0")
    return place


def test_any_number_of_ranks_keeps_the_same_samples(filtered: Path, tmp_path: Path) -> None:
    for world in (1, 2, 3):
        run_ranks(tmp_path / str(world), Dedup, world, input=str(filtered / "filter"))
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3")
    said = outcomes(tmp_path / "1")
    assert {key: what for key, what in said.items() if what != "kept:"} == {
        "copy3-png": "dropped:duplicate",
        "copy4-png": "dropped:duplicate",
        "000-small-jpg": "dropped:near_duplicate",
    }
    assert_sound(tmp_path / "1")


def test_shards_hold_what_is_left(filtered: Path, tmp_path: Path) -> None:
    run_stage("dedup", input=str(filtered / "filter"), output=str(tmp_path / "dedup"))
    run_stage("shard", input=str(tmp_path / "dedup"), output=str(tmp_path / "shard"), partition_size=7)
    assert kept_keys(tmp_path / "shard") == kept_keys(tmp_path / "dedup")
    assert len(kept_keys(tmp_path / "shard")) == 40
    assert not list((tmp_path / "dedup").glob("data/*/*/*.tar")), "no image is copied"
    assert_sound(tmp_path / "shard")


def test_only_what_filter_made_can_be_read(filtered: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads the output of filter"):
        run_stage("dedup", input=str(filtered / "download"), output=str(tmp_path / "dedup"))


def test_what_comes_later_is_judged_by_what_is_there(tmp_path: Path) -> None:
    """A generation of the upstream becomes one here: what was decided stays, and newcomers give way to it."""
    images, hidden = tmp_path / "images", tmp_path / "hidden"
    images.mkdir()
    hidden.mkdir()
    for number in range(12):
        small = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
        image = Image.fromarray(small).resize((60, 50), Image.Resampling.BICUBIC)
        image.save(images / f"{number:03d}.png")
        if number == 3:
            image.resize((90, 75), Image.Resampling.BICUBIC).save(images / "late-large.png")
    late = [images / "late-large.png", images / "011.png"]
    run_stage("download", source="image_folder", input=str(images), output=str(tmp_path / "download"), partition_size=5)
    for path in late:
        path.rename(hidden / path.name)
    filtering = {"input": str(tmp_path / "download"), "output": str(tmp_path / "filter"), "min_image_size": 8}
    filtering["max_failed_fraction"] = 0.5
    run_stage("filter", workers="0", **filtering)
    first = {"input": str(tmp_path / "filter"), "output": str(tmp_path / "dedup")}
    run_stage("dedup", **first)
    run_stage("shard", input=str(tmp_path / "dedup"), output=str(tmp_path / "shard"), partition_size=4)
    before = digests(tmp_path / "dedup")
    assert len(kept_keys(tmp_path / "dedup")) == 11

    for path in late:
        (hidden / path.name).rename(path)
    run_stage("filter", workers="0", retry_failed=True, **filtering)
    run_stage("dedup", **first)
    run_stage("shard", input=str(tmp_path / "dedup"), output=str(tmp_path / "shard"), partition_size=4)
    assert before.items() <= digests(tmp_path / "dedup").items()
    said = outcomes(tmp_path / "dedup")
    assert {key: what for key, what in said.items() if what != "kept:"} == {"late-large-png": "dropped:near_duplicate"}
    assert len(kept_keys(tmp_path / "dedup")) == len(kept_keys(tmp_path / "shard")) == 12
    for name in ("dedup", "shard"):
        assert_sound(tmp_path / name)

    run_stage("dedup", input=str(tmp_path / "filter"), output=str(tmp_path / "anew"))
    said = outcomes(tmp_path / "anew")
    assert {key: what for key, what in said.items() if what != "kept:"} == {"003-png": "dropped:near_duplicate"}


def test_an_interrupted_search_goes_on(filtered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found before is not looked for again, and the result is the same."""
    settings = {"input": str(filtered / "filter"), "memory": 1}
    run_stage("dedup", output=str(tmp_path / "whole"), **settings)
    done: list[Unit] = []

    def links(samples: Iterator[Rows], unit: Unit, count: int, hamming: int) -> Links:
        if len(done) == 5:
            raise OSError(errno.EIO, "broken")
        done.append(unit)
        return duplicates.links(samples, unit, count, hamming)

    monkeypatch.setattr(search, "links", links)
    with pytest.raises(StorageError):
        run_stage("dedup", output=str(tmp_path / "broken"), **settings)
    monkeypatch.setattr(search, "links", lambda *a: done.append(a[1]) or duplicates.links(*a))
    run_stage("dedup", output=str(tmp_path / "broken"), **settings)
    assert len(done) == len(set(done)) == 1 + duplicates.TABLES
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")
    assert [path.name for path in tmp_path.glob("broken/partial/dedup-*/*.parquet")] == ["verdicts.parquet"]
    assert not list(tmp_path.glob("broken/partial/dedup-*/links-*"))
