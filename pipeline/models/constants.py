"""Small constant tensors, copied to each device only once, as every copy would synchronize with the device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Per-channel values as a tensor (1, c, 1, 1)."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


@cache
def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor ()."""
    return torch.tensor(value, dtype=dtype, device=device)
