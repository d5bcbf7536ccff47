"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of all parameters in float32, and the newest values of persistent buffers.

    The decay rises from 0.1 to ``decay`` over the first updates, as (1 + n) / (10 + n), so that the random start is
    forgotten soon. ``updates`` is n: it belongs to the state, or a resumed run would start the rise again. Where
    parameters are sharded over ranks, so are the averages.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._averages = {name: p.detach().clone().float() for name, p in model.named_parameters()}
        self._buffers = {name: tensor.detach().clone() for name, tensor in buffers_of(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        newest = [_local(p).float() for p in model.parameters()]
        torch._foreach_lerp_([_local(average) for average in self._averages.values()], newest, 1 - decay)
        for name, tensor in buffers_of(model).items():
            self._buffers[name].copy_(tensor)

    def weights(self) -> dict[str, Tensor]:
        """What ``model.load_state_dict`` takes; to be filled in place when a run goes on."""
        return {**self._averages, **self._buffers}

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Context in which ``model`` has the averaged weights; afterwards it has its own again, to the bit."""
        with torch.no_grad():
            tensors = dict(model.named_parameters()) | buffers_of(model)
            own = {name: _local(tensor).clone() for name, tensor in tensors.items()}
            for name, average in self.weights().items():
                _local(tensors[name]).copy_(_local(average))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    _local(tensor).copy_(own[name])


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state, such as a batch norm's."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
