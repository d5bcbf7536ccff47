"""Solvers of the probability flow, from noise to latents, for each of :mod:`pipeline.models.diffusion_process`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.models.constants import number
from pipeline.models.diffusion_process import Flow, Process

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(noisy (b, c, h, w), level () on the CPU) → clean (b, c, h, w)."""
Solver = Callable[[Denoise, Tensor, Tensor, Process], Tensor]
"""(denoise, noise (b, c, h, w), levels (steps + 1,) on the CPU, process) → data (b, c, h, w)."""


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    text: Tensor,
    steps: int = 20,
    guidance: float = 1.0,
    process: Process | None = None,
    sampler: str = "euler",
    sizes: Tensor | None = None,
) -> Tensor:
    """Follow the probability flow from noise to data.

    Args:
        model: called as model(x, t, text, drop), see :class:`pipeline.models.dit.DiT`.
        noise: (b, c, h, w), standard normal.
        text: (b, l, d) text states.
        steps: number of steps; each is one evaluation of the model, or two with ``heun`` (one in the last).
        guidance: scale of classifier-free guidance (Ho and Salimans 2022), which extrapolates from the prediction
            without text to the one with text; 1 is plain conditional sampling at half the cost.
        process: the process that the model was trained with; default: rectified flow.
        sampler: a name in :data:`SAMPLERS`.
        sizes: (b, 6) or (1, 6), for a model with ``size_condition``.

    Returns:
        (b, c, h, w) latents.

    Raises:
        ConfigError: there is no such sampler, or ``steps`` is below 1.
    """
    process = process or Flow()
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler={sampler}: {nearest(sampler, SAMPLERS)}")
    if steps < 1:
        raise ConfigError(f"steps={steps}: must be at least 1")

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        return guided(model, x, _at(level, x), text, guidance, process, sizes)

    return SAMPLERS[sampler](denoise, noise * process.start, process.schedule(steps), process)


def _at(level: Tensor, x: Tensor) -> Tensor:
    """Expand a level on the CPU to all of ``x``: (b,)."""
    return number(float(level), x.dtype, x.device).expand(len(x))


def guided(
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    guidance: float,
    process: Process,
    sizes: Tensor | None = None,
) -> Tensor:
    """Clean latents (b, c, h, w) with guidance; predictions with and without text share a batch of twice the size."""
    inner, time = process.input(x, t)
    more = {} if sizes is None else {"sizes": sizes}
    if guidance == 1.0:
        return process.denoised(model(inner, time, text, **more), x, t)
    if sizes is not None and len(sizes) > 1:
        more = {"sizes": torch.cat([sizes, sizes])}
    drop = torch.arange(2 * len(x), device=x.device) >= len(x)
    both = model(torch.cat([inner, inner]), torch.cat([time, time]), torch.cat([text, text]), drop, **more)
    with_text, without = both.chunk(2)
    return process.denoised(without + guidance * (with_text - without), x, t)


def euler(denoise: Denoise, x: Tensor, levels: Tensor, process: Process) -> Tensor:
    """First-order solver; the same as DDIM (Song et al. 2021)."""
    for now, then in pairwise(levels):
        x = x + float(then - now) * _slope(denoise, x, now, process)
    return x


def heun(denoise: Denoise, x: Tensor, levels: Tensor, process: Process) -> Tensor:
    """Second-order solver, with the mean slope at both ends of a step (Karras et al. 2022, algorithm 1)."""
    for now, then in pairwise(levels):
        slope = _slope(denoise, x, now, process)
        ahead = x + float(then - now) * slope
        if then > 0:
            slope = (slope + _slope(denoise, ahead, then, process)) / 2
            ahead = x + float(then - now) * slope
        x = ahead
    return x


def dpm_solver(denoise: Denoise, x: Tensor, levels: Tensor, process: Process) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022): second order by reusing the last prediction; one evaluation per step.

    With l = log(a / s) and h its increase in a step: x' = s' / s x - a' expm1(-h) D, where D is extrapolated from the
    predictions of this step and the last. First order at both ends, where l is infinite.
    """
    last: Tensor | None = None
    growth_before = torch.inf
    for now, then in pairwise(levels):
        clean = denoise(x, now)
        (a, s), (a_next, s_next) = process.scales(now), process.scales(then)
        growth = float((a_next / s_next).log() - (a / s).log())
        best = clean
        if last is not None and then > 0:
            best = clean + growth / (2 * growth_before) * (clean - last)
        # a' expm1(-h) is computed as s' a / s - a', which is finite where s' = 0 or a = 0
        x = float(s_next / s) * x - float(s_next * a / s - a_next) * best
        last, growth_before = clean, growth
    return x


SAMPLERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpm++": dpm_solver}


def _slope(denoise: Denoise, x: Tensor, level: Tensor, process: Process) -> Tensor:
    return process.slope(denoise(x, level), x, _at(level, x))
