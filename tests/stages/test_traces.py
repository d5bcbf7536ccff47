"""Every sample leads back, from ledger to ledger, to the bytes that it was made of."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fake_stage import rows
from PIL import Image
from stages.conftest import run_stage

from pipeline.distributed import Stopped
from pipeline.partitions.dataset import Dataset
from pipeline.samples import content_hash


def test_from_a_latent_back_to_the_file_that_it_was_made_of(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(24):
        path = images / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16 + number, 20), (number * 10, 99, 50)).save(path)
    places = {stage: tmp_path / stage for stage in ("download", "filter", "shard", "precompute")}
    run_stage("download", source="image_folder", input=str(images), output=str(places["download"]), partition_size=7)
    line = list(places)
    for upstream, stage, more in zip(
        line,
        line[1:],
        (
            {"min_image_size": 18, "max_image_size": 18},
            {"partition_size": 5, "shuffle": True},
            {"image_resolutions": [16]},
        ),
        strict=False,
    ):
        run_stage(stage, input=str(places[upstream]), output=str(places[stage]), **more)
    assert len(list(rows(places["precompute"]))) == 22  # of 24, two are too small
    for row in rows(places["precompute"]):
        for stage, upstream in (("precompute", "shard"), ("shard", "filter"), ("filter", "download")):
            (here,) = [r for r in rows(places[stage]) if r["key"] == row["key"]]
            (above,) = [r for r in rows(places[upstream]) if r["key"] == row["key"]]
            there = Dataset.open(places[upstream])
            assert here["source"] == there.path_of(above["partition"])
            assert list(there.samples(above["partition"]))[here["source_offset"]].key == row["key"]
        data = (images / above["source"]).read_bytes()
        assert above["source_hash"] == content_hash(data)
        assert row["key"] == above["source"].replace(".png", "-png")


def test_a_stop_loses_nothing_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    from fake_stage import committed, rank_of

    from pipeline.config.schema import STAGES
    from pipeline.partitions import engine
    from pipeline.stages import get_stage

    source = {"source": "shapes", "count": 60, "image_size": 32, "partition_size": 10}
    run_stage("download", output=str(tmp_path / "download"), **source)
    settings = {"input": str(tmp_path / "download"), "min_image_size": 16, "max_image_size": 24}
    run_stage("filter", output=str(tmp_path / "reference"), **settings)
    config = STAGES["filter"](output=str(tmp_path / "filter"), **settings)
    stage = get_stage("filter")(config, rank_of(0, 2))
    process, seen = stage.process, []

    def stopping(partition: object, context: object) -> object:
        seen.append(partition)
        if len(seen) == 3:
            stage.rank.request_stop("SIGTERM")
        return process(partition, context)  # type: ignore[arg-type]

    stage.process = stopping  # type: ignore[method-assign, assignment]
    with suppress(Stopped):
        engine.run(stage)
    assert len({path.split("/")[2] for path in committed(tmp_path / "filter")}) == 2
    engine.run(get_stage("filter")(config, rank_of(2, 3)))
    assert committed(tmp_path / "filter") == committed(tmp_path / "reference")
