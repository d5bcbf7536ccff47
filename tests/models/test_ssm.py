"""Scans equal the recurrence that they compute, to rounding, with all gradients; directions mirror each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models.oracle import oracle, oracle_ssd
from torch import Tensor

from pipeline.models.ssm import MIXERS, Bidirectional, selective_scan, ssd

Scan = Callable[..., Tensor]
LENGTHS = (1, 17, 64, 196, 1024)


def inputs(kind: str, length: int, dtype: torch.dtype = torch.float32, n: int = 2) -> list[Tensor]:
    """x, dt, a, b, c, d for selective_scan ("mamba1") or ssd ("mamba2"), as a fresh model makes them."""
    torch.manual_seed(length)
    heads, p, s = 3, 4, 5
    channels = (heads, p) if kind == "mamba2" else (heads * p,)
    rates = (heads,) if kind == "mamba2" else (heads * p, s)
    steps = (heads,) if kind == "mamba2" else channels
    x, b, c = (torch.randn(n, length, *shape) for shape in (channels, (s,), (s,)))
    dt = torch.rand(n, length, *steps) * 0.2 + 1e-3
    a, d = -torch.rand(rates) * 4 - 0.1, torch.randn(steps)
    return [t.to(dtype).requires_grad_() for t in (x, dt, a, b, c, d)]


def run(scan: Scan, tensors: list[Tensor]) -> list[Tensor]:
    """The output, then the gradients of all inputs for a fixed random gradient of the output."""
    y = scan(*tensors)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]


def assert_equal(scan: Scan, kind: str, length: int, tolerance: float) -> None:
    tensors = inputs(kind, length)
    exact = run(oracle_ssd if kind == "mamba2" else oracle, [t.detach().double().requires_grad_() for t in tensors])
    for name, ours, truth in zip(("y", "x", "dt", "a", "b", "c", "d"), run(scan, tensors), exact, strict=True):
        error = float((ours.double() - truth).norm() / truth.norm().clamp_min(1e-12))
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("keep_every", [1, 16])
def test_the_selective_scan_is_the_recurrence(length: int, keep_every: int) -> None:
    assert_equal(lambda *tensors: selective_scan(*tensors, keep_every=keep_every), "mamba1", length, 1e-6)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", [0, 16, 1000])
def test_ssd_is_the_recurrence_whatever_the_chunk(length: int, chunk: int) -> None:
    assert_equal(lambda *tensors: ssd(*tensors, chunk=min(chunk, 128)), "mamba2", length, 1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    for keep_every in (1, 2):
        assert torch.autograd.gradcheck(
            lambda *t, k=keep_every: selective_scan(*t, keep_every=k), inputs("mamba1", 5, torch.float64, n=1)
        )
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, chunk=2), inputs("mamba2", 5, torch.float64, n=1))


def test_long_steps_neither_overflow_nor_lose_the_input() -> None:
    for kind, scan in (("mamba1", selective_scan), ("mamba2", ssd)):
        x, dt, a, b, c, d = (t.detach() for t in inputs(kind, 64))
        y = scan(x, dt * 1000, a, b, c, d)
        assert y.isfinite().all()
        exact = (oracle_ssd if kind == "mamba2" else oracle)(x, dt * 1000, a, b, c, d)
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


def test_states_are_exact_under_autocast() -> None:
    for kind, scan in (("mamba1", selective_scan), ("mamba2", ssd)):
        tensors = [t.detach() for t in inputs(kind, 64)]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(scan(*tensors), scan(*tensors)) and scan(*tensors).dtype == torch.float32
        torch.testing.assert_close(scan(*[t.bfloat16() for t in tensors]).float(), scan(*tensors), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_sees_only_what_came_before(mixer: str) -> None:
    model = MIXERS[mixer](32, d_state=4).eval()
    tokens = torch.randn(2, 20, 32)
    changed = tokens.clone()
    changed[:, 10] += 1
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_both_directions_mirror_each_other(mixer: str) -> None:
    """With the two scans exchanged, a flipped sequence gives the flipped output."""
    model = Bidirectional(mixer, 32, d_state=4)
    mirrored = Bidirectional(mixer, 32, d_state=4)
    mirrored.scans[0].load_state_dict(model.scans[1].state_dict())
    mirrored.scans[1].load_state_dict(model.scans[0].state_dict())
    tokens = torch.randn(2, 33, 32)
    torch.testing.assert_close(mirrored(tokens.flip(1)).flip(1), model(tokens))
    assert not torch.allclose(model(tokens.flip(1)).flip(1), model(tokens), atol=1e-4)
