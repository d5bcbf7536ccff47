"""Recipes and what they cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import cli
from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, CostConfig
from pipeline.stages.cost import costs, table

TINY = """
published: an afternoon on one machine
model: nano
batch_size: 100
parallel: fsdp
phases:
  masked: {resolution: 64, mask_ratio: 0.75, steps: 1000, start_from: elsewhere}
  unmasked: {resolution: 64, steps: 200, lr: 1.0e-4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(TINY)
    return str(path)


def config(recipe: str, **more: object) -> CostConfig:
    return build(CostConfig, {"recipe": recipe, **more})


def test_phases_take_the_recipe_s_settings_and_the_command_line_wins(recipe: str) -> None:
    first = cli.load("train", [f"recipe={recipe}", "phase=masked", "steps=7"])
    assert (first.model, first.mask_ratio, first.steps, first.name) == ("nano", 0.75, 7, "mine-masked")
    second = cli.load("train", [f"recipe={recipe}", "phase=unmasked"])
    assert (second.mask_ratio, second.lr, second.start_from) == (0.0, 1e-4, "mine-masked")


def test_wrong_recipes_and_phases_are_named(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe=.*phase=mask: did you mean masked"):
        cli.load("train", [f"recipe={recipe}", "phase=mask"])
    with pytest.raises(ConfigError, match="recipe=microdi: no such recipe; did you mean microdit"):
        cli.load("train", ["recipe=microdi"])
    (tmp_path / "bad.yaml").write_text("batchsize: 3")
    with pytest.raises(ConfigError, match="bad.yaml: unknown key 'batchsize'"):
        cli.load("train", [f"recipe={tmp_path / 'bad.yaml'}"])


@pytest.mark.parametrize("name", ["microdit", "microdit_tiny"])
def test_published_recipes_are_complete(name: str) -> None:
    for phase in cli.phases_of(name):
        settings = cli.load("train", [f"recipe={name}", f"phase={phase}"])
        assert settings.model.startswith("MicroDiT") and settings.process == "edm" and settings.ema_decay > 0.99
    first = cli.load("train", ["recipe=microdit", "phase=256-masked"])
    assert (first.batch_size, first.steps, first.mask_ratio, first.lr) == (2048, 250_000, 0.75, 2.4e-4)


def test_costs_follow_from_speed_and_price(recipe: str) -> None:
    given = config(recipe, images_per_second=[100, 50], gpus=2, gpu_hour_price=3.6, caption_shape=[16, 64])
    masked, full = costs(given)
    assert (masked.tokens, full.tokens) == (4, 16)
    assert masked.hours == pytest.approx(100_000 / 100 / 3600)
    assert full.money == pytest.approx(20_000 / 50 / 3600 * 3.6)
    assert masked.parameters == full.parameters and masked.flops < full.flops
    assert table([masked, full], given).endswith("published: an afternoon on one machine")
    assert "120,000" not in table([masked, full], given) and "1,200" in table([masked, full], given)


def test_fewer_gpus_hold_more_each(recipe: str) -> None:
    one, eight = (next(costs(config(recipe, phase="masked", gpus=gpus, caption_shape=[16, 64]))) for gpus in (1, 8))
    assert one.memory > eight.memory and one.speed == eight.speed
    assert one.hours == pytest.approx(eight.hours)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images_per_second": [1.0]}, "expected 2 numbers"),
        ({"mfu": 0.0}, "mfu=0.0: must be more than 0, at most 1"),
        ({"phase": "mask"}, "phase=mask: did you mean masked"),
        ({"caption_shape": [1]}, "expected 2 values"),
    ],
)
def test_wrong_settings_are_named(recipe: str, more: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(costs(replace(config(recipe), **build_some(more))))


def build_some(more: dict[str, object]) -> dict[str, object]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in more.items()}
