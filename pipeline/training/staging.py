"""Copies a rank's state for a checkpoint, so that training can continue while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import Rank


def share_of(tensors: Mapping[str, Any], rank: Rank) -> dict[str, Any]:
    """Those of ``tensors`` that ``rank`` writes: each tensor, or each shard of one, is written by one rank.

    Tensors replicated on several ranks are distributed among these, the largest first, each to the rank with the least
    so far. All ranks compute the same assignment without communication.
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
    """Ranks that hold the same part of ``tensor`` as this rank, in order."""
    if not hasattr(tensor, "to_local"):
        return tuple(range(rank.world_size))
    ranks = tensor.device_mesh.mesh
    for dimension in reversed(range(ranks.dim())):
        if not tensor.placements[dimension].is_replicate():
            ranks = ranks.select(dimension, tensor.device_mesh.get_local_rank(dimension))
    return tuple(sorted(ranks.flatten().tolist()))


class Stage:
    """Buffers that tensors are copied to, reused each time, and pinned for tensors on a GPU."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}
        self._copied_all: Any = None

    def copy(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Copy ``tensors`` to the CPU, for sharded ones this rank's shard. The copies are complete after :meth:`wait`,
        and valid until the next call. Later changes to the tensors on their GPU do not affect them."""
        self._room = {name: room for name, room in self._room.items() if name in tensors}
        copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        self._copied_all = None
        if any(_local(tensor).device.type == "cuda" for tensor in tensors.values()):
            self._copied_all = torch.cuda.Event()
            self._copied_all.record()
        return copies

    def wait(self) -> None:
        """Wait until the copies are complete; can be called from any thread."""
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
