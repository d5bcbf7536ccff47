"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Averages of all parameters in float32, and the newest values of persistent buffers.

    The decay rises from 0.1 to ``decay`` over the first updates, as (1 + n) / (10 + n), so that the random start is
    forgotten soon. ``updates`` is n: it belongs to the state, or a resumed run would start the rise again.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._averages = {name: p.detach().clone().float() for name, p in model.named_parameters()}
        self._buffers = {name: tensor.detach().clone() for name, tensor in _buffers(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        newest = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(list(self._averages.values()), newest, 1 - decay)
        for name, tensor in _buffers(model).items():
            self._buffers[name].copy_(tensor)

    def weights(self) -> dict[str, Tensor]:
        """What ``model.load_state_dict`` takes."""
        return {**self._averages, **self._buffers}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], updates: int) -> None:
        for name, tensor in self.weights().items():
            tensor.copy_(weights[name])
        self.updates = updates


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
