"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_CHUNK = 2**26  # elements averaged at a time on a GPU, to limit memory use


class Ema:
    """Moving averages of all parameters in float32, and the newest values of persistent buffers.

    The decay rises from 0.1 to ``decay`` over the first updates, as (1 + n) / (10 + n), so that the random
    initialisation is forgotten quickly. ``updates`` is n: it is part of the state, or a resumed run would start the
    rise again. Averages are sharded over ranks like the parameters.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._averages = {name: p.detach().clone().float() for name, p in model.named_parameters()}
        self._buffers = {name: tensor.detach().clone() for name, tensor in buffers_of(model).items()}
        device = next((_local(average).device for average in self._averages.values()), torch.device("cpu"))
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def updates(self) -> int:
        """Number of updates; synchronizes with the device."""
        return int(self._count)

    @updates.setter
    def updates(self, count: int) -> None:
        self._count.fill_(count)

    @torch.no_grad()
    def update(self, model: nn.Module, left_out: Tensor | None = None) -> None:
        """Update from the weights of ``model``, unless ``left_out`` (), which stays on the device, is 1."""
        newest = [_local(p).float() for p in model.parameters()]
        averages = [_local(average) for average in self._averages.values()]
        if self._count.device.type == "cpu":
            if left_out is not None and left_out > 0:
                return
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            self._count += 1
            torch._foreach_lerp_(averages, newest, 1 - decay)
        else:
            applied = 1 - left_out.double() if left_out is not None else torch.ones_like(self._count)
            share = 1 - ((1 + self._count) / (10 + self._count)).clamp(max=self.decay)
            self._count += applied
            _approach(averages, newest, (share * applied).float())
        for name, tensor in buffers_of(model).items():
            kept = self._buffers[name]
            kept.copy_(tensor if left_out is None else torch.where(left_out > 0, kept, tensor))

    def weights(self) -> dict[str, Tensor]:
        """A state dict for ``model.load_state_dict``; to be filled in place when a run resumes."""
        return {**self._averages, **self._buffers}

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Context in which ``model`` has the averaged weights; its own are restored exactly afterwards."""
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


def _approach(averages: list[Tensor], newest: list[Tensor], share: Tensor) -> None:
    """averages += share * (newest - averages), with ``share`` () on the device, using a few kernels for all tensors."""
    first, size = 0, 0
    for last, average in enumerate(averages, 1):
        size += average.numel()
        if size >= _CHUNK or last == len(averages):
            change = torch._foreach_sub(newest[first:last], averages[first:last])
            torch._foreach_mul_(change, share)
            torch._foreach_add_(averages[first:last], change)
            first, size = last, 0


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers, such as those of a batch norm."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a possibly sharded tensor, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
