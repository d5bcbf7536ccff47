"""Training and drawing with images of several shapes: positions, masks, sizes, samples, resumption."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latents.test_buckets import COUNT, rows_of, scenes, sound
from PIL import Image
from stages.conftest import run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, EvaluateConfig, TrainConfig
from pipeline.loading.latent_folder import LatentFolder
from pipeline.loading.latents import TrainingLatents
from pipeline.models.dit import DiT, DiTConfig
from pipeline.partitions.dataset import Dataset
from pipeline.stages import evaluate, generate
from pipeline.stages.train import main as train
from pipeline.stages.train import task_and_data
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.feed import bucket_starts, shape_ranges, some, split
from pipeline.training.loggers import read_log
from pipeline.training.mixture import Mixed
from pipeline.training.parallel import blocks_of, compile_blocks
from pipeline.training.tasks.base import Keys
from pipeline.training.tasks.diffuse import Normalisation, _of_all_shapes

__all__ = ["scenes", "sound"]  # fixtures
SMALL = DiTConfig(4, 8, 8, 5, 7, dim=16, depth=2, heads=2)
MIXED = replace(SMALL, depth=4, mixer_dim=16, mixer_depth=1, experts=2, text="attention", base=16, attention_every=2)
GRIDS = [(8, 8), (6, 10), (10, 6), (4, 16), (2, 2)]


def trained(config: DiTConfig) -> DiT:
    """A model that does not answer zero, as a fresh one does."""
    torch.manual_seed(1)
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(3, 4, height, width), torch.rand(3), torch.randn(3, 5, 7)


# ---- the network


@pytest.mark.parametrize("base", [0, 16])
def test_positions_of_the_configured_grid_stay_and_others_share_its_middle(base: int) -> None:
    model = DiT(replace(SMALL, height=16, width=16, base=base))
    own = model.positions_of((8, 8))
    assert own is model.positions
    inner = model.positions_of((4, 6)).view(4, 6, -1)
    assert torch.allclose(inner, own.view(8, 8, -1)[2:6, 1:7])
    wider = model.positions_of((8, 12)).view(8, 12, -1)
    assert torch.allclose(wider[:, 2:10], own.view(8, 8, -1), atol=1e-6)
    assert model.positions_of((8, 12)) is model.positions_of((8, 12))


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["small", "mixed"])
@pytest.mark.parametrize("grid", GRIDS)
def test_any_shape_comes_back_and_all_tokens_kept_is_no_mask(config: DiTConfig, grid: tuple[int, int]) -> None:
    model = trained(config)
    x, t, text = inputs(*grid)
    out = model(x, t, text)
    assert out.shape == x.shape and out.std() > 1e-3
    tokens = grid[0] * grid[1] // 4
    everything = torch.arange(tokens).repeat(3, 1)
    from pipeline.models.dit import patchify

    assert torch.allclose(model(x, t, text, None, everything), patchify(out, 2), atol=1e-4)
    if tokens > 1:
        assert model(x, t, text, None, everything[:, : tokens // 2]).shape == (3, tokens // 2, 16)


def test_height_and_width_are_told_apart() -> None:
    model = trained(SMALL)
    x, t, text = inputs(6, 10)
    turned = model(x.transpose(2, 3), t, text).transpose(2, 3)
    assert (turned - model(x, t, text)).abs().max() > 1e-2


def test_sizes_begin_without_influence_and_are_required() -> None:
    torch.manual_seed(0)
    plain = DiT(SMALL)
    torch.manual_seed(0)
    told = DiT(replace(SMALL, size_condition=True))
    assert all(torch.equal(value, told.state_dict()[name]) for name, value in plain.state_dict().items())
    x, t, text = inputs(6, 10)
    with pytest.raises(ValueError, match="it needs sizes"):
        told(x, t, text)
    network = trained(replace(SMALL, size_condition=True))
    one = torch.tensor([[600.0, 1000.0, 0.0, 3.0, 48.0, 80.0]])
    assert torch.allclose(network(x, t, text, sizes=one), network(x, t, text, sizes=one.repeat(3, 1)), atol=1e-6)
    other = one.clone()
    other[0, 3] = 40.0
    assert (network(x, t, text, sizes=one) - network(x, t, text, sizes=other)).abs().max() > 1e-4


@pytest.mark.parametrize("masked", [False, True])
def test_all_shapes_share_a_few_graphs(masked: bool) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    model = DiT(replace(SMALL, text="attention"))
    compile_blocks(model, backend=backend, fullgraph=True)
    counts = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for grid in [(8, 8), (6, 10), (10, 6), (4, 12), (12, 4), (8, 8), (14, 4), (6, 8), (8, 6), (4, 14)]:
            x, t, text = inputs(*grid)
            tokens = grid[0] * grid[1] // 4
            keep = torch.arange(tokens // 2).repeat(3, 1) if masked else None
            model(x, t, text, None, keep).sum().backward()
            counts.append(len(graphs))
    kinds = len(blocks_of(model))
    assert counts[-1] == counts[3] and counts[-1] <= 4 * kinds, counts


# ---- the samples


def latents_of(place: Path) -> TrainingLatents:
    return TrainingLatents(LatentFolder(place), 64)


def keys_in(data: Any, known: dict[bytes, str]) -> list[str]:
    """Keys of all samples, read batch by batch of one shape."""
    batches = [
        data.batch(np.array(samples)[at : at + 5]) for samples in shape_ranges(data) for at in range(0, len(samples), 5)
    ]
    return [known[x.numpy().astype(np.float16).tobytes()] for batch in batches for x in batch["image_latents"]]


def test_validation_takes_its_share_of_every_bucket(sound: Path) -> None:
    data, known = latents_of(sound), {row["latents_64"]: row["key"] for row in rows_of(sound)}
    shapes = {row["key"]: (row["height_64"], row["width_64"]) for row in rows_of(sound)}
    training, valid = split(data, 0.2, 3)
    first, second = keys_in(training, known), keys_in(valid, known)
    assert sorted(first + second) == sorted(known.values())
    counts, kept = Counter(shapes.values()), Counter(shapes[key] for key in second)
    assert kept == {shape: round(count * 0.2) for shape, count in counts.items()}
    few = keys_in(some(data, 10, 0), known)
    assert {shapes[key] for key in few} == set(counts) and 9 <= len(few) <= 12
    assert len(set(few)) == len(few)


def test_folders_in_buckets_are_mixed_by_weight(sound: Path) -> None:
    data, known = latents_of(sound), {row["latents_64"]: row["key"] for row in rows_of(sound)}
    mixture = Mixed([(data, 1.0), (latents_of(sound), 2.0)], 0)
    assert len(mixture) == 3 * COUNT == bucket_starts(mixture)[-1]
    assert set(Counter(keys_in(mixture, known)).values()) == {3}


def test_the_normalisation_is_that_of_all_shapes() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(5, 4, 8, 8) + 2, torch.randn(7, 4, 6, 10) * 3]
    values = [part.transpose(0, 1).flatten(1) for part in parts]
    exact = torch.cat(values, 1)
    found = Normalisation.measure(_of_all_shapes(parts))
    assert np.allclose(found.mean, exact.mean(1), atol=1e-5)
    assert found.scale == pytest.approx(float((exact - exact.mean(1, keepdim=True)).square().mean().sqrt()), abs=1e-5)


# ---- a run


def settings(sound: Path, run: Path, **more: Any) -> dict[str, Any]:
    given = {"task": "diffuse", "input": str(sound), "output": str(run), "resolution": 64, "threads": 1}
    return {**given, "steps": 8, "batch_size": 8, "warmup_steps": 0, "schedule": "constant", **more}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(run).tensors["ema"])


@pytest.mark.parametrize(
    "more",
    [{}, {"mask_ratio": 0.5, "size_condition": True, "micro_batch": 3}],
    ids=["plain", "masked"],
)
def test_a_run_on_buckets_goes_on_as_if_it_had_never_stopped(sound: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    train(build(TrainConfig, settings(sound, tmp_path / "whole", **more)))
    train(build(TrainConfig, settings(sound, tmp_path / "parts", **more, steps=4)))
    config = build(TrainConfig, settings(sound, tmp_path / "parts", **more))
    train(config)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    facts = open_checkpoint(tmp_path / "parts").facts
    assert sum(facts["sampler"]["taken"]) == 64 and facts["latents"]["buckets"]["step"] == 16


_RANK = """
import json, sys, warnings
from pathlib import Path
import torch
from pipeline.config.cli import config_for
from pipeline.stages.train import main
from pipeline.training.tasks.diffuse import Diffuse

warnings.simplefilter("ignore")
torch.set_num_threads(1)
file, prepare = Path(sys.argv.pop(1)).open("w"), Diffuse.prepare

def noted(self, batch, keys):
    if keys.step >= 0:
        shape = list(batch["image_latents"].shape[1:])
        print(json.dumps([keys.step, shape, keys.slots.tolist(), keys.positions.tolist()]), file=file, flush=True)
    return prepare(self, batch, keys)

Diffuse.prepare = noted
main(config_for("train"))
"""


def run_of_ranks(place: Path, ranks: int, settings: dict[str, Any]) -> list[list[list[Any]]]:
    """A run on CPUs, with gloo; of each rank its batches: step, shape, places in the global batch, positions."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given, lives = [f"{name}={value}" for name, value in settings.items()], []
    for rank in range(ranks):
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        of_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in of_rank.items()}}
        command = [sys.executable, "-c", _RANK, str(place / f"rank{rank}"), *given]
        lives.append(subprocess.Popen(command, env=environment))
    assert [life.wait(timeout=240) for life in lives] == [0] * ranks
    return [[json.loads(line) for line in (place / f"rank{rank}").read_text().splitlines()] for rank in range(ranks)]


def test_ranks_have_one_shape_in_a_step_and_train_as_one_rank_does(sound: Path, tmp_path: Path) -> None:
    given = settings(sound, tmp_path / "one", parallel="ddp", log_every=1, model="nano")
    (alone,) = run_of_ranks(tmp_path, 1, given)
    ranks = run_of_ranks(tmp_path, 2, {**given, "output": tmp_path / "two"})
    shapes = [[(step, shape) for step, shape, _, _ in batches] for batches in (alone, *ranks)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert len({str(shape) for _, shape in shapes[0]}) > 2
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert [slot for part in parts for slot in part[2]] == whole[2]
        assert [position for part in parts for position in part[3]] == whole[3]
        assert all(part[2] for part in parts)
    losses = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pictures_of_any_size_are_drawn_and_judged(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    more = {"size_condition": True, "show": 4, "evaluate_every": 4}
    train(build(TrainConfig, settings(sound, run, **more)))
    shown = np.asarray(Image.open(run / "shown" / "step_000008.png"))
    assert shown.shape[0] >= 80
    prompts = ["a small red circle", "a large blue square", "a small green triangle"]
    given = {"checkpoint": str(run), "prompts": prompts, "steps": 2, "threads": 1, "batch_size": 2}
    sizes = ["48x80", "48x80", "96x64"]
    run_stage("generate", **given, output=str(tmp_path / "drawn"), sizes=sizes)
    rows = [stored.read() for stored in Dataset.open(tmp_path / "drawn").samples(0)]
    drawn = [np.asarray(Image.open(BytesIO(row["jpg"]))) for row in rows]
    assert [picture.shape for picture in drawn] == [(48, 80, 3), (48, 80, 3), (96, 64, 3)]
    painter = generate.load_painter(run)
    alone = generate.sample_images(painter, prompts[:2], 0, generate.Manner(2), (48, 80))
    assert np.abs(alone.astype(int) - np.stack(drawn[:2])).max() <= 1
    assert generate.sample_images(painter, prompts, manner=generate.Manner(2)).shape == (3, 64, 64, 3)
    monkeypatch.setattr(evaluate, "_RENDERS", 8)
    monkeypatch.setattr(evaluate, "_PROMPTS", 4)
    result = evaluate.evaluate_shapes(build(EvaluateConfig, {"metric": "shapes", "size": [64, 96], "steps": 1}), run)
    scores = {score["name"]: (score["right"], score["of"]) for score in result["scores"]}
    assert result["size"] == [64, 96] and scores["judge: real renders"] == (8, 8)
    assert scores["judge: decoded latents of real renders"][1] == 4
    with pytest.raises(ConfigError, match="size=50x80: height and width must be multiples of 16"):
        evaluate.evaluate_shapes(build(EvaluateConfig, {"metric": "shapes", "size": [50, 80]}), run)
    with pytest.raises(ConfigError, match="size=50x80: height and width must be multiples of 16"):
        generate.sample_images(painter, prompts, size=(50, 80))
    with pytest.raises(ConfigError, match="sizes=: 2 for 3 prompts"):
        run_stage("generate", **given, output=str(tmp_path / "two"), sizes=sizes[:2])
    with pytest.raises(ConfigError, match="sizes=48: expected height x width"):
        run_stage("generate", **given, output=str(tmp_path / "odd"), sizes=["48"])


def test_a_step_masks_the_same_part_of_every_shape(sound: Path) -> None:
    config = build(TrainConfig, settings(sound, sound, mask_ratio=0.5))
    task, data, _ = task_and_data(config, Dataset.open(sound))
    for samples in shape_ranges(data):
        positions = np.array(samples)[:3]
        keys = Keys(0, 1, np.arange(3), positions, np.zeros(3, np.int64))
        batch = task.prepare(data.batch(positions), keys)
        height, width = batch["x"].shape[2:]
        assert batch["keep"].shape == (3, round(height * width / 4 * 0.5))
        assert batch["keep"].max() < height * width / 4
        assert torch.isfinite(task.losses(task.model, batch, keys)).all()
