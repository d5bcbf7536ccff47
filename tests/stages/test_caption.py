"""From images to captions: features, training, resuming, and writing with nothing but the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stages.conftest import digests, run_stage

from pipeline.config.cli import build
from pipeline.config.schema import STAGES, CaptionConfig, ConfigError, TrainConfig
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.stages.caption import load_writer, main, write_about
from pipeline.storage import Folder
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.loggers import read_log
from pipeline.training.loop import train
from pipeline.training.tasks.base import Keys
from pipeline.training.tasks.caption import Caption

REPOSITORY = Path(__file__).parents[2]
COUNT = 48
SETTINGS: dict[str, Any] = {
    "task": "caption",
    "steps": 6,
    "batch_size": 8,
    "checkpoint_every": 4,
    "valid_fraction": 0.2,
    "max_length": 24,
    "log_every": 2,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with captions and questions, as shards and as features."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("captions")
    source = {"source": "shapes", "count": COUNT, "partition_size": 20, "questions": True}
    run_stage("download", output=str(place / "download"), **source)
    run_stage("filter", input=str(place / "download"), output=str(place / "filter"), min_image_size=64)
    run_stage("shard", input=str(place / "filter"), output=str(place / "shard"), partition_size=16)
    run_stage("features", input=str(place / "shard"), output=str(place / "features"), batch_size=10)
    return place


def training(data: Path, **settings: Any) -> tuple[Caption, Any, Any, TrainConfig]:
    upstream = data / ("shard" if settings.get("encoder") else "features")
    config = build(TrainConfig, {**SETTINGS, "input": str(upstream), **settings})
    task, train_data, valid = Caption.from_config(config, Dataset.open(upstream))
    assert isinstance(task, Caption)
    return task, train_data, valid, config


def fit(data: Path, run: Path, **settings: Any) -> dict[str, torch.Tensor]:
    task, train_data, valid, config = training(data, **settings)
    run.mkdir(exist_ok=True)
    with Folder.open(run) as folder:
        train(task, train_data, config, Rank(), folder, valid)
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    fit(data, place)
    return place


def test_features_do_not_depend_on_the_batch(data: Path, tmp_path: Path) -> None:
    run_stage("features", input=str(data / "shard"), output=str(tmp_path / "features"), batch_size=3)
    assert digests(tmp_path / "features") == digests(data / "features")


@pytest.mark.parametrize("prompt", ["none", "question"])
def test_features_and_pictures_give_the_same_loss(data: Path, prompt: str) -> None:
    losses = []
    for encoder in ("", "embedded"):
        task, train_data, _, _ = training(data, encoder=encoder, prompt=prompt, dropout=0)
        positions = np.arange(8)
        keys = Keys(0, 3, positions, positions, np.zeros(8, np.int64))
        losses.append(task.losses(task.model, task.prepare(train_data.batch(positions), keys), keys))
    assert torch.allclose(*losses, rtol=2e-3)


def test_each_epoch_takes_another_text_and_evaluation_the_first(data: Path) -> None:
    task, train_data, _, _ = training(data, prompt="question")
    positions = np.arange(4)
    batch = train_data.batch(positions)
    assert batch["tokens"].shape[:2] == (4, 4) and batch["count"].tolist() == [4] * 4

    def chosen(step: int, epoch: int) -> list[str]:
        keys = Keys(0, step, positions, positions, np.full(4, epoch))
        prepared = task.prepare(batch, keys)
        return [str(row[:start].tolist()) for row, start in zip(prepared["tokens"], prepared["start"], strict=True)]

    epochs = [chosen(1, epoch) for epoch in range(4)]
    for sample in range(4):
        assert len({epoch[sample] for epoch in epochs}) == 4
    assert chosen(1, 5) == epochs[1]
    assert chosen(-1, 0) == chosen(-1, 3)


def test_the_question_is_no_part_of_the_loss(data: Path) -> None:
    task, train_data, _, _ = training(data, prompt="question", dropout=0)
    positions = np.arange(4)
    keys = Keys(0, -1, positions, positions, np.zeros(4, np.int64))
    batch = task.prepare(train_data.batch(positions), keys)
    expected = []
    for i in range(4):
        row = batch["tokens"][i][batch["tokens"][i] != task.tokenizer.pad]
        steps = task.model(batch["features"][i : i + 1], row[None, :-1]).log_softmax(-1)[0]
        expected.append(-steps.gather(1, row[1:, None])[int(batch["start"][i]) - 1 :].mean())
    assert torch.allclose(task.losses(task.model, batch, keys), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("decoder", ["transformer", "mamba"])
def test_a_resumed_run_is_the_same_to_the_bit(data: Path, tmp_path: Path, decoder: str) -> None:
    straight = fit(data, tmp_path / "straight", decoder=decoder)
    fit(data, tmp_path / "resumed", decoder=decoder)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_000006")
    resumed = fit(data, tmp_path / "resumed", decoder=decoder)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(("decoder", "prompt"), [("transformer", "question"), ("mamba", "none")])
def test_training_on_cider_starts_from_a_run_and_resumes_to_the_bit(
    data: Path, tmp_path: Path, decoder: str, prompt: str
) -> None:
    both = {"decoder": decoder, "prompt": prompt}
    first = fit(data, tmp_path / "first", **both)
    settings = {**both, "objective": "cider", "draws": 3, "start_from": str(tmp_path / "first"), "dropout": 0}
    task, *_ = training(data, **settings)
    ema = open_checkpoint(tmp_path / "first", parts=("ema",)).tensors["ema"]
    assert all(torch.equal(weight, ema[name]) for name, weight in task.model.state_dict().items())
    straight = fit(data, tmp_path / "straight", **settings)
    assert not all(torch.equal(first[name], straight[name]) for name in first)
    fit(data, tmp_path / "resumed", **settings)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_000006")
    resumed = fit(data, tmp_path / "resumed", **settings)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    lines = [
        json.loads(line)
        for file in (tmp_path / "straight" / "logs").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert all(line["loss"] <= 0 for line in lines if "loss" in line)  # minus CIDEr-D
    for wrong, message in (
        ({"draws": 1}, "draws=1"),
        ({"model": "tiny"}, "its network has dim=128, this one 256"),
        ({"start_from": str(tmp_path)}, "neither a run folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            training(data, **{**settings, **wrong})


def test_weights_spread_over_ranks_learn_and_write_the_same(data: Path, tmp_path: Path) -> None:
    """Under FSDP: each rank has a part of the weights, and writes texts with all of them."""
    fit(data, tmp_path / "one", dropout=0)
    given = {**SETTINGS, "dropout": 0, "input": data / "features", "ranks": 2, "parallel": "fsdp", "threads": 1}
    second = {**given, "objective": "cider", "draws": 2, "steps": 2, "start_from": tmp_path / "two"}
    for name, settings in (("two", given), ("cider", second)):
        words = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "launch/submit.py", "stage=train", *words, f"output={tmp_path / name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=REPOSITORY)
        assert done.returncode == 0, done.stdout + done.stderr
    logs = {name: list(read_log(tmp_path / name)) for name in ("one", "two", "cider")}
    for number in ("loss", "valid_loss", "cider"):
        found = {name: [line[number] for line in log if number in line] for name, log in logs.items()}
        assert found["two"] == pytest.approx(found["one"], rel=1e-3, abs=1e-3) and found["one"]
        assert np.isfinite(found["cider"]).all() and found["cider"]


def test_validation_tells_the_scores(run: Path) -> None:
    lines = [json.loads(line) for file in (run / "logs").glob("*.jsonl") for line in file.read_text().splitlines()]
    measured = [line for line in lines if "valid_loss" in line]
    assert measured
    for line in measured:
        assert {"exact", "rouge_l", "cider", "bleu_1", "bleu_4"} <= set(line)
        assert not any(name.startswith("matches") for name in line)


def test_the_export_alone_writes_in_a_fresh_process(data: Path, run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "export", alone)
    command = [sys.executable, "-m", "pipeline.stages.caption", f"image_path={data / 'shard'}"]
    command += [f"checkpoint={alone}", f"output={tmp_path / 'out'}", "batch_size=20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == COUNT
    assert "cider" in done.stdout and "meteor is skipped" in done.stdout
    rows = RandomAccess(Dataset.open(data / "shard")).rows(range(COUNT))
    assert [(line["image"], line["references"]) for line in lines] == [(row["key"], row["captions"]) for row in rows]
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert page.count('<figure class="entry"') == COUNT
    theirs, ours = load_writer(alone), load_writer(run)
    assert all(torch.equal(a, b) for a, b in zip(theirs.model.parameters(), ours.model.parameters(), strict=True))


def test_a_data_set_gets_a_column(data: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = {"input": str(data / "shard"), "checkpoint": str(run), "batch_size": 7}
    run_stage("caption", output=str(tmp_path / "captioned"), **settings)
    dataset = Dataset.open(tmp_path / "captioned")
    rows = RandomAccess(dataset).rows(range(COUNT))
    before = RandomAccess(Dataset.open(data / "shard")).rows(range(COUNT))
    assert [{**row, "generated": None} for row in rows] == [{**row, "generated": None} for row in before]
    config = build(CaptionConfig, {**settings, "image_path": str(data / "shard"), "output": str(tmp_path / "page")})
    _, lines, _ = write_about(config, torch.device("cpu"))
    assert [row["generated"] for row in rows] == [line["caption"] for line in lines]
    with pytest.raises(ConfigError, match="column=caption"):
        run_stage("caption", output=str(tmp_path / "again"), **settings, column="caption")


def test_questions_of_a_data_set_are_answered(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without Java
    fit(data, tmp_path / "run", prompt="question", steps=2)
    given = {"checkpoint": str(tmp_path / "run"), "output": str(tmp_path / "out"), "image_path": str(data / "shard")}
    _, lines, scores = write_about(build(CaptionConfig, given), torch.device("cpu"))
    rows = RandomAccess(Dataset.open(data / "shard")).rows(range(COUNT))
    asked = [(row["key"], question, [answer]) for row in rows for question, answer in row["questions"]]
    assert [(line["image"], line["question"], line["references"]) for line in lines] == asked
    assert 0 <= scores["exact"] <= 1
    _, one, _ = write_about(build(CaptionConfig, {**given, "question": asked[0][1]}), torch.device("cpu"))
    assert [line["caption"] for line in one][:1] == [line["caption"] for line in lines][:1]
    assert "references" not in one[0]
    picture = tmp_path / "a.jpg"
    picture.write_bytes(rows[0]["jpg"])
    with pytest.raises(ConfigError, match="question=: this run answers questions"):
        write_about(build(CaptionConfig, {**given, "image_path": str(picture)}), torch.device("cpu"))


def test_without_an_output_captions_are_printed_and_nothing_is_written(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = RandomAccess(Dataset.open(data / "shard")).rows([0, 1])
    (tmp_path / "in").mkdir()
    for name, row in zip("ab", rows, strict=True):
        (tmp_path / f"in/{name}.png").write_bytes(row["jpg"])
    monkeypatch.chdir(tmp_path)
    given = {"checkpoint": str(run), "threads": 1}
    assert main(build(CaptionConfig, {**given, "image_path": "in"})) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("\t")[0] for line in lines] == ["a.png", "b.png"]
    assert main(build(CaptionConfig, {**given, "image_path": "in/a.png"})) == 0
    assert capsys.readouterr().out.splitlines() == [lines[0].partition("\t")[2]]
    (tmp_path / "in/c.png").write_bytes(b"no image")
    assert main(build(CaptionConfig, {**given, "image_path": "in"})) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == lines and said.err.startswith("c.png: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_pictures_of_a_folder_and_those_that_are_none(data: Path, run: Path, tmp_path: Path) -> None:
    row = RandomAccess(Dataset.open(data / "shard")).rows([0])[0]
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.png").write_bytes(row["jpg"])
    (tmp_path / "in" / "b.jpg").write_bytes(b"<html>no image</html>")

    def about(path: Path, **settings: Any) -> list[dict[str, Any]]:
        given = {"image_path": str(path), "checkpoint": str(run), "output": str(tmp_path / "out"), **settings}
        return write_about(build(CaptionConfig, given), torch.device("cpu"))[1]

    broken, good = about(tmp_path / "in")
    assert (broken["image"], good["image"]) == ("b.jpg", "deep/a.png")
    assert broken["error"] and "error" not in good
    assert about(tmp_path / "in" / "deep" / "a.png")[0]["caption"] == good["caption"]
    for wrong, message in (
        ({"image_path": str(tmp_path / "nothing")}, "no such file"),
        ({"checkpoint": str(tmp_path / "nothing")}, "no such training run"),
        ({"question": "what?"}, "writes captions"),
        ({"max_length": 99}, "max_length=99"),
        ({"beams": 0}, "beams=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            about(tmp_path / "in", **wrong)


def test_stages_say_what_is_missing(data: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match="encoder=vut:x"):
        run_stage("features", input=str(data / "shard"), output=str(data / "no"), encoder="vut:x")
    with pytest.raises(ConfigError, match="has no column features"):
        Caption.from_config(build(TrainConfig, SETTINGS), Dataset.open(data / "shard"))
    assert set(STAGES) >= {"features", "caption", "feidegger"}


def test_encoders_of_transformers_are_those_of_direct_calls(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from pipeline.encoders.vision import vision_encoder

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    small = {**sizes, "image_size": 32, "patch_size": 16}
    makers: dict[str, Callable[[], Any]] = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**small)),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**small)),
    }
    processors = {
        "vit": transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        "clip": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    }
    coarse = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)) for i in range(3)]
    pictures = [np.asarray(one.resize((50 + i, 40), Image.Resampling.BICUBIC)) for i, one in enumerate(coarse)]
    for kind, make in makers.items():
        place = tmp_path / kind
        torch.manual_seed(0)
        model = make().eval()
        model.save_pretrained(place)
        processors[kind].save_pretrained(place)
        pixels = processors[kind](images=pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = model(pixels)
        encoder = vision_encoder(f"{kind}:{place}")
        assert (encoder.tokens, encoder.width) == (5, 16)
        torch.testing.assert_close(encoder.preprocess(pictures), pixels, atol=2.01 / 255 / 0.26, rtol=0)
        assert torch.allclose(encoder.encode(pixels), expected.last_hidden_state, atol=1e-6)
        pooled = vision_encoder(f"{kind}:{place}", "pooled").encode(pixels)
        chosen = expected.pooler_output if kind == "clip" else expected.last_hidden_state[:, 0]
        assert torch.allclose(pooled[:, 0], chosen, atol=1e-6)
        assert encoder.describe()["weights"] and encoder.describe()["preprocessing"]["mean"]


def test_any_network_can_be_the_encoder(data: Path, tmp_path: Path) -> None:
    from pipeline.encoders.preprocessing import Preprocessing
    from pipeline.encoders.vision import save_program, vision_encoder

    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 8, 8), torch.nn.BatchNorm2d(6), torch.nn.Dropout(0.5), torch.nn.Flatten(2)
    )
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), squash=True)
    file = tmp_path / "encoder.pt2"
    save_program(network, file, 32, preprocessing)
    encoder = vision_encoder(f"program:{file}")
    pictures = [np.random.default_rng(i).integers(0, 256, (40, 50 + i, 3), np.uint8) for i in range(3)]
    expected = network(preprocessing(pictures, 32, "cpu"))
    assert (encoder.tokens, encoder.width) == (6, 16)
    for some in (slice(0, 3), slice(0, 1)):
        assert torch.allclose(encoder.encode(encoder.preprocess(pictures[some])), expected[some], atol=1e-6)
    pooled = vision_encoder(f"program:{file}", "pooled")
    assert torch.allclose(pooled.encode(pooled.preprocess(pictures)), expected.mean(1, keepdim=True), atol=1e-6)
    assert encoder.describe()["weights"] != "" and encoder.describe()["preprocessing"]["resolution"] == 32
    run_stage("features", input=str(data / "shard"), output=str(tmp_path / "features"), encoder=f"program:{file}")
    assert Dataset.open(tmp_path / "features").header["extra"]["shapes"]["features"] == [6, 16]
    (tmp_path / "no.pt2").write_bytes(b"no program")
    for wrong in ("no.pt2", "nothing.pt2"):
        with pytest.raises(ConfigError, match=f"{wrong}: cannot be loaded"):
            vision_encoder(f"program:{tmp_path / wrong}")


def test_a_run_writes_captions_beside_those_that_samples_have(data: Path, run: Path, tmp_path: Path) -> None:
    settings = {"captioner": f"checkpoint:{run}", "max_tokens": 12, "batch_size": 5, "without_caption": "keep"}
    from fake_stage import assert_sound, run_ranks

    from pipeline.stages.recaption import Recaption

    for world in (1, 2):
        run_ranks(tmp_path / str(world), Recaption, world, input=str(data / "filter"), **settings)
        assert_sound(tmp_path / str(world))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    before = {row["key"]: row for row in RandomAccess(Dataset.open(data / "filter")).rows(range(COUNT))}
    for row in RandomAccess(Dataset.open(tmp_path / "1")).rows(range(COUNT)):
        old = before[row["key"]]["captions"]
        assert row["captions"][len(row["captions"]) - len(old) :] == old
    drawn = run_stage(
        "recaption",
        input=str(data / "filter"),
        output=str(tmp_path / "drawn"),
        temperature=1.0,
        captions_per_prompt=2,
        **settings,
    )
    assert drawn["counts"]["kept"] == COUNT
    pairs = [
        [entry["caption"] for entry in row["recaptions"]]
        for row in RandomAccess(Dataset.open(tmp_path / "drawn")).rows(range(COUNT))
    ]
    assert any(len(set(pair)) == 2 for pair in pairs)


def test_a_run_that_takes_no_prompt_refuses_one(data: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no prompt"):
        run_stage(
            "recaption",
            input=str(data / "filter"),
            output=str(tmp_path / "out"),
            captioner=f"checkpoint:{run}",
            caption_prompt=("What is it?",),
        )
