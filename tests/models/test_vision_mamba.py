"""Classifiers of every size and kind of block: shapes, sizes, and that all parameters take part."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.schema import ConfigError
from pipeline.models.vision_mamba import SIZES, Hybrid, VisionMamba, VisionMambaConfig, vision_mamba_config

MILLIONS = {"nano": 0.5, "tiny": 6.4, "small": 23.4, "base": 89.5, "large": 312.5}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_number_of_parameters_that_is_documented(size: str) -> None:
    with torch.device("meta"):
        model = VisionMamba(vision_mamba_config(size, (3, 224, 224), 1000))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[size], abs=0.06)
    assert VisionMambaConfig(**model.config.to_dict()) == model.config


@pytest.mark.parametrize("blocks", ["ssm", "attention", "hybrid", "ssm,hybrid"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("pool", ["mean", "token"])
def test_every_kind_of_model_learns_with_all_its_parameters(blocks: str, mixer: str, pool: str) -> None:
    more = {"blocks": blocks, "mixer": mixer, "pool": pool, "dim": 32, "depth": 2, "d_state": 4, "mlp_ratio": 2.0}
    model = VisionMamba(vision_mamba_config("nano", (3, 28, 28), 5, **more))
    logits = model(torch.randn(2, 3, 28, 28))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("edge", [28, 32, 64, 224])
def test_images_of_any_usual_size_are_taken(edge: int) -> None:
    model = VisionMamba(vision_mamba_config("nano", (3, edge, edge), 2, patch=4 if edge < 64 else 16, depth=1))
    assert model(torch.randn(1, 3, edge, edge)).shape == (1, 2)


def test_a_hybrid_begins_with_half_of_each_and_may_become_either() -> None:
    first, second = torch.nn.Identity(), torch.nn.Flatten(2)
    hybrid = Hybrid(torch.nn.Linear(4, 4), second, 4)
    tokens = torch.randn(2, 3, 4)
    torch.testing.assert_close(hybrid(tokens), (hybrid.first(tokens) + first(tokens)) / 2)
    torch.nn.init.constant_(hybrid.balance, 50.0)
    torch.testing.assert_close(hybrid(tokens), hybrid.first(tokens))


def test_drop_path_leaves_out_whole_samples_in_training_only() -> None:
    model = VisionMamba(vision_mamba_config("nano", (3, 8, 8), 2, depth=2, drop_path=0.5))
    block = model.blocks[1]
    tokens = torch.randn(64, 4, 64)
    left_out = (block(tokens) == tokens).flatten(1).all(1)
    assert 15 < int(left_out.sum()) < 50
    assert not (block.eval()(tokens) == tokens).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": "mamba3"}, "mixer=mamba3: did you mean mamba"),
        ({"blocks": "ssm,atention"}, "blocks=atention: did you mean attention"),
        ({"pool": "max"}, "pool=max"),
        ({"patch": 5}, "patch=5: does not divide images of 32 x 32"),
        ({"heads": 3}, "heads=3: does not divide"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionMamba(vision_mamba_config("nano", (3, 32, 32), 2, **{"blocks": "attention", **change}))
