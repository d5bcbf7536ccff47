"""Packed text states: half the size, and near enough to what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.loading.text_storage import (
    cosine_error,
    cut,
    is_dedup,
    is_ragged,
    kind_of,
    pack,
    size_of,
    spread,
    token_bytes,
    unpack,
)


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    """Like those of CLIP: normal, with a few channels that are loud in every token."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(4, 77, 1024, generator=random)
    values[:, :, [13, 500]] *= 25
    values[0, 10:] = 0
    return values


def test_dense_is_exact_in_half_precision(states: torch.Tensor) -> None:
    packed = pack(states, "dense", "float16")
    assert packed.shape == (4, size_of((77, 1024), "dense", "float16")) == (4, 157_696)
    assert torch.equal(unpack(packed, (77, 1024), "dense", "float16"), states.half())


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.003), ("fp8", 0.003)])
def test_eight_bits_are_half_the_size_and_near(states: torch.Tensor, storage: str, most: float) -> None:
    packed = pack(states, storage, "float16")
    size = size_of((77, 1024), storage, "float16")
    assert packed.shape == (4, size) and size == 79_002
    back = unpack(packed, (77, 1024), storage, "float16")
    assert back.dtype == torch.float16 and back.shape == states.shape
    assert torch.equal(back[0, 10:], torch.zeros(67, 1024).half())
    error = cosine_error(states, storage, "float16")
    assert 0 < error["mean"] <= error["max"] < most


def test_eight_bits_are_off_by_half_a_scale_at_most(states: torch.Tensor) -> None:
    plain = torch.randn(2, 256, 768, generator=torch.Generator().manual_seed(1))  # as wide as DINOv2's patches
    for values, most in ((plain, 0.009), (states, 0.06)):
        back = unpack(pack(values, "int8", "float16"), values.shape[1:], "int8", "float16").float()
        scales = values.abs().amax(2, keepdim=True) / 127
        assert bool(((back - values).abs() <= scales * 0.5 + values.abs() * 1e-3).all())
        assert float((back - values).norm() / values.norm()) < most


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_very_quiet_very_loud_and_broken_tokens(storage: str) -> None:
    states = torch.ones(1, 3, 8) * torch.tensor([1e-5, 3e4, float("nan")])[None, :, None]
    back = unpack(pack(states, storage, "float16"), (3, 8), storage, "float16").float()
    assert float(back[0, 0].abs().max()) < 3e-5
    torch.testing.assert_close(back[0, 1], states[0, 1], rtol=5e-3, atol=0)
    assert torch.isnan(back[0, 2]).all()


def test_names() -> None:
    assert [kind_of(name) for name in ("dense", "dedup", "int8", "fp8+dedup")] == ["dense", "dense", "int8", "fp8"]
    assert [is_dedup(name) for name in ("dense", "dedup", "int8", "fp8+dedup")] == [False, True, False, True]
    names = ("ragged", "ragged+dedup", "int8+ragged", "fp8+ragged+dedup")
    assert [kind_of(name) for name in names] == ["dense", "dense", "int8", "fp8"]
    assert all(is_ragged(name) for name in names) and not is_ragged("int8+dedup")


@pytest.mark.parametrize("storage", ["ragged", "int8+ragged", "fp8+ragged"])
@pytest.mark.parametrize("tokens", [0, 1, 10, 77])
def test_ragged_states_come_back_with_zeros_for_padding(states: torch.Tensor, storage: str, tokens: int) -> None:
    shape, whole = (77, 1024), states[1:2].clone()
    packed = pack(whole, storage, "float16")[0].numpy()
    stored = cut(packed, tokens, shape, storage, "float16")
    assert len(stored) == tokens * token_bytes(1024, storage, "float16")
    back = np.full(size_of(shape, storage, "float16"), 255, np.uint8)
    assert spread(stored, back, shape, storage, "float16") == tokens
    found = unpack(torch.from_numpy(back)[None], shape, storage, "float16")
    expected = unpack(torch.from_numpy(packed)[None], shape, storage, "float16")
    assert torch.equal(found[:, :tokens], expected[:, :tokens]) and not found[:, tokens:].any()


@pytest.mark.parametrize("size", [1, 1027, 78 * 1026])
def test_ragged_bytes_that_are_not_whole_tokens_are_refused(size: int) -> None:
    target = np.zeros(size_of((77, 1024), "int8", "float16"), np.uint8)
    with pytest.raises(ValueError, match=f"{size} bytes are not those of 0 to 77 tokens of 1024 numbers"):
        spread(np.zeros(size, np.uint8), target, (77, 1024), "int8+ragged", "float16")
