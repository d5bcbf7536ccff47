"""stage=texts: text states by themselves, joined with latents exactly once, to the bytes of a single pass."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_stage import assert_sound, committed, rank_of, run_ranks
from latents.test_crashes import killed
from stages.conftest import digests, run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, PrecomputeConfig, TextsConfig
from pipeline.distributed import Rank
from pipeline.encoders.embedded import EmbeddedTextEncoder
from pipeline.latents import stored_texts, text_states
from pipeline.latents.text_states import TextRows
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, Unfinished
from pipeline.samples import Outcome, Row
from pipeline.stages import precompute as precompute_module
from pipeline.stages import trace
from pipeline.stages.precompute import Precompute
from pipeline.stages.repair import repair
from pipeline.stages.takedown import takedown
from pipeline.stages.texts import Texts
from pipeline.stages.verify import findings_of

COUNT = 47
IMAGES: dict[str, Any] = {"image_resolutions": (32,), "batch_size": "5", "workers": 0}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "buckets, one copy": (
        {"text_storage": "int8+ragged+dedup"},
        {"aspect": "buckets", "bucket_step": 16, "image_resolutions": (64, 48), "save_images": True},
    ),
    "two encoders": ({"text_encoder": ("embedded", "embedded"), "text_storage": "ragged"}, {"latent": "moments"}),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of two shapes in four partitions; some have the same caption."""
    place = tmp_path_factory.mktemp("line") / "download"
    source = {"source": "shapes", "count": COUNT, "image_size": 50, "canvases": ("1:1", "3:2")}
    run_stage("download", **source, partition_size=12, output=str(place))
    return place


@pytest.fixture(scope="module")
def texts(images: Path) -> Path:
    place = images.parent / "texts"
    run_stage("texts", input=str(images), output=str(place))
    assert_sound(place)
    return place


@pytest.fixture(scope="module")
def whole(images: Path) -> Path:
    """Latents and texts of a single pass."""
    place = images.parent / "whole"
    run_stage("precompute", input=str(images), output=str(place), **IMAGES)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_two_passes_write_the_bytes_of_one(images: Path, tmp_path: Path, kind: str) -> None:
    text, image = KINDS[kind][0], {**IMAGES, **KINDS[kind][1]}
    run_stage("precompute", input=str(images), output=str(tmp_path / "whole"), **text, **image)
    run_stage("texts", input=str(images), output=str(tmp_path / "texts"), **text)
    given = {"input": str(tmp_path / "texts"), "output": str(tmp_path / "latents")}
    run_stage("precompute", **given, **text, **image)
    assert digests(tmp_path / "latents") == digests(tmp_path / "whole") != {}
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "latents")]
    for name in ("shapes", "text_encoders", "text_storage", "vae", "dtype", "latent", "schema"):
        assert manifests[0].get(name) == manifests[1].get(name), name
    for name in ("texts", "latents"):
        assert_sound(tmp_path / name)
        assert list(findings_of(tmp_path / name, deep=True)[1]) == []


def test_neither_pass_loads_what_the_other_needs(
    images: Path, texts: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, *_: Any) -> Any:
        raise AssertionError(f"{name} is loaded")

    with monkeypatch.context() as patch:
        patch.setattr(precompute_module, "autoencoder", refused)
        run_stage("texts", input=str(images), output=str(tmp_path / "texts"))
    with monkeypatch.context() as patch:
        patch.setattr(text_states, "text_encoder", refused)
        run_stage("precompute", input=str(tmp_path / "texts"), output=str(tmp_path / "latents"), **IMAGES)
    assert digests(tmp_path / "texts") == digests(texts)
    assert digests(tmp_path / "latents") == digests(whole)


def test_any_number_of_ranks_writes_the_same_bytes(images: Path, texts: Path, whole: Path, tmp_path: Path) -> None:
    run_ranks(tmp_path / "texts", Texts, 3, input=str(images))
    assert digests(tmp_path / "texts") == digests(texts)
    run_ranks(tmp_path / "latents", Precompute, 2, input=str(tmp_path / "texts"), **IMAGES)
    assert digests(tmp_path / "latents") == digests(whole)


def test_killed_passes_lose_and_repeat_nothing(images: Path, texts: Path, whole: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "texts", tmp_path / "latents"
    given = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in IMAGES.items()]
    lives = [
        killed(0, 2, 15, f"input={images}", f"output={first}", stage="texts"),
        killed(1, 2, 8, f"input={texts}", f"output={second}", *given),
    ]
    for life in lives:
        _, said = life.communicate(timeout=300)
        assert life.returncode == -signal.SIGKILL, said
    with pytest.raises(Unfinished, match="run stage=texts again to its end"):
        run_stage("precompute", input=str(first), output=str(tmp_path / "early"), **IMAGES)
    before = committed(first)
    engine.run(Texts(build(TextsConfig, {"input": str(images), "output": str(first)}), rank_of(0, 2)))
    engine.run(Precompute(build(PrecomputeConfig, {"input": str(texts), "output": str(second), **IMAGES}), Rank()))
    assert before.items() <= committed(first).items()
    assert committed(first) == committed(texts) and committed(second) == committed(whole)


def test_texts_that_fail_and_are_tried_again_reach_the_latents(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, given = Texts._rows, {"input": str(images), "output": str(tmp_path / "texts")}

    def failing(self: Texts, partition: Any) -> Iterator[tuple[Outcome, Row]]:
        for number, (outcome, row) in enumerate(plain(self, partition)):
            if number == 3:
                outcome.reason, outcome.retryable, row = "away", True, {}
            yield outcome, row

    with monkeypatch.context() as patch:
        patch.setattr(Texts, "_rows", failing)
        counts = run_stage("texts", **given)["counts"]
    assert (counts["kept"], counts["failed"]) == (COUNT - 4, 4)
    latents = {"input": str(tmp_path / "texts"), "output": str(tmp_path / "latents"), **IMAGES}
    assert run_stage("precompute", **latents)["counts"]["kept"] == COUNT - 4
    assert run_stage("texts", **given, retry_failed=True)["counts"]["kept"] == COUNT
    assert run_stage("precompute", **latents)["counts"]["kept"] == COUNT
    found, expected = (rows_of(place) for place in (tmp_path / "latents", whole))
    assert found == expected
    assert list(findings_of(tmp_path / "latents", deep=True)[1]) == []


def rows_of(place: Path) -> dict[str, Row]:
    dataset = Dataset.open(place)
    samples = [stored for index in range(dataset.partitions) for stored in dataset.samples(index) if stored.file]
    return {stored.key: stored.read() for stored in samples}


def test_states_that_are_not_finite_fail(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EmbeddedTextEncoder.encode

    def overflowing(self: Any, captions: Any) -> torch.Tensor:
        states = plain(self, captions)
        states[[place for place, caption in enumerate(captions) if "red" in caption]] = 1e6
        return states

    monkeypatch.setattr(EmbeddedTextEncoder, "encode", overflowing)
    success = run_stage("texts", input=str(images), output=str(tmp_path / "texts"), max_failed_fraction=1.0)
    red = sum("red" in row["caption"] for row in rows_of(images).values())
    assert 0 < red < COUNT and success["reasons"] == {"failed:not_finite": red}
    latents = {"input": str(tmp_path / "texts"), "output": str(tmp_path / "latents"), **IMAGES}
    assert run_stage("precompute", **latents)["counts"]["in"] == COUNT - red


def test_texts_of_what_was_there_before_are_refused(images: Path, tmp_path: Path) -> None:
    own = tmp_path / "line" / "download"
    source = {"source": "shapes", "count": 20, "image_size": 50, "partition_size": 12}
    run_stage("download", **source, output=str(own))
    run_stage("texts", input=str(own), output=str(tmp_path / "texts"))
    given = {"input": str(tmp_path / "texts"), "output": str(tmp_path / "latents"), **IMAGES}
    run_stage("precompute", **given)
    (tmp_path / "list").write_text(next(iter(rows_of(own))))
    takedown(tmp_path / "line", tmp_path / "list", Rank())
    for output in ("latents", "others"):
        with pytest.raises(Unfinished, match="texts was not made from what .*download holds now: run stage=texts"):
            run_stage("precompute", **{**given, "output": str(tmp_path / output)})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text_encoder": ("embedded", "embedded")}, "text_encoder=[embedded,embedded]"),
        ({"text_storage": "int8"}, "text_storage=int8"),
        ({"save_dtype": "float32"}, "save_dtype=float32"),
        ({"encode_captions": "all"}, "encode_captions=all"),
    ],
)
def test_settings_of_texts_must_be_the_same(
    images: Path, texts: Path, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    expected = f"{said}, but {texts} was made with .* or input={images} to encode captions here"
    with pytest.raises(ConfigError, match=re.escape(said) + expected.removeprefix(said)):
        run_stage("precompute", input=str(texts), output=str(tmp_path / "latents"), **IMAGES, **given)


def test_the_stage_before_is_texts_if_there_are_some(tmp_path: Path) -> None:
    place = {"dataset": "shapes", "data_dir": str(tmp_path)}
    shard = tmp_path / "shapes/train/shard"
    run_stage("download", source="shapes", count=5, image_size=32, output=str(shard))
    run_stage("precompute", **place, **IMAGES)
    assert Dataset.open(tmp_path / "shapes/train/precompute-embedded").header["upstream"]["stage"] == "download"
    run_stage("texts", **place)
    run_stage("precompute", **place, **IMAGES, variant="two")
    assert Dataset.open(tmp_path / "shapes/train/precompute-two").header["upstream"]["stage"] == "texts"


# ---- afterwards


def test_faults_are_found_and_mended_on_both_sides(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, before = TextRows.of, [b""]

    def neighbours(self: Any, row: Row) -> tuple[Row, str]:
        found, fault = plain(self, row)
        states, before[0] = before[0] or found["caption_latents"], found["caption_latents"]
        return {**found, "caption_latents": states}, fault

    with monkeypatch.context() as patch:
        patch.setattr(TextRows, "of", neighbours)
        run_stage("texts", input=str(images), output=str(tmp_path / "texts"))
    run_stage("precompute", input=str(tmp_path / "texts"), output=str(tmp_path / "latents"), **IMAGES)
    for name in ("texts", "latents"):
        findings = list(findings_of(tmp_path / name, deep=True)[1])
        assert findings and all(finding.what.startswith("caption_latents: text states") for finding in findings)
    repair(tmp_path / "texts", Rank(), deep=True)
    with pytest.raises(ConfigError, match="was made from different content"):
        run_stage("precompute", input=str(tmp_path / "texts"), output=str(tmp_path / "latents"), **IMAGES)
    again = {"input": str(tmp_path / "texts"), "output": str(tmp_path / "latents"), "overwrite": True, "run_id": "2"}
    run_stage("precompute", **again, **IMAGES)
    assert list(findings_of(tmp_path / "latents", deep=True)[1]) == []
    assert digests(tmp_path / "latents") == digests(whole)


def test_a_damaged_byte_of_latents_is_mended_from_texts_and_images(texts: Path, whole: Path, tmp_path: Path) -> None:
    place = tmp_path / "latents"
    run_stage("precompute", input=str(texts), output=str(place), **IMAGES)
    shard = next(place.glob("data/000/00002/*.mds"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert repair(place, Rank()) is not None
    assert rows_of(place) == rows_of(whole)


def test_a_takedown_reaches_texts_and_latents(tmp_path: Path) -> None:
    line = tmp_path / "line"
    source = {"source": "shapes", "count": 30, "image_size": 50, "partition_size": 12}
    run_stage("download", **source, output=str(line / "download"))
    run_stage("texts", input=str(line / "download"), output=str(line / "texts"), text_storage="dedup")
    given = {"input": str(line / "texts"), "output": str(line / "latents"), "text_storage": "dedup", **IMAGES}
    run_stage("precompute", **given)
    keys = list(rows_of(line / "latents"))
    (tmp_path / "list").write_text(f"{keys[3]}\n{keys[20]}\n")
    taken = takedown(line, tmp_path / "list", Rank())
    assert taken.complete and set(taken.removed.values()) == {2}
    assert run_stage("precompute", **given)["counts"]["kept"] == 28
    for name in ("texts", "latents"):
        assert list(findings_of(line / name, deep=True)[1]) == []
    run_stage("precompute", **{**given, "output": str(line / "again")})
    assert set(rows_of(line / "again")) == {*keys} - {keys[3], keys[20]}


def test_the_way_of_a_sample_leads_through_texts(images: Path, texts: Path, tmp_path: Path) -> None:
    run_stage("precompute", input=str(texts), output=str(tmp_path / "latents"), **IMAGES)
    datasets = [Dataset.open(place) for place in (images, texts, tmp_path / "latents")]
    way = trace.stations(datasets, "shapes/00000031")
    assert [station.dataset.stage for station in way] == ["download", "texts", "precompute"]
    assert all(station.row["outcome"] == "kept" for station in way)


def test_images_whose_data_are_gone_are_refused(tmp_path: Path) -> None:
    assert Texts.name == stored_texts.STAGE
    run_stage("download", source="shapes", count=5, image_size=32, output=str(tmp_path / "download"))
    run_stage("texts", input=str(tmp_path / "download"), output=str(tmp_path / "texts"))
    from pipeline.stages.release import release

    release(tmp_path / "download", Rank())
    with pytest.raises(ConfigError, match="download: its data were removed"):
        run_stage("precompute", input=str(tmp_path / "texts"), output=str(tmp_path / "latents"), **IMAGES)
