"""Linear layers packed for decoding: with few rows, reading the weights dominates the time."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Packed(nn.Module):
    """``x @ weight.T + bias`` of a frozen layer.

    In float32 on a CPU, the weights are laid out once as oneDNN's kernel reads them. This makes the product of a few
    rows about twice as fast as the usual one, which lays them out at each call. Elsewhere, the usual product is used.

    Args:
        rows: approximate number of rows of the inputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._packs = _packs(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self._packs else weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if not self._packs:
            return F.linear(x, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def _packs(weight: Tensor) -> bool:
    return (
        type(weight) is Tensor  # not sharded over ranks
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def packed(network: Network, rows: int) -> Network:
    """A copy of ``network`` with its linear layers :class:`Packed`; everything else is shared."""
    twin = object.__new__(type(network))  # classes created by FSDP cannot be copied
    twin.__dict__ |= network.__dict__
    twin._modules = {
        name: Packed(child.weight, child.bias, rows) if type(child) is nn.Linear else child and packed(child, rows)
        for name, child in network._modules.items()
    }
    return twin
