"""Processes and samplers on data whose best prediction is known: Gaussian, so that it is linear in what is noisy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import ConfigError
from pipeline.models.diffusion_process import Edm, Flow, Process, process_of, wide
from pipeline.models.sampling import SAMPLERS, sample
from pipeline.training.tasks.diffuse import Drawn, diffusion_losses

MEAN, STD = 0.5, 0.8
PROCESSES = [Flow(), Edm(sigma_data=0.9), Edm(0.0, 0.6, 0.5)]


def best_denoised(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """E[clean | x] for clean data of N(MEAN, STD^2)."""
    a, s = process.scales(wide(t))
    gain = a * STD**2 / (a**2 * STD**2 + s**2)
    return MEAN + gain * (x - a * MEAN)


def best_output(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """The prediction whose denoised value is the best one: ``denoised`` is linear in it."""
    zero, one = (process.denoised(torch.full_like(x, value), x, t) for value in (0.0, 1.0))
    return (best_denoised(process, x, t) - zero) / (one - zero)


class Best(nn.Module):
    """The network that answers so; what it sees is undone first."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.texts = 0.0

    def forward(self, inner: Tensor, time: Tensor, text: Tensor, drop: Tensor | None = None) -> Tensor:
        t = (4 * time).exp() if isinstance(self.process, Edm) else time
        ones, _ = self.process.input(torch.ones_like(inner), t)
        out = best_output(self.process, inner / ones, t)
        shift = torch.zeros(len(inner)) if drop is None else torch.where(drop, 0.3, 0.0)
        return out + self.texts * shift[:, None, None, None]


class Linear(nn.Module):
    """Enough for data of a Gaussian at one level of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, inner: Tensor, *_: Tensor) -> Tensor:
        out: Tensor = self.line(inner)
        return out


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("normal", [-1.0, 0.0, 1.0])
def test_a_model_trained_by_the_loss_converges_to_the_known_optimum(process: Process, normal: float) -> None:
    torch.manual_seed(0)
    t = process.levels(torch.tensor([normal])).expand(20_000)
    clean, noise = MEAN + STD * torch.randn(20_000, 1, 1, 1), torch.randn(20_000, 1, 1, 1)
    drawn = Drawn(t, noise, torch.zeros(20_000, dtype=torch.bool))
    model, text = Linear(), torch.zeros(20_000, 1, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def loss_of(network: nn.Module) -> Tensor:
        return diffusion_losses(network, process, clean, text, drawn).mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    x = process.noisy(clean, noise, t)
    with torch.no_grad():
        error = model(process.input(x, t)[0]) - best_output(process, x, t)
        assert float(loss_of(model)) == pytest.approx(float(loss_of(Best(process))), abs=1e-3)
    assert float(error.square().mean()) < 1e-3


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_predicting_the_target_gives_the_clean_data_back(process: Process) -> None:
    clean, noise, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), process.levels(torch.randn(4))
    x = process.noisy(clean, noise, t)
    torch.testing.assert_close(process.denoised(process.target(clean, noise, t), x, t), clean, atol=1e-4, rtol=1e-4)


def test_what_an_edm_network_sees_and_predicts_has_unit_variance() -> None:
    process = Edm(sigma_data=0.7)
    clean, noise = 0.7 * torch.randn(20_000, 1, 1, 1), torch.randn(20_000, 1, 1, 1)
    for level in (0.01, 0.5, 20.0):
        t = torch.full((20_000,), level)
        inner, _ = process.input(process.noisy(clean, noise, t), t)
        assert float(inner.std()) == pytest.approx(1, abs=0.03)
        assert float(process.target(clean, noise, t).std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_samplers_agree_at_many_steps_and_reach_the_data(process: Process) -> None:
    torch.manual_seed(1)
    noise, text = torch.randn(500, 1, 2, 2), torch.zeros(500, 1, 1)
    drawn = {name: sample(Best(process), noise, text, 200, 1.0, process, name) for name in SAMPLERS}
    exact = MEAN + STD * noise  # the flow of a Gaussian keeps each point's place in its distribution
    for name, result in drawn.items():
        assert float((result - exact).abs().max()) < (0.06 if name == "euler" else 0.03), name
    few = {name: sample(Best(process), noise, text, 12, 1.0, process, name) for name in SAMPLERS}
    errors = {name: float((result - exact).abs().mean()) for name, result in few.items()}
    assert max(errors["heun"], errors["dpm++"]) < errors["euler"]  # second order pays


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", PROCESSES[:2], ids=str)
def test_guidance_of_one_is_conditional_sampling(process: Process, sampler: str) -> None:
    noise, text = torch.randn(3, 1, 2, 2), torch.zeros(3, 1, 1)
    network = Best(process)
    network.texts = 1.0
    plain = sample(network, noise, text, 6, 1.0, process, sampler)
    almost = sample(network, noise, text, 6, 1.0 + 1e-6, process, sampler)
    torch.testing.assert_close(plain, almost, atol=1e-3, rtol=0)
    assert (sample(network, noise, text, 6, 3.0, process, sampler) - plain).abs().min() > 1e-3


def test_levels_fall_from_noise_to_nothing() -> None:
    for process in PROCESSES:
        levels = process.schedule(18)
        assert len(levels) == 19 and (levels.diff() < 0).all() and levels[-1] == 0
    assert float(Edm().schedule(18)[0]) == pytest.approx(80)


def test_a_process_comes_back_from_its_settings() -> None:
    for process in PROCESSES:
        assert process_of(process.to_dict()) == process
    with pytest.raises(ConfigError, match="process=flaw: did you mean flow"):
        process_of({"name": "flaw"})
    with pytest.raises(ConfigError, match="noise_std=0.0: must be above 0"):
        process_of({"name": "edm", "std": 0.0})


def test_wrong_samplers_and_steps_are_refused() -> None:
    noise, text = torch.randn(1, 1, 2, 2), torch.zeros(1, 1, 1)
    with pytest.raises(ConfigError, match="sampler=hein: did you mean heun"):
        sample(Best(Flow()), noise, text, sampler="hein")
    with pytest.raises(ConfigError, match="steps=0"):
        sample(Best(Flow()), noise, text, 0)
