"""Text to image: what is drawn for a sample does not depend on who draws it; from training to images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.distributed import Rank
from pipeline.distributed.environment import Place
from pipeline.encoders.base import autoencoder, text_encoder
from pipeline.models.diffusion_process import Flow
from pipeline.models.dit import patchify
from pipeline.sources.shapes_scene import caption, render, sample_scene
from pipeline.stages.generate import Manner, load_painter, sample_images
from pipeline.stages.report import describe_run
from pipeline.storage import Folder
from pipeline.training.feed import Chosen, part_size
from pipeline.training.loggers import forward_flops, read_log
from pipeline.training.loop import train
from pipeline.training.tasks.base import Keys
from pipeline.training.tasks.diffuse import Diffuse, LatentInfo, Normalisation, draw, posterior_sample

INFO = LatentInfo("embedded", "embedded", 32, (4, 4, 4), (16, 64), data="digest")


class Scenes:
    """Latents of drawn scenes, as the precompute stage stores them."""

    def __init__(self, count: int) -> None:
        scenes = [sample_scene(0, index) for index in range(count)]
        vae, text = autoencoder("embedded"), text_encoder("embedded")
        images = vae.encode(vae.preprocess([render(scene, 32) for scene in scenes], 32)).numpy().astype(np.float16)
        states = text.encode([caption(scene) for scene in scenes]).numpy().astype(np.float16)
        self._image, self._text = (torch.from_numpy(stored.astype(np.float32)) for stored in (images, states))

    def __len__(self) -> int:
        return len(self._image)

    def batch(self, positions: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        return {"image_latents": self._image[positions], "caption_latents": self._text[positions]}


@pytest.fixture(scope="module")
def data() -> Scenes:
    return Scenes(100)


def keys(seed: int, step: int, slots: np.ndarray) -> Keys:
    return Keys(seed, step, slots, slots, slots * 0)


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 30, "batch_size": 16, "warmup_steps": 5, "checkpoint_every": 100, **settings})


def test_normalised_latents_have_zero_mean_and_unit_mean_square(data: Scenes) -> None:
    latents = data.batch(np.arange(100))["image_latents"]
    normalisation = Normalisation.measure(latents)
    x = normalisation.apply(latents)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    assert float(x.square().mean()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(normalisation.invert(x), latents, atol=1e-4, rtol=0)


def test_constant_latents_can_be_normalised() -> None:
    assert Normalisation.measure(torch.ones(4, 2, 3, 3)).apply(torch.ones(1, 2, 3, 3)).abs().max() == 0


def test_what_is_drawn_for_a_sample_depends_on_step_and_slot_alone() -> None:
    def drawn(seed: int, step: int, slots: np.ndarray) -> list[torch.Tensor]:
        one = draw(keys(seed, step, slots), (4, 2, 2), 0.5, Flow(), tokens=16, kept=8)
        assert one.keep is not None
        return [one.levels, one.noise, one.drop, one.keep]

    together = drawn(0, 5, np.arange(8))
    for whole, first, second in zip(together, drawn(0, 5, np.arange(3)), drawn(0, 5, np.arange(3, 8)), strict=True):
        assert torch.equal(whole, torch.cat([first, second]))
    for other in (drawn(1, 5, np.arange(8)), drawn(0, 6, np.arange(8)), drawn(0, 5, np.arange(8, 16))):
        assert not torch.equal(other[1], together[1])
        assert not torch.equal(other[3], together[3])


def test_levels_lie_inside_and_captions_are_dropped_as_often_as_asked() -> None:
    drawn = draw(keys(0, 0, np.arange(3000)), (1, 1, 1), 0.1, Flow())
    assert drawn.levels.min() > 0 and drawn.levels.max() < 1 and 0.6 < float(drawn.levels.median()) < 0.73
    assert abs(float(drawn.noise.mean())) < 0.1 and abs(float(drawn.noise.std()) - 1) < 0.1
    assert 0.08 < float(drawn.drop.float().mean()) < 0.12


def test_each_token_is_kept_as_often_as_any_other() -> None:
    keep = draw(keys(0, 0, np.arange(2000)), (1, 1, 1), 0.1, Flow(), tokens=16, kept=4).keep
    assert keep is not None and keep.shape == (2000, 4)
    assert (keep.diff(dim=1) > 0).all()  # in order, none twice
    counts = torch.bincount(keep.flatten(), minlength=16)
    assert counts.min() > 400 and counts.max() < 600


@pytest.mark.parametrize("process", ["flow", "edm"])
def test_a_masked_loss_counts_the_kept_tokens_alone(data: Scenes, process: str) -> None:
    task = Diffuse(config(process=process, mask_ratio=0.5, model="nano_mixer"), data, INFO)
    batch = data.batch(np.arange(6))
    losses = task.losses(task.model, task.prepare(batch, keys(0, 0, np.arange(6))), keys(0, 0, np.arange(6)))
    drawn = draw(keys(0, 0, np.arange(6)), (4, 4, 4), 0.1, task.process, tokens=4, kept=2)
    assert drawn.keep is not None
    x = task.normalisation.apply(batch["image_latents"])
    target = patchify(task.process.target(x, drawn.noise, drawn.levels), 2)
    by_hand = [target[i, drawn.keep[i]].square().mean() for i in range(6)]  # a fresh network answers 0
    torch.testing.assert_close(losses, torch.stack(by_hand))


def test_samples_of_moments_have_their_mean_and_deviation() -> None:
    moments = torch.cat([torch.full((500, 2, 2, 2), 3.0), torch.full((500, 2, 2, 2), 0.5)], 1)
    sampled = posterior_sample(moments, keys(0, 0, np.arange(500)))
    assert sampled.shape == (500, 2, 2, 2)
    assert float(sampled.mean()) == pytest.approx(3, abs=0.05) and float(sampled.std()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(sampled[3:5], posterior_sample(moments[3:5], keys(0, 0, np.arange(3, 5))))
    assert not torch.equal(sampled, posterior_sample(moments, keys(0, 1, np.arange(500))))


def test_the_first_weights_depend_on_the_seed_alone(data: Scenes) -> None:
    first, again, other = (Diffuse(config(seed=seed), data, INFO).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_on_a_cpu_a_batch_is_taken_in_even_parts_that_fit_the_caches(data: Scenes) -> None:
    settings = config(batch_size=1200, model="nano_mixer")
    task = Diffuse(settings, data, INFO)  # 4 tokens
    assert part_size(task, settings, Rank()) == 400
    assert part_size(task, settings, Rank(Place(0, 2, 0, 2))) == 300
    assert part_size(task, replace(settings, micro_batch=7), Rank()) == 7


def test_operations_of_a_masked_step_are_counted(data: Scenes) -> None:
    def counted(mask: float) -> float:
        task = Diffuse(config(mask_ratio=mask, model="nano"), data, INFO)
        return forward_flops(task.model, task.example())

    dim, depth, tokens = 128, 4, 4
    of_tokens = depth * (24 * dim**2 + 4 * tokens * dim) * tokens + 2 * 2 * 16 * dim * tokens  # Linear, attention, ends
    of_text = 2 * (16 * 64 * 64 + 16 * 64 * 256 + 256 * dim + 2 * dim**2 + (6 * depth + 2) * dim**2)
    convolutions = 2 * 9 * dim * tokens * depth
    assert counted(0.0) == of_tokens + of_text + convolutions
    assert counted(0.5) < counted(0.0)


def train_task(settings: TrainConfig, data: Scenes, folder: Folder) -> None:
    train(Diffuse(settings, data, INFO), data, settings, Rank(), folder)


@pytest.fixture(scope="module")
def run(data: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained a little, stopped, and resumed."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("run")
    with Folder.open(path) as folder:
        train(Diffuse(config(), data, INFO), data, config(), Rank(), folder, Chosen(data, 0, 0, 64))
    return path


def test_a_checkpoint_is_all_that_drawing_needs(run: Path) -> None:
    painter = load_painter(run)
    pictures = sample_images(painter, ["a small red circle", "a large blue square"], manner=Manner(3))
    assert painter.step == 30 and painter.autoencoder.name == "embedded" and painter.text_encoder.name == "embedded"
    assert pictures.shape == (2, 32, 32, 3) and pictures.dtype == np.uint8


def test_a_picture_depends_on_its_prompt_its_place_and_the_seed_alone(run: Path) -> None:
    painter = load_painter(run)
    prompts = [f"a {size} red circle" for size in ("small", "large") for _ in range(20)]  # more than one batch
    pictures = sample_images(painter, prompts, seed=4, manner=Manner(2))
    assert np.array_equal(pictures, sample_images(painter, prompts, seed=4, manner=Manner(2)))
    assert np.abs(sample_images(painter, prompts[:3], seed=4, manner=Manner(2)).astype(int) - pictures[:3]).max() <= 1
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(sample_images(painter, prompts[:1], seed=5, manner=Manner(2))[0], pictures[0])


def test_a_run_shows_what_it_draws_at_each_evaluation(data: Scenes, tmp_path: Path) -> None:
    settings = config(steps=20, evaluate_every=10, show=3)
    with Folder.open(tmp_path) as folder:
        train(Diffuse(settings, data, INFO), data, settings, Rank(), folder, Chosen(data, 0, 0, 8))
    strips = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "shown").iterdir()}
    assert strips.keys() == {"step_000010.png", "step_000020.png", "real.png"}
    assert {strip.shape for strip in strips.values()} == {(32, 3 * 34 - 2, 3)}
    assert not np.array_equal(strips["step_000010.png"], strips["step_000020.png"])
    page = describe_run(tmp_path, price=3600.0)
    assert [shown["name"] for shown in page["shown"]] == ["step 10", "step 20", "as in the data"]
    assert page["cost"]["samples"] == 20 * 16 and page["cost"]["ranks"] == 1
    assert page["cost"]["money"] == pytest.approx(320 / page["cost"]["speed"])


def test_averaged_weights_draw(run: Path) -> None:
    from pipeline.training.checkpoint import open_checkpoint

    averaged = open_checkpoint(run).tensors["ema"]
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in load_painter(run).model.state_dict().items())


def test_the_end_of_the_log_has_the_loss_at_each_time(run: Path) -> None:
    last = read_log(run)[-1]
    assert [last[f"loss_t{quarter}"] > 0 for quarter in (1, 2, 3, 4)] == [True] * 4


def test_drawing_without_prompts_or_from_nothing_is_one_clear_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompts="):
        sample_images(load_painter(run), [])
    with pytest.raises(ConfigError, match="neither a run folder nor a checkpoint"):
        load_painter(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="this run has no checkpoint yet"):
        load_painter(tmp_path)


def test_a_run_goes_on_from_another_ones_averaged_weights(run: Path, data: Scenes) -> None:
    started = Diffuse(config(start_from=str(run)), data, INFO)
    averaged = load_painter(run)
    assert all(torch.equal(p, averaged.model.state_dict()[n]) for n, p in started.model.state_dict().items())
    assert started.normalisation == averaged.normalisation
    with pytest.raises(ConfigError, match="start_from=.*dim=128, this one 256"):
        Diffuse(config(start_from=str(run), model="tiny"), data, INFO)
    with pytest.raises(ConfigError, match="another process="):
        Diffuse(config(start_from=str(run), process="edm"), data, INFO)
