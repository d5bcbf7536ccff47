"""encode_captions=all: each text is encoded once, an epoch draws one by key, verify finds captions of a neighbour."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioning.server import serving
from fake_stage import assert_sound, run_ranks
from stages.conftest import digests, run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.distributed import Rank
from pipeline.encoders.base import text_encoder
from pipeline.latents.loading import build_streaming_latents_dataloader
from pipeline.latents.text_states import TextRows
from pipeline.loading.caption_choice import chosen, ends_of
from pipeline.loading.latent_folder import LatentFolder
from pipeline.loading.latents import TrainingLatents
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.stages.precompute import Precompute
from pipeline.stages.repair import repair
from pipeline.stages.takedown import takedown
from pipeline.stages.train import main as train
from pipeline.stages.train import task_and_data
from pipeline.stages.verify import findings_of
from pipeline.training.checkpoint import open_checkpoint

COUNT = 22
STORAGES = ["dense", "ragged", "int8+ragged"]
SETTINGS: dict[str, Any] = {
    "image_resolutions": (32,),
    "encode_captions": "all",
    "batch_size": 4,
    "workers": 0,
    "max_failed_fraction": 1.0,
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with one caption, two, or three: some were recaptioned, some twice."""
    place = tmp_path_factory.mktemp("captions")
    run_stage("download", source="shapes", count=COUNT, partition_size=8, image_size=64, output=str(place / "download"))
    run_stage("filter", input=str(place / "download"), output=str(place / "filter"), min_image_size=8, workers="0")
    with serving() as server:
        keys = [row["key"] for row in RandomAccess(Dataset.open(place / "filter")).rows(range(COUNT))]
        for key in keys[::4]:
            server.script[key] = ["refuse"] * 6
        common = {"captioner": f"openai:{server.url}", "served_model": "m", "workers": 0, "without_caption": "keep"}
        common |= {"attempts": 1, "caption_prompt": ("{key} what?",)}
        run_stage("recaption", input=str(place / "filter"), output=str(place / "one"), **common)
        server.script.clear()
        for key in keys[::3]:
            server.script[key] = ["refuse"] * 6
        common |= {"caption_source": "second", "first": "original", "caption_prompt": ("{key} once more?",)}
        run_stage("recaption", input=str(place / "one"), output=str(place / "two"), **common)
    run_stage("shard", input=str(place / "two"), output=str(place / "shard"), partition_size=9)
    return place / "shard"


@pytest.fixture(scope="module", params=STORAGES)
def latents(request: pytest.FixtureRequest, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("latents") / "latents"
    run_stage("precompute", input=str(shard), output=str(place), text_storage=request.param, **SETTINGS)
    assert_sound(place)
    return place


def rows(place: Path) -> list[dict[str, Any]]:
    return RandomAccess(Dataset.open(place)).rows(range(COUNT))


def loader(place: Path, **settings: Any) -> Any:
    length, width = Dataset.open(place).header["extra"]["shapes"]["caption_latents"]
    common = {"batch_size": 5, "image_size": 32, "cap_seq_size": length, "cap_emb_dim": width, "drop_last": False}
    return build_streaming_latents_dataloader(place, **{**common, "shuffle": False, **settings})


def test_every_caption_of_a_sample_is_there_with_its_source(shard: Path, latents: Path) -> None:
    stored, sources = rows(latents), {row["key"]: row for row in rows(shard)}
    assert {len(row["captions"]) for row in stored} == {1, 2, 3}
    for row in stored:
        source = sources[row["key"]]
        assert (row["captions"], row["caption_sources"]) == (source["captions"], source["caption_sources"])
        assert row["caption"] == source["caption"]
    folder = LatentFolder(latents)
    encoder = text_encoder("embedded")
    for position, row in enumerate(stored):
        numbers = list(range(len(row["captions"])))
        raw = folder.read([position] * len(numbers), ["caption_latents"], captions=numbers)
        expected = encoder.encode(row["captions"])
        found = folder.layout.text(raw["caption_latents"]).float()
        assert torch.nn.functional.cosine_similarity(found.flatten(1), expected.flatten(1)).min() > 0.999
        if "ragged" in folder.layout.storage:
            tokens = folder.tokens([position] * len(numbers), captions=numbers)
            assert tokens.tolist() == encoder.tokens(row["captions"])


def test_each_text_is_encoded_once(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.encoders.embedded import EmbeddedTextEncoder

    encoded: Counter[str] = Counter()
    plain = EmbeddedTextEncoder.encode

    def counted(self: Any, captions: Any) -> Any:
        encoded.update(captions)
        return plain(self, captions)

    monkeypatch.setattr(EmbeddedTextEncoder, "encode", counted)
    output = tmp_path / "latents"
    run_stage("precompute", input=str(shard), output=str(output), text_storage="ragged", **SETTINGS)
    dataset = Dataset.open(output)
    partitions = [[stored.read()["captions"] for stored in dataset.samples(i)] for i in range(dataset.partitions)]
    expected = Counter(text for part in partitions for text in {text for captions in part for text in captions})
    assert encoded == expected


def test_any_number_of_ranks_writes_the_same_bytes(shard: Path, tmp_path: Path) -> None:
    for world in (1, 2, 3):
        run_ranks(tmp_path / str(world), Precompute, world, input=str(shard), text_storage="ragged", **SETTINGS)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3") != {}


def test_texts_by_themselves_are_the_same(shard: Path, latents: Path, tmp_path: Path) -> None:
    storage = Dataset.open(latents).header["config"]["text_storage"]
    texts = {"encode_captions": "all", "text_storage": storage}
    run_stage("texts", input=str(shard), output=str(tmp_path / "texts"), **texts)
    run_stage("precompute", input=str(tmp_path / "texts"), output=str(tmp_path / "out"), **{**SETTINGS, **texts})
    assert digests(tmp_path / "out") == digests(latents) != {}
    for name in ("texts", "out"):
        assert list(findings_of(tmp_path / name, deep=True)[1]) == []


def test_the_first_captions_are_those_of_a_run_without_the_others(shard: Path, latents: Path, tmp_path: Path) -> None:
    storage = Dataset.open(latents).header["config"]["text_storage"]
    first = {**SETTINGS, "encode_captions": "first", "text_storage": storage}
    run_stage("precompute", input=str(shard), output=str(tmp_path / "latents"), **first)
    ours, theirs = list(loader(latents, captions="first")), list(loader(tmp_path / "latents"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def taken(place: Path, epochs: int, **settings: Any) -> list[dict[str, int]]:
    """Which caption of each sample each epoch takes, by key."""
    stored = rows(place)
    folder = LatentFolder(place)
    raw = {
        (position, number): folder.layout.text(
            folder.read([position], ["caption_latents"], captions=[number])["caption_latents"]
        )[0]
        for position, row in enumerate(stored)
        for number in range(len(row["captions"]))
    }
    made, found = loader(place, **settings), []
    for _ in range(epochs):
        texts = torch.cat([batch["caption_latents"][:, 0] for batch in made])
        assert len(texts) == COUNT
        found.append(
            {
                row["key"]: next(n for n in range(len(row["captions"])) if torch.equal(text, raw[position, n]))
                for position, (row, text) in enumerate(zip(stored, texts, strict=True))
            }
        )
    return found


def test_an_epoch_draws_one_caption_of_each_sample_by_its_key(latents: Path) -> None:
    epochs = taken(latents, 4)
    assert any(one != other for one, other in pairwise(epochs))
    assert epochs == taken(latents, 4), "the same again"
    assert epochs[0] != taken(latents, 1, seed=7)[0]
    sources = {row["key"]: row["caption_sources"] for row in rows(latents)}
    folder = LatentFolder(latents)
    which = [chosen(key, names, {}, 0, 0) for key, names in sources.items()]
    expected = folder.read(range(COUNT), ["caption_latents"], captions=which)["caption_latents"]
    drawn = torch.cat([batch["caption_latents"][:, 0] for batch in loader(latents)])
    assert torch.equal(drawn, folder.layout.text(expected))


def test_ranks_and_a_resumed_run_draw_the_same(latents: Path) -> None:
    whole = [torch.cat([batch["caption_latents"] for batch in loader(latents, batch_size=6, drop_last=True)])]
    halves = [list(loader(latents, batch_size=3, drop_last=True, rank=rank, world_size=2)) for rank in (0, 1)]
    steps = [torch.cat([half["caption_latents"] for half in pair]) for pair in zip(*halves, strict=True)]
    assert torch.equal(whole[0], torch.cat(steps))
    first, again = loader(latents), loader(latents)
    batches = iter(first)
    next(batches)
    again.load_state_dict(first.state_dict())
    for one, other in zip(list(batches), list(again), strict=True):
        assert torch.equal(one["caption_latents"], other["caption_latents"])


def test_weights_count_sources_not_captions() -> None:
    sources = ["recaption", "recaption", "original"]
    weights = {"original": 1.0, "recaption": 3.0}
    drawn = Counter(chosen(f"key{number}", sources, weights, 5, 2) for number in range(20_000))
    assert abs(drawn[2] / 20_000 - 0.25) < 0.01 and abs(drawn[0] - drawn[1]) < 500
    even = Counter(chosen(f"key{number}", sources, {}, 5, 2) for number in range(20_000))
    assert all(abs(even[number] / 20_000 - 1 / 3) < 0.01 for number in range(3))
    assert chosen("key", ["original"], weights, 0, 0) == 0


def test_the_loader_draws_by_weights(latents: Path) -> None:
    weights = {"original": 1.0, "recaption": 1000.0, "second": 1.0}
    sources = {row["key"]: row["caption_sources"] for row in rows(latents)}
    for key, number in taken(latents, 1, caption_weights=weights)[0].items():
        if "recaption" in sources[key]:
            assert sources[key][number] == "recaption"


def test_all_captions_come_padded_with_counts(latents: Path) -> None:
    stored = iter(rows(latents))
    encoder = text_encoder("embedded")
    for batch in loader(latents, captions="all"):
        count = len(batch["image_latents"])
        for place in range(count):
            row = next(stored)
            n = int(batch["caption_counts"][place])
            assert n == len(row["captions"])
            texts = batch["caption_latents"][place]
            assert not texts[n:].any()
            expected = encoder.encode(row["captions"])
            assert (
                torch.nn.functional.cosine_similarity(texts[:n].float().flatten(1), expected.flatten(1)).min() > 0.999
            )
            if "caption_mask" in batch:
                assert batch["caption_mask"][place].sum(1).tolist()[:n] == encoder.tokens(row["captions"])
                assert not batch["caption_mask"][place][n:].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_weights": {"original": 1, "recaption": 3}}, "give a weight for second"),
        ({"caption_weights": {"original": 1, "recaption": 3, "second": 0}}, "more than 0"),
        ({"caption_weights": {"orginal": 1}}, "no captions have the source 'orginal'"),
        ({"caption_weights": {"original": 1}, "captions": "first"}, "no effect"),
        ({"captions": "some"}, "captions=some"),
    ],
)
def test_weights_that_do_not_fit_are_refused(latents: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(latents, **settings)


def test_shared_states_and_several_captions_do_not_go_together(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave dedup out"):
        run_stage("precompute", input=str(shard), output=str(tmp_path / "out"), text_storage="dedup", **SETTINGS)


def test_bytes_of_other_numbers_of_captions_are_refused() -> None:
    assert ends_of(40, None, (5, 2), "dense", "float16", 2).tolist() == [20, 40]
    assert ends_of(20, np.array([2, 0, 3]), (5, 2), "ragged", "float16", 3).tolist() == [8, 8, 20]
    for size, tokens, count in ((40, None, 3), (20, np.array([2, 2]), 2), (0, None, 0)):
        with pytest.raises(ValueError, match="captions"):
            ends_of(size, tokens, (5, 2), "dense" if tokens is None else "ragged", "float16", count)


# ---- training

Read = list[tuple[int, int | None, torch.Tensor]]


def train_config(place: Path, output: Path, **more: Any) -> TrainConfig:
    given = {"task": "diffuse", "model": "nano", "input": str(place), "output": str(output), "batch_size": 10}
    return build(
        TrainConfig, {**given, "steps": 6, "warmup_steps": 0, "schedule": "constant", "seed": 5, "threads": 1, **more}
    )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """What training reads: position, epoch and text states of each sample."""
    plain, found = TrainingLatents.batch, []

    def batch(self: Any, positions: Any, epochs: Any = None) -> Any:
        made = plain(self, positions, epochs)
        seen = [None] * len(positions) if epochs is None else epochs.tolist()
        found.extend(zip(positions.tolist(), seen, made["caption_latents"], strict=True))
        return made

    monkeypatch.setattr(TrainingLatents, "batch", batch)
    return found


@pytest.mark.parametrize("latents", ["ragged"], indirect=True)
def test_training_draws_a_caption_in_each_epoch_and_is_measured_on_the_first(
    latents: Path, tmp_path: Path, read: Read
) -> None:
    weights = {"original": 1.0, "recaption": 3.0, "second": 1.0}
    given = {"valid_fraction": 0.2, "caption_weights": "[original,recaption*3,second*1]"}
    train(train_config(latents, tmp_path / "run", **given))
    stored, folder, which = rows(latents), LatentFolder(latents), Counter[int]()
    for position, epoch, text in read:
        number, row = 0, stored[position]
        if epoch is not None:
            number = chosen(row["key"], row["caption_sources"], weights, 5, epoch)
            which[number] += 1
        states = folder.read([position], ["caption_latents"], captions=[number])["caption_latents"]
        assert torch.equal(text, folder.layout.text(states)[0])
    assert {epoch for _, epoch, _ in read} == {None, 0, 1, 2, 3} and min(which[0], which[1], which[2]) > 2


@pytest.mark.parametrize("latents", ["ragged"], indirect=True)
def test_training_that_goes_on_draws_the_same_captions(latents: Path, tmp_path: Path, read: Read) -> None:
    train(train_config(latents, tmp_path / "whole"))
    whole = [part for part in read if part[1] is not None]
    read.clear()
    train(train_config(latents, tmp_path / "parts", steps=3))
    train(train_config(latents, tmp_path / "parts"))
    parts = [part for part in read if part[1] is not None]
    assert [part[:2] for part in parts] == [part[:2] for part in whole]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(parts, whole, strict=True))
    ends = [open_checkpoint(tmp_path / name).tensors["ema"] for name in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("latents", ["ragged"], indirect=True)
def test_the_first_captions_are_trained_on_if_asked_for(latents: Path, tmp_path: Path) -> None:
    data = task_and_data(train_config(latents, tmp_path, draw_captions=False), Dataset.open(latents))[1]
    positions = np.arange(COUNT)
    first = data.batch(positions)["caption_latents"]
    assert torch.equal(data.batch(positions, positions)["caption_latents"], first)
    drawn = task_and_data(train_config(latents, tmp_path), Dataset.open(latents))[1]
    assert not torch.equal(drawn.batch(positions, positions)["caption_latents"], first)


@pytest.mark.parametrize("latents", ["ragged"], indirect=True)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("[original*1,recaption*3]", "give a weight for second"),
        ("[original*1,recaption*x,second]", "recaption[*]x: expected <source>[*]<weight>"),
        ("[original*0]", "must be above 0"),
        ("[original,original*2]", "two weights for original"),
        ("[orginal]", "no captions have the source 'orginal'"),
    ],
)
def test_training_refuses_weights_that_do_not_fit(latents: Path, tmp_path: Path, weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"caption_weights.*{message}"):
        task_and_data(train_config(latents, tmp_path, caption_weights=weights), Dataset.open(latents))


def test_weights_where_there_is_nothing_to_draw_are_refused(shard: Path, tmp_path: Path) -> None:
    place = tmp_path / "latents"
    run_stage("precompute", input=str(shard), output=str(place), **{**SETTINGS, "encode_captions": "first"})
    with pytest.raises(ConfigError, match="caption_weights.*encode_captions=first"):
        task_and_data(train_config(place, tmp_path, caption_weights="[original]"), Dataset.open(place))
    with pytest.raises(ConfigError, match="caption_weights.*encode_captions=first"):
        loader(place, caption_weights={"original": 1})


# ---- verify, repair, takedown


def planted(shard: Path, place: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """Latents of a run whose rows were changed by ``fault``, with the right hashes."""
    plain = TextRows._joined
    with monkeypatch.context() as patch:
        patch.setattr(TextRows, "_joined", lambda self, row, states: fault(plain(self, row, states)))
        run_stage("precompute", input=str(shard), output=str(place), text_storage="ragged", **SETTINGS)


def neighbours() -> Any:
    """States of the sample before, of all captions, with its numbers of tokens."""
    before: list[dict[str, Any]] = []

    def fault(row: dict[str, Any]) -> dict[str, Any]:
        states = {name: row[name] for name in ("caption_latents", "caption_tokens")}
        last = before[-1] if before else states
        before.append({**states, "count": len(row["captions"])})
        return {**row, **{name: last[name] for name in states}} if last.get("count") == len(row["captions"]) else row

    return fault


def turned(row: dict[str, Any]) -> dict[str, Any]:
    """A sample's captions in another order than their states."""
    return {**row, "captions": row["captions"][:1] + row["captions"][:0:-1]}


def swapped_sources(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "caption_sources": row["caption_sources"][::-1]}


def fewer(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "caption_tokens": row["caption_tokens"][:-2] + b"\x01\x00"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (neighbours(), "tokens, its caption has|text states of caption"),
        (turned, "tokens, its caption has|other captions than its source"),
        (swapped_sources, "other captions than its source"),
        (fewer, "are not those of"),
    ],
    ids=["neighbours", "turned", "swapped sources", "fewer tokens"],
)
def test_verify_finds_captions_that_are_not_the_sample_s_and_repair_mends_them(
    shard: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, message: str
) -> None:
    import re

    place = tmp_path / "latents"
    planted(shard, place, monkeypatch, fault)
    findings = list(findings_of(place, deep=True)[1])
    assert findings and all(re.search(message, finding.what) for finding in findings)
    assert all(finding.inside for finding in findings)
    repair(place, Rank(), deep=True)
    assert list(findings_of(place, deep=True)[1]) == []


def test_sound_latents_have_no_findings(latents: Path) -> None:
    assert list(findings_of(latents, deep=True)[1]) == []


def test_a_takedown_keeps_the_others_captions(shard: Path, latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "line/latents")
    before = {row["key"]: row for row in rows(latents)}
    gone = list(before)[3]
    (tmp_path / "keys.txt").write_text(f"{gone}\n")
    takedown(tmp_path / "line", tmp_path / "keys.txt", Rank())
    left = RandomAccess(Dataset.open(tmp_path / "line/latents")).rows(range(COUNT - 1))
    assert {row["key"]: row for row in left} == {key: row for key, row in before.items() if key != gone}
