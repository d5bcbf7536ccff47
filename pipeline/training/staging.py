"""Copies the state of a rank for a checkpoint, so that training can continue while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import Rank


def share_of(tensors: Mapping[str, Any], rank: Rank) -> dict[str, Any]:
    """Those of ``tensors`` that ``rank`` writes: each is written by one rank, or where it is spread over ranks, each of
    its parts.

    Tensors that several ranks have alike go to these in turn, the largest first to whoever has least. All ranks find
    the same without asking each other.
    """
    load: dict[tuple[int, ...], list[int]] = {}
    mine = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        tensor = tensors[name]
        alike = _alike(tensor, rank)
        if len(alike) == 1:
            mine[name] = tensor
            continue
        loads = load.setdefault(alike, [0] * len(alike))
        place = loads.index(min(loads))
        loads[place] += tensor.numel() * tensor.element_size()
        if alike[place] == rank.rank:
            mine[name] = tensor
    return {name: mine[name] for name in tensors if name in mine}


def _alike(tensor: Any, rank: Rank) -> tuple[int, ...]:
    """The ranks that have the same of ``tensor`` as this one, in order."""
    if not hasattr(tensor, "to_local"):
        return tuple(range(rank.world_size))
    ranks = tensor.device_mesh.mesh
    for dimension in reversed(range(ranks.dim())):
        if not tensor.placements[dimension].is_replicate():
            ranks = ranks.select(dimension, tensor.device_mesh.get_local_rank(dimension))
    return tuple(sorted(ranks.flatten().tolist()))


class Stage:
    """Memory of its own that tensors are copied to; pinned where they come from a GPU, and used again each time."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}
        self._copied_all: Any = None

    def copy(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of ``tensors`` on the CPU, of parts where they are spread over ranks; valid until the next call, and
        from :meth:`wait` on. What changes the tensors on their GPU later comes too late for them."""
        self._room = {name: room for name, room in self._room.items() if name in tensors}
        copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        self._copied_all = None
        if any(_local(tensor).device.type == "cuda" for tensor in tensors.values()):
            self._copied_all = torch.cuda.Event()
            self._copied_all.record()
        return copies

    def wait(self) -> None:
        """Until the copies have arrived; from any thread."""
        if self._copied_all is not None:
            self._copied_all.synchronize()

    def _copy(self, name: str, tensor: Any) -> Any:
        local = _local(tensor)
        room = self._room.get(name)
        if room is None or room.shape != local.shape or room.dtype != local.dtype:
            room = torch.empty(local.shape, dtype=local.dtype)
            room = self._room[name] = room.pin_memory() if local.device.type == "cuda" else room
        room.copy_(local, non_blocking=True)
        if not hasattr(tensor, "to_local"):
            return room
        from torch.distributed.tensor import DTensor

        return DTensor(room, tensor._spec, requires_grad=False)


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.detach()
    return local.to_local() if hasattr(local, "to_local") else local
