"""stage=dedup: the same survivors under any number of ranks, and shards without the rest."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from fake_stage import assert_sound, kept_keys, make, outcomes, rank_of
from PIL import Image
from stages.conftest import digests, run_stage

from pipeline.config import ConfigError
from pipeline.partitions import engine
from pipeline.stages.dedup import Dedup


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures, two of them twice, and one also as a smaller JPEG."""
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
        output = tmp_path / str(world)
        ranks = [rank_of(number, world) for number in range(world)]
        threads = [
            Thread(target=engine.run, args=(make(output, Dedup, rank, input=str(filtered / "filter")),))
            for rank in ranks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
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
    with pytest.raises(ConfigError, match="reads what filter made"):
        run_stage("dedup", input=str(filtered / "download"), output=str(tmp_path / "dedup"))
