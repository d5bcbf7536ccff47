"""The diffusion transformer and the sampler: shapes, what conditions it, and that flow matching leads to the data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import ConfigError
from pipeline.models.dit import (
    SIZES,
    DiT,
    DiTConfig,
    Experts,
    dit_config,
    kept_tokens,
    patchify,
    take,
    time_embedding,
    unpatchify,
)
from pipeline.models.sampling import sample

SMALL = DiTConfig(4, 8, 6, 5, 7, dim=16, depth=2, heads=2)
MICRO = DiTConfig(
    4,
    8,
    6,
    5,
    7,
    dim=16,
    depth=4,
    heads=2,
    first_mlp_ratio=0.5,
    first_qkv_ratio=0.5,
    mixer_dim=24,
    mixer_depth=2,
    experts=4,
    text="attention",
    local=True,
    qk_norm=True,
    gated=True,
    bias=False,
)
SCANS = replace(SMALL, attention_every=2, depth=3)
KINDS = pytest.mark.parametrize("kind", [SMALL, MICRO, SCANS], ids=["small", "micro", "scans"])


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(3, 4, 8, 6), "t": torch.rand(3), "text": torch.randn(3, 5, 7)}


def trained(kind: DiTConfig = SMALL) -> DiT:
    """A model that does not answer zero, as a fresh one does."""
    torch.manual_seed(1)
    model = DiT(kind)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@KINDS
def test_the_velocity_has_the_shape_of_the_latents(inputs: dict[str, Tensor], kind: DiTConfig) -> None:
    assert trained(kind)(**inputs).shape == (3, 4, 8, 6)


@KINDS
def test_a_fresh_model_answers_zero_and_all_of_it_learns(inputs: dict[str, Tensor], kind: DiTConfig) -> None:
    model = DiT(kind)
    assert model(**inputs).abs().max() == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):  # gates and the output are zero at first: gradients reach all parts after a few steps
        optimizer.zero_grad()
        drop = torch.tensor([True, False, False])
        (model(**inputs, drop=drop) - inputs["x"]).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@KINDS
@pytest.mark.parametrize("name", ["x", "t", "text"])
def test_every_input_matters(name: str, inputs: dict[str, Tensor], kind: DiTConfig) -> None:
    model = trained(kind)
    before = model(**inputs)
    inputs[name] = inputs[name].flip(0)
    assert not torch.allclose(model(**inputs), before)


def test_the_order_of_words_matters(inputs: dict[str, Tensor]) -> None:
    model = trained()
    turned = {**inputs, "text": inputs["text"].flip(1)}
    assert not torch.allclose(model(**inputs), model(**turned))


@KINDS
def test_a_dropped_text_does_not_matter_and_only_where_it_is_dropped(
    inputs: dict[str, Tensor], kind: DiTConfig
) -> None:
    model = trained(kind)
    drop = torch.tensor([True, False, True])
    before = model(**inputs, drop=drop)
    inputs["text"] = torch.randn(3, 5, 7)
    after = model(**inputs, drop=drop)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


@KINDS
def test_samples_of_a_batch_do_not_see_each_other(inputs: dict[str, Tensor], kind: DiTConfig) -> None:
    model = trained(kind)
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


@KINDS
def test_keeping_all_tokens_is_masking_none(inputs: dict[str, Tensor], kind: DiTConfig) -> None:
    model = trained(kind)
    every = torch.arange(kind.tokens).expand(3, -1)
    torch.testing.assert_close(model(**inputs, keep=every), patchify(model(**inputs), kind.patch), atol=1e-5, rtol=1e-4)


@KINDS
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_backbone_sees_the_rest_of_what_is_masked(inputs: dict[str, Tensor], kind: DiTConfig, ratio: float) -> None:
    model = trained(kind)
    kept = kept_tokens(kind.tokens, ratio)
    assert kept == kind.tokens * (1 - ratio)
    seen: list[int] = []
    mixed: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    for block in model.mixer.blocks if model.mixer else ():
        block.register_forward_hook(lambda module, given, out: mixed.append(given[0].shape[1]))
    keep = torch.stack([torch.randperm(kind.tokens)[:kept].sort().values for _ in range(3)])
    assert model(**inputs, keep=keep).shape == (3, kept, 16)
    assert set(seen) == {kept} and set(mixed) <= {kind.tokens}


def test_masked_tokens_reach_the_others_through_the_mixer_alone(inputs: dict[str, Tensor]) -> None:
    keep = torch.tensor([[0, 5]]).expand(3, -1)
    other = {**inputs, "x": inputs["x"].clone()}
    other["x"][:, :, -2:, -2:] += 1.0  # the last token, which is not kept
    for kind, reaches in ((SMALL, False), (MICRO, True)):
        model = trained(kind)
        assert (model(**inputs, keep=keep) - model(**other, keep=keep)).abs().max().item() > 1e-4 or not reaches
        assert reaches or torch.equal(model(**inputs, keep=keep), model(**other, keep=keep))


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_mask_leaves_something(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mask_ratio="):
        kept_tokens(16, ratio)


@pytest.mark.parametrize(("tokens", "chosen"), [(64, 16), (16, 4), (10, 2), (3, 1), (1, 1)])
def test_each_expert_takes_exactly_its_share(tokens: int, chosen: int) -> None:
    experts = Experts(8, 12, experts=8, capacity=2.0)
    weights, places = experts.choices(torch.randn(3, tokens, 8))
    assert places.shape == weights.shape == (3, 8, chosen)
    assert all(len(set(row.tolist())) == chosen for sample in places for row in sample)  # nothing twice


def test_experts_do_what_their_formula_says() -> None:
    torch.manual_seed(0)
    experts = Experts(8, 12, experts=4, capacity=1.0)
    x = torch.randn(2, 8, 8)
    weights, places = experts.choices(x)
    expected = torch.zeros_like(x)
    for b in range(2):
        for e in range(4):
            for weight, place in zip(weights[b, e], places[b, e], strict=True):
                inner = nn.functional.gelu(x[b, place] @ experts.expand[e])
                expected[b, place] += weight * (inner @ experts.contract[e])
    torch.testing.assert_close(experts(x), expected)


def test_blocks_of_the_backbone_widen() -> None:
    with torch.device("meta"):
        model = DiT(dit_config("MicroDiT_XL_2", (4, 32, 32), (77, 1024)))
    widths = [block.attention.width for block in model.blocks]
    assert widths == sorted(widths) and widths[0] == 512 and widths[-1] == 1024
    kinds = [isinstance(block.mlp, Experts) for block in model.blocks]
    assert kinds == [number % 2 == 1 and number < 27 for number in range(28)]


def test_the_last_of_so_many_blocks_attends_and_the_others_scan() -> None:
    blocks = DiT(replace(SMALL, depth=5, attention_every=2)).blocks
    assert [block.attention is not None for block in blocks] == [False, True, False, True, False]
    assert all(block.attention is not None for block in DiT(SMALL).blocks)


@pytest.mark.parametrize(
    ("size", "shape", "text", "count"),
    [
        ("nano", (16, 8, 8), (16, 64), 1_574_656),
        ("MicroDiT_Tiny_2", (4, 32, 32), (77, 1024), 201_478_736),
        ("MicroDiT_XL_2", (4, 32, 32), (77, 1024), 1_165_951_632),
        ("MicroDiT_XL_2", (4, 64, 64), (77, 1024), 1_165_951_632),
    ],
)
def test_numbers_of_parameters(size: str, shape: tuple[int, int, int], text: tuple[int, int], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(dit_config(size, shape, text)).parameters()) == count


def test_a_finer_grid_spans_the_same_positions() -> None:
    coarse, fine = (DiT(replace(MICRO, height=n, width=n, base=4)).positions for n in (8, 16))
    torch.testing.assert_close(fine.view(8, 8, -1)[::2, ::2], coarse.view(4, 4, -1))


def test_tokens_are_taken_in_order() -> None:
    tokens = torch.arange(12.0).view(2, 3, 2)
    assert take(tokens, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


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
