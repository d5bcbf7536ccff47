"""The recurrence of state space models as it is written in the papers, in float64: what the scans are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def oracle(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mamba-1: x, dt (n, l, d), a (d, s), b, c (n, l, s), d (d,) → (n, l, d)."""
    x, dt, a, b, c, d = (t.double() for t in (x, dt, a, b, c, d))
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for xt, dtt, bt, ct in zip(*(t.unbind(1) for t in (x, dt, b, c)), strict=True):
        state = torch.exp(dtt[..., None] * a) * state + (dtt * xt)[..., None] * bt[:, None]
        outputs.append((state * ct[:, None]).sum(-1) + d * xt)
    return torch.stack(outputs, 1)


def oracle_ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mamba-2: x (n, l, h, p), dt (n, l, h), a, d (h,): Mamba-1 with a head's values for each of its channels."""
    p = x.shape[-1]
    wide = [t.repeat_interleave(p, -1) for t in (dt, a, d)]
    y = oracle(x.flatten(2), wide[0], wide[1][:, None].expand(-1, b.shape[-1]), b, c, wide[2])
    return y.view(x.shape)
