"""Small tensors that never change, copied to a device once: every copy would wait for what was started before it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A value for each channel, (1, c, 1, 1)."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


@cache
def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number, ()."""
    return torch.tensor(value, dtype=dtype, device=device)
