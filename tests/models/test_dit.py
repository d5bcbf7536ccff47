"""The diffusion transformer and the sampler: shapes, what conditions it, and that flow matching leads to the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.models.dit import SIZES, DiT, DiTConfig, dit_config, patchify, time_embedding, unpatchify
from pipeline.models.sampling import sample

SMALL = DiTConfig(4, 8, 6, 5, 7, dim=16, depth=2, heads=2)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(3, 4, 8, 6), "t": torch.rand(3), "text": torch.randn(3, 5, 7)}


def trained() -> DiT:
    """A model that does not answer zero, as a fresh one does."""
    torch.manual_seed(1)
    model = DiT(SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_the_velocity_has_the_shape_of_the_latents(inputs: dict[str, Tensor]) -> None:
    assert trained()(**inputs).shape == (3, 4, 8, 6)


def test_a_fresh_model_answers_zero_and_all_of_it_learns(inputs: dict[str, Tensor]) -> None:
    model = DiT(SMALL)
    assert model(**inputs).abs().max() == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):  # gates and the output are zero at first: gradients reach all parts after a few steps
        optimizer.zero_grad()
        drop = torch.tensor([True, False, False])
        (model(**inputs, drop=drop) - inputs["x"]).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("name", ["x", "t", "text"])
def test_every_input_matters(name: str, inputs: dict[str, Tensor]) -> None:
    model = trained()
    before = model(**inputs)
    inputs[name] = inputs[name].flip(0)
    assert not torch.allclose(model(**inputs), before)


def test_the_order_of_words_matters(inputs: dict[str, Tensor]) -> None:
    model = trained()
    turned = {**inputs, "text": inputs["text"].flip(1)}
    assert not torch.allclose(model(**inputs), model(**turned))


def test_a_dropped_text_does_not_matter_and_only_where_it_is_dropped(inputs: dict[str, Tensor]) -> None:
    model = trained()
    drop = torch.tensor([True, False, True])
    before = model(**inputs, drop=drop)
    inputs["text"] = torch.randn(3, 5, 7)
    after = model(**inputs, drop=drop)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


def test_samples_of_a_batch_do_not_see_each_other(inputs: dict[str, Tensor]) -> None:
    model = trained()
    alone = model(**{name: tensor[1:2] for name, tensor in inputs.items()})
    torch.testing.assert_close(model(**inputs)[1:2], alone)


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_go_back_where_they_came_from(patch: int) -> None:
    x = torch.randn(2, 3, 8, 6)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 48 // patch**2, 3 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, (8 // patch, 6 // patch)), x)


def test_times_are_told_apart() -> None:
    embedded = time_embedding(torch.linspace(0, 1, 50), 32)
    distances = torch.cdist(embedded, embedded) + torch.eye(50)
    assert distances.min() > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_a_config_says_how_to_build_the_model_again(size: str) -> None:
    config = dit_config(size, (16, 8, 8), (16, 64))
    assert DiTConfig(**config.to_dict()) == config


def test_the_smallest_is_small() -> None:
    assert sum(p.numel() for p in DiT(dit_config("nano", (16, 8, 8), (16, 64))).parameters()) < 2e6


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="model=nan: did you mean nano"):
        dit_config("nan", (4, 8, 8), (16, 64))
    with pytest.raises(ConfigError, match="latents of 7 x 8 do not divide into patches of 2"):
        dit_config("nano", (4, 7, 8), (16, 64))


class Exact(nn.Module):
    """The true velocity where the data are one point for each text: (x_t - data) / t."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, drop: Tensor | None = None) -> Tensor:
        data = text[:, 0, 0, None, None, None]
        if drop is not None:
            data = torch.where(drop[:, None, None, None], 0.0, data)
        return (x - data) / t[:, None, None, None]


def test_sampling_with_the_true_velocity_leads_to_the_data() -> None:
    noise, text = torch.randn(2, 1, 2, 2), torch.tensor([3.0, -1.0]).view(2, 1, 1)
    for steps in (1, 7):
        assert sample(Exact(), noise, text, steps)[:, 0, 0, 0].tolist() == pytest.approx([3, -1], abs=1e-5)


def test_guidance_goes_beyond_the_text() -> None:
    noise, text = torch.randn(2, 1, 2, 2), torch.tensor([3.0, -1.0]).view(2, 1, 1)
    far = sample(Exact(), noise, text, 5, guidance=2.0)  # without text the data are 0: twice as far from there
    assert far[:, 0, 0, 0].tolist() == pytest.approx([6, -2], abs=1e-4)
    plain = sample(Exact(), noise, text, 5)
    torch.testing.assert_close(sample(Exact(), noise, text, 5, guidance=1.0 + 1e-7), plain, atol=1e-4, rtol=0)
