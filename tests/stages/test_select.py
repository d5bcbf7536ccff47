"""stage=select: who goes on, why others do not, and that the choice does not depend on ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_stage import assert_sound, kept_keys, outcomes, run_ranks
from sources.found import photo
from stages.conftest import digests, run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, SelectConfig, ShardConfig
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset, Stored
from pipeline.partitions.stage import input_folder
from pipeline.stages.report import page
from pipeline.stages.select import Select, Settled, export_keys
from pipeline.stages.select import main as select_main
from pipeline.stages.takedown import takedown
from pipeline.stages.trace import stations
from pipeline.storage import StorageError

COUNT = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with captions, filtered and scored: <place>/shapes/train/{download,filter,score}."""
    folder = tmp_path_factory.mktemp("select")
    where = {"data_dir": str(folder), "dataset": "shapes"}
    run_stage("download", source="shapes", count=COUNT, partition_size=7, **where)
    run_stage("filter", min_image_size=8, workers="0", **where)
    run_stage("score", scorers=("sharpness", "colourfulness", "caption_length", "language"), workers="0", **where)
    return folder / "shapes/train"


def column(place: Path, name: str) -> dict[str, float]:
    return {stored.key: stored.read((name,))[name] for stored in samples(place / "score")}


def samples(place: Path) -> Iterator[Stored]:
    dataset = Dataset.open(place)
    return (stored for index in range(dataset.partitions) for stored in dataset.samples(index))


def select(place: Path, output: Path, **settings: object) -> dict[str, str]:
    run_stage("select", input=str(place / "score"), output=str(output), **settings)
    assert_sound(output)
    return outcomes(output)


def test_the_first_condition_that_fails_is_the_reason(place: Path, tmp_path: Path) -> None:
    said = select(place, tmp_path / "out", where="sharpness > q20 and top(colourfulness, 0.5)")
    sharp, colour = column(place, "sharpness"), column(place, "colourfulness")
    low = np.sort(list(sharp.values()))[COUNT // 5 - 1]
    high = np.sort(list(colour.values()))[COUNT // 2]
    for key, what in said.items():
        expected = "kept:"
        if sharp[key] <= low:
            expected = "dropped:where_sharpness"
        elif colour[key] < high:
            expected = "dropped:where_colourfulness"
        assert what == expected
    assert 0 < sum(what == "kept:" for what in said.values()) < COUNT
    ledger = Dataset.open(tmp_path / "out")
    assert ledger.header["extra"]["selection"]["thresholds"]["q(sharpness, 0.2)"] == low


def test_any_number_of_ranks_chooses_the_same(place: Path, tmp_path: Path) -> None:
    settings = {"input": str(place / "score"), "where": "sharpness > q10", "sample": 7, "cap": ("caption_length:4",)}
    for world in (1, 2, 3):
        run_ranks(tmp_path / str(world), Select, world, **settings)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3") != {}
    assert len(kept_keys(tmp_path / "1")) == 7


def test_caps_hold_for_each_value(place: Path, tmp_path: Path) -> None:
    words = column(place, "caption_length")
    select(place, tmp_path / "out", cap=("caption_length:2",))
    assert len(set(words.values())) > 3
    kept = [words[key] for key in kept_keys(tmp_path / "out")]
    assert {value: kept.count(value) for value in kept} == {
        value: min(2, list(words.values()).count(value)) for value in words.values()
    }


def test_a_sample_depends_on_the_seed_alone(place: Path, tmp_path: Path) -> None:
    chosen = []
    for number, settings in enumerate(({"seed": 1}, {"seed": 2}, {"seed": 1, "where": "caption_length > 0"})):
        select(place, tmp_path / str(number), sample=9, **settings)
        chosen.append(kept_keys(tmp_path / str(number)))
    assert [len(keys) for keys in chosen] == [9, 9, 9]
    assert chosen[0] == chosen[2] != chosen[1]
    select(place, tmp_path / "all", sample=COUNT + 5)
    assert len(kept_keys(tmp_path / "all")) == COUNT


def test_lists_of_keys_come_in_and_go_out(place: Path, tmp_path: Path) -> None:
    select(place, tmp_path / "first", sample=8)
    assert export_keys(Dataset.open(tmp_path / "first"), tmp_path / "keys.txt") == 8
    select(place, tmp_path / "second", keep_keys=str(tmp_path / "keys.txt"))
    said = select(place, tmp_path / "rest", deny_keys=str(tmp_path / "keys.txt"))
    assert kept_keys(tmp_path / "second") == kept_keys(tmp_path / "first")
    assert sum(what == "dropped:key_denied" for what in said.values()) == 8
    assert {*kept_keys(tmp_path / "rest"), *kept_keys(tmp_path / "first")} == {*said}
    with pytest.raises(ConfigError, match=r"use \.txt"):
        export_keys(Dataset.open(tmp_path / "first"), tmp_path / "keys.npy")
    assert not list(tmp_path.glob("*keys.npy*")), "nothing is left of a list that could not be written"


def test_uids_come_in_and_go_out_as_datacomp_has_them(tmp_path: Path) -> None:
    uids = [f"{number:016x}{7 * number:016x}" for number in (5, 3, 11, 8, 2, 7)]
    table = {"image": [photo(number) for number in range(6)], "uid": uids}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    source = {"source": "parquet", "input": str(tmp_path / "0.parquet"), "columns": ("uid",), "copy": True}
    run_stage("download", output=str(tmp_path / "download"), partition_size=4, **source)
    given = {"input": str(tmp_path / "download")}
    run_stage("score", output=str(tmp_path / "score"), scorers=("aspect",), workers="0", **given)
    folder = tmp_path / "selection"
    given = {"input": str(tmp_path / "score"), "key_column": "uid"}
    select_main(build(SelectConfig, {**given, "output": str(folder / "a"), "sample": 4, "export": folder / "a.npy"}))
    pairs = np.load(folder / "a.npy")
    chosen = [f"{high:016x}{low:016x}" for high, low in pairs.tolist()]
    assert pairs.dtype == np.dtype("u8,u8") and len(chosen) == 4 and sorted(chosen) == chosen
    assert {stored.read(("meta",))["meta"]["uid"] for stored in samples(folder / "a")} == {*chosen}
    run_stage("select", output=str(folder / "b"), keep_keys=str(folder / "a.npy"), **given)
    run_stage("select", output=str(folder / "c"), deny_keys=str(folder / "a.npy"), **given)
    assert kept_keys(folder / "b") == kept_keys(folder / "a")
    assert {stored.read(("meta",))["meta"]["uid"] for stored in samples(folder / "c")} == {*uids} - {*chosen}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "a.npy", "b", "c"]
    with pytest.raises(ConfigError, match="key_column=uuid: none of the first samples"):
        run_stage("select", output=str(folder / "d"), keep_keys=str(folder / "a.npy"), **given | {"key_column": "uuid"})


def test_images_are_read_through_the_pointers(place: Path, tmp_path: Path) -> None:
    select(place, tmp_path / "out", where="sharpness > q50")
    run_stage("shard", input=str(tmp_path / "out"), output=str(tmp_path / "shard"), partition_size=4)
    assert kept_keys(tmp_path / "shard") == kept_keys(tmp_path / "out")
    filtered = Dataset.open(place / "filter")
    images = {s.key: s.read()["jpg"] for index in range(filtered.partitions) for s in filtered.samples(index)}
    shards = Dataset.open(tmp_path / "shard")
    for index in range(shards.partitions):
        for stored in shards.samples(index):
            assert stored.read()["jpg"] == images[stored.key]


def test_without_scores_sizes_and_lists_are_what_there_is(place: Path, tmp_path: Path) -> None:
    run_stage("select", input=str(place / "filter"), output=str(tmp_path / "out"), where="width >= 8", sample=5)
    assert len(kept_keys(tmp_path / "out")) == 5
    with pytest.raises(ConfigError, match="there is no column sharpness; there are width"):
        run_stage("select", input=str(place / "filter"), output=str(tmp_path / "none"), where="sharpness > 1")


def test_other_thresholds_make_what_was_selected_stale(place: Path, tmp_path: Path) -> None:
    select(place, tmp_path / "out", where="sharpness > q50")
    run_stage("shard", input=str(tmp_path / "out"), output=str(tmp_path / "shard"), partition_size=4)
    with pytest.raises(ConfigError, match="where="):
        run_stage("select", input=str(place / "score"), output=str(tmp_path / "out"), where="sharpness > q40")
    run_stage(
        "select", input=str(place / "score"), output=str(tmp_path / "out"), where="sharpness > q40", overwrite=True
    )
    with pytest.raises(ConfigError, match="different content"):
        run_stage("shard", input=str(tmp_path / "out"), output=str(tmp_path / "shard"), partition_size=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "otherwise nothing is left out"),
        ({"where": "sharp > 1"}, "no column sharp"),
        ({"where": "language > q10"}, "text and has no percentiles"),
        ({"where": "sharpness > 1 and language > 1"}, "where=language > 1: compares a text with a number"),
        ({"cap": ("language",)}, "<column>:<number>"),
        ({"keep_keys": "/nowhere.txt"}, "nowhere"),
        ({"concepts": "/nowhere.txt"}, "nowhere"),
    ],
)
def test_wrong_settings_are_named(place: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_stage("select", input=str(place / "score"), output=str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out/plan").exists(), "found before the plan is made"


def test_a_rank_that_dies_leaves_the_same_choice_to_the_next(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"input": str(place / "score"), "where": "sharpness > q30", "sample": 12}
    run_stage("select", output=str(tmp_path / "whole"), **settings)
    plain, calls = Select.process, []

    def breaks(self: Select, partition, context):  # type: ignore[no-untyped-def]
        calls.append(partition.index)
        for number, outcome in enumerate(plain(self, partition, context)):
            if len(calls) == 3 and number == 2:
                raise OSError(5, "broken")
            yield outcome

    monkeypatch.setattr(Select, "process", breaks)
    with pytest.raises(StorageError):
        run_stage("select", output=str(tmp_path / "broken"), **settings)
    monkeypatch.undo()
    run_stage("select", output=str(tmp_path / "broken"), **settings)
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_trace_report_and_takedown_go_through_scores_and_selection(place: Path, tmp_path: Path) -> None:
    where = {"data_dir": str(tmp_path), "dataset": "shapes"}
    run_stage("download", source="shapes", count=12, partition_size=5, **where)
    run_stage("filter", min_image_size=8, workers="0", **where)
    run_stage("score", scorers=("sharpness", "embedding:embedded"), workers="0", **where)
    run_stage("select", where="sharpness > q30", **where)
    run_stage("shard", partition_size=4, **where)
    folder = tmp_path / "shapes/train"
    datasets = [Dataset.open(folder / name) for name in ("download", "filter", "score", "select", "shard-mds")]
    kept, *_ = kept_keys(folder / "select")
    way = stations(datasets, kept)
    assert [station.dataset.stage for station in way] == ["download", "filter", "score", "select", "shard"]
    dropped = next(key for key, what in outcomes(folder / "select").items() if what != "kept:")
    assert stations(datasets, dropped)[-1].facts()["reason"] == "where_sharpness"
    html = page(tmp_path / "shapes", 4)
    assert "train/score" in html and "train/select" in html and "where_sharpness" in html

    (tmp_path / "list.txt").write_text(f"{kept}\n")
    assert takedown(tmp_path, tmp_path / "list.txt", Rank()).complete
    for name in ("score", "select", "shard-mds"):
        assert kept not in kept_keys(folder / name)
        assert_sound(folder / name)
    again = [kept_keys(folder / name) for name in ("select", "shard-mds")]
    assert sorted(again[0]) == sorted(again[1])
    run_stage("shard", partition_size=4, **where)


def test_concepts_are_balanced_as_metaclip_does(place: Path, tmp_path: Path) -> None:
    entries = ["red", "Blue", "green", "circle", "square", "red circle", "purple"]
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    settings = {"input": str(place / "score"), "concepts": str(tmp_path / "metadata.json"), "per_concept": 3}
    settings["where"] = "sharpness > q10"
    for world in (1, 2, 3):
        run_ranks(tmp_path / str(world), Select, world, **settings)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3") != {}
    said, captions = outcomes(tmp_path / "1"), {s.key: s.read()["captions"] for s in samples(place / "filter")}
    judged = [key for key, what in said.items() if what != "dropped:where_sharpness"]
    named = {key: {entry for entry in entries if in_words(entry, captions[key])} for key in judged}
    counts = Counter(entry for key in judged for entry in named[key])
    assert max(counts.values()) > 3 > min(counts.values())
    for key in judged:
        if not named[key]:
            assert said[key] == "dropped:no_concept"
        elif any(counts[entry] <= 3 for entry in named[key]):
            assert said[key] == "kept:"
        else:
            assert said[key] in ("kept:", "dropped:concept_too_common")
    settled = Dataset.open(tmp_path / "1").header["extra"]["selection"]["concepts"]
    assert settled == {entry.lower(): count for entry, count in counts.items() if count > 3}
    assert {"dropped:concept_too_common", "kept:"} <= set(said.values())


def in_words(entry: str, captions: list[str]) -> bool:
    """Whether a caption has the entry in it, from one word boundary to another: tried in all places."""
    spaced = [" " + re.sub("([,.;:?!])", r" \1 ", text).lower() + " " for text in captions]
    return any(f" {entry.lower()} " in text for text in spaced)


def test_clusters_of_embeddings_are_capped(place: Path, tmp_path: Path) -> None:
    scorers = ("embedding:embedded",)
    run_stage("score", input=str(place / "filter"), output=str(tmp_path / "score"), scorers=scorers, workers="0")
    given = {"input": str(tmp_path / "score"), "clusters": 4, "cap": ("cluster:3",)}
    for world in (1, 2):
        run_ranks(tmp_path / str(world), Select, world, **given)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") != {}
    kept = kept_keys(tmp_path / "1")
    vectors = {stored.key: stored.read(("embedding",))["embedding"] for stored in samples(tmp_path / "score")}
    centres = Settled.from_json(Dataset.open(tmp_path / "1").header["extra"]["selection"]).centres
    assert centres is not None and len(centres) == 4
    cluster = {key: int((centres.astype(float) @ vector.astype(float)).argmax()) for key, vector in vectors.items()}
    all_of, left = Counter(cluster.values()), Counter(cluster[key] for key in kept)
    assert left == {number: min(3, count) for number, count in all_of.items()} and max(all_of.values()) > 3
    for settings, message in (
        ({"where": "clusters > 1"}, "no column"),
        ({"cap": ()}, "are not used"),
        ({}, "no column"),
    ):
        given = {"input": str(place / "score" if not settings else tmp_path / "score"), "clusters": 4}
        with pytest.raises(ConfigError, match=message):
            run_stage("select", output=str(tmp_path / "wrong"), **{**given, "cap": ("cluster:3",), **settings})


def test_of_several_selections_the_last_of_the_line_goes_on(place: Path, tmp_path: Path) -> None:
    train = tmp_path / "shapes/train"
    shutil.copytree(place, train)
    where = {"data_dir": str(tmp_path), "dataset": "shapes"}
    shard = build(ShardConfig, where)
    assert input_folder(shard, "shard") == train / "filter"
    run_stage("score", scorers=("embedding:embedded",), workers="0", overwrite=True, **where)
    run_stage("dedup", method="semantic", cosine=0.99, **where)
    assert input_folder(shard, "shard") == train / "dedup-semantic"
    run_stage("select", sample=9, **where)
    with pytest.raises(ConfigError, match="dedup-semantic and .*/select are there, and none was made from the other"):
        input_folder(shard, "shard")
    run_stage("dedup", method="semantic", cosine=0.99, overwrite=True, **where)
    assert input_folder(shard, "shard") == train / "dedup-semantic"
    run_stage("select", input=str(train / "dedup-semantic"), sample=5, overwrite=True, **where)
    with pytest.raises(ConfigError, match="select was made from what an earlier one led to"):
        input_folder(shard, "shard")
    run_stage("dedup", method="semantic", input=str(train / "score"), cosine=0.99, overwrite=True, **where)
    run_stage("select", input=str(train / "dedup-semantic"), sample=5, overwrite=True, **where)
    assert input_folder(shard, "shard") == train / "select", "made from it, whatever the usual order"
