"""From noise to latents with a velocity model of rectified flow (Liu et al. 2022; Lipman et al. 2022).

Time runs from data (t = 0) to noise (t = 1): x_t = (1 - t) x + t noise, and the model predicts the velocity noise - x.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, text: Tensor, steps: int = 20, guidance: float = 1.0) -> Tensor:
    """Follow the velocity from noise to data by Euler steps of equal size.

    Args:
        model: called as model(x, t, text, drop), see :class:`pipeline.models.dit.DiT`.
        noise: (b, c, h, w), standard normal.
        text: (b, l, d) text states.
        steps: evaluations along the way.
        guidance: classifier-free guidance (Ho and Salimans 2022): how far to go from the velocity without text towards
            and beyond the one with it; 1 is plain conditional sampling at half the cost.

    Returns:
        (b, c, h, w) latents.
    """
    x = noise
    times = torch.linspace(1.0, 0.0, steps + 1, device=noise.device)
    for now, then in pairwise(times):
        x = x + (then - now) * guided_velocity(model, x, now.expand(len(x)), text, guidance)
    return x


def guided_velocity(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, guidance: float) -> Tensor:
    """(b, c, h, w); with and without text in one batch of twice the size."""
    if guidance == 1.0:
        velocity: Tensor = model(x, t, text)
        return velocity
    drop = torch.cat([torch.zeros(len(x)), torch.ones(len(x))]).bool().to(x.device)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, text]), drop)
    with_text, without = both.chunk(2)
    return without + guidance * (with_text - without)
