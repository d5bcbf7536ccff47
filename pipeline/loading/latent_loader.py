"""Batches of latents for training, read ahead by a thread."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config.schema import ConfigError
from pipeline.distributed import find_place
from pipeline.imaging.buckets import Size
from pipeline.loading.bucketed import BucketSlots
from pipeline.loading.epoch_slots import BLOCK, MIXED, Slots
from pipeline.loading.latent_folder import LatentFolder
from pipeline.loading.prefetch import Ahead
from pipeline.randomness import uniforms

_log = logging.getLogger("pipeline")


class BatchedSamples(Protocol):
    """The samples that a :class:`LatentLoader` reads: :class:`pipeline.loading.latents.LatentDataset`."""

    folders: Sequence[LatentFolder]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    def batch(
        self, epoch: int, folders: npt.NDArray[Any], positions: npt.NDArray[Any], size: Size | None = None
    ) -> dict[str, Tensor]:
        """Read the samples at ``positions`` of ``folders`` as one batch."""


@dataclass
class LatentLoader:
    """Batches of latents, prefetched by a thread; each ``iter()`` yields one epoch, in its own order.

    It is used like torch's DataLoader: after an epoch that was left early, the next ``iter()`` begins the next epoch,
    unless a state is loaded with :meth:`load_state_dict`. The batches of all ranks together are consecutive slots of
    the epoch, of which each rank has its part. The state is therefore a number of slots, which is valid for any number
    of ranks.

    Attributes:
        batch_size: Number of samples per batch of this rank.
        drop_last: Leave out the last samples of an epoch that do not fill a batch on every rank. If false, every rank
            still gets the same number of batches; the last ones are then smaller, and if fewer samples than ranks are
            left, some ranks get an empty batch, (0, c, h, w).
        epoch: The epoch of the next batch.
        position: Number of slots of this epoch that all ranks have finished.
        waited: Number of seconds in which the consumer waited for batches. If shards are in an object store, it is also
            logged for each epoch.
    """

    dataset: BatchedSamples
    slots: Slots | BucketSlots
    batch_size: int
    cap_drop_prob: float = 0.0
    drop_last: bool = True
    rank: int | None = None
    world_size: int | None = None
    prefetch: int = 4
    pin_memory: bool = False
    epoch: int = 0
    position: int = 0
    waited: float = 0.0
    _going_on: bool = field(default=False, repr=False)
    _newest: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("prefetch", 1), ("world_size", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or int(value) != value or value < least):
                raise ConfigError(f"{name}={value}: must be a whole number of at least {least}")
        if (self.rank is None) != (self.world_size is None):
            raise ConfigError(f"rank={self.rank}, world_size={self.world_size}: give both or neither")
        if self.rank is not None and not 0 <= self.rank < (self.world_size or 1):
            raise ConfigError(f"rank={self.rank}: must be from 0 to {(self.world_size or 1) - 1}, as world_size says")
        if not 0 <= self.cap_drop_prob <= 1:
            raise ConfigError(f"cap_drop_prob={self.cap_drop_prob}: must be from 0 to 1")

    def place(self) -> tuple[int, int]:
        """Rank and world size: as given, or those of torch.distributed, or those of the launcher."""
        if self.rank is not None and self.world_size is not None:
            return self.rank, self.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        here = find_place(os.environ)
        return here.rank, here.world_size

    def __len__(self) -> int:
        """Number of batches of a whole epoch, on every rank."""
        step = self.batch_size * self.place()[1]
        return len(self.slots) // step if self.drop_last else -(-len(self.slots) // step)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield an epoch, or after loading a state the rest of its epoch.

        A batch has ``image_latents`` (b, c, h, w), ``caption_latents`` (b, 1, l, d) and ``drop_caption_mask`` (b,), 0
        where the caption is to be dropped, else 1. For ragged text states, it also has ``caption_mask``, bool (b, l),
        True at tokens.
        """
        epoch, position = (self.epoch + 1, 0) if self.position and not self._going_on else (self.epoch, self.position)
        self._newest += 1
        mine = self._newest
        if not len(self):
            raise ConfigError(
                f"batch_size={self.batch_size} on {self.place()[1]} ranks is more than the {len(self.slots)} samples: "
                "give a smaller one, or drop_last=False"
            )
        before, start = self.waited, perf_counter()
        with closing(Ahead(self._batches(epoch, position), self.prefetch)) as batches:
            for stop, batch in batches:
                self.waited = before + batches.waited
                self._reached(mine, epoch, stop)
                yield batch
        if self.slots.blocks:
            _log.info("epoch %d: %.1f of %.1f s waited for data", epoch, batches.waited, perf_counter() - start)
        self._reached(mine, epoch, None)  # also if nothing was left of the state's epoch

    def _reached(self, iterator: int, epoch: int, stop: int | None) -> None:
        """Update the state, if this is the newest iterator; None: the epoch ends."""
        if iterator == self._newest:
            self.epoch, self.position = (epoch + 1, 0) if stop is None else (epoch, stop)
            self._going_on = False

    def _batches(self, epoch: int, position: int) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
        """Yield (slot at which the batch ends, batch); the slot is None for the last batch of the epoch."""
        rank, world_size = self.place()
        total, step = len(self.slots), self.batch_size * world_size
        required = position
        while position + step <= total if self.drop_last else position < total:
            stop = self._stop(position, world_size)
            required = self._require(epoch, required, stop)
            first, last = (position + (stop - position) * r // world_size for r in (rank, rank + 1))
            left = total - stop
            over = left < step if self.drop_last else not left
            yield None if over else stop, self._batch(epoch, np.arange(first, last))
            position = stop

    def _stop(self, position: int, world_size: int) -> int:
        """End of the global batch that begins at ``position``; leaves no samples, or enough for all ranks."""
        total = len(self.slots)
        stop = min(position + self.batch_size * world_size, total)
        return stop if self.drop_last else fair(position, stop, total, world_size)

    def _require(self, epoch: int, first: int, stop: int) -> int:
        """Prefetch the shards of the slots from ``first`` to some distance after ``stop``; return where these slots
        end."""
        assert isinstance(self.slots, Slots)
        if not self.slots.blocks:
            return first
        last = min(stop + MIXED, len(self.slots))
        folders, positions = self.slots.samples(epoch, np.arange(first, last))
        for number in np.unique(folders):
            self.dataset.folders[number].require(positions[folders == number])
        return max(first, last)

    def _batch(self, epoch: int, slots: npt.NDArray[Any]) -> dict[str, Tensor]:
        assert isinstance(self.slots, Slots)
        return self._finished(self.dataset.batch(epoch, *self.slots.samples(epoch, slots)), epoch, slots)

    def _finished(self, batch: dict[str, Tensor], epoch: int, slots: npt.NDArray[Any]) -> dict[str, Tensor]:
        drawn = np.array([_uniforms(self.slots.seed, epoch, int(s) // BLOCK)[s % BLOCK] for s in slots])
        batch["drop_caption_mask"] = torch.from_numpy((drawn >= self.cap_drop_prob).astype(np.float32))
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch

    # ---- state

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` yield this epoch: from its beginning, unless a state of the same epoch was
        loaded."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: must be at least 0")
        if not (self._going_on and epoch == self.epoch):
            self.epoch, self.position, self._going_on = int(epoch), 0, False
            self._newest += 1

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches that were returned; the same on every rank."""
        state = {
            "seed": self.slots.seed,
            "samples": len(self.slots),
            "epoch": self.epoch,
            "position": self.position,
        }
        return state | ({"order": self.slots.order} if self.slots.order else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``iter()`` resume where ``state`` was taken, on any number of ranks.

        Raises:
            ValueError: The state was taken with other data, another seed or another order.
        """
        own = self.state_dict()
        for name in ("seed", "samples", "order"):
            if state.get(name) != own.get(name) and not (name not in state and not self.slots.blocks):
                raise ValueError(
                    f"cannot resume: the state has {name}={state.get(name)}, this loader {name}={own.get(name)}"
                )
        self.epoch, self.position, self._going_on = state["epoch"], state["position"], True
        self._newest += 1


def fair(position: int, stop: int, total: int, world_size: int) -> int:
    """``stop``, or less, so that no slots or (if possible) enough for all ranks are left up to ``total``."""
    missing = world_size - (total - stop)
    return stop - missing if 0 < missing < world_size <= stop - position - missing else stop


@lru_cache(maxsize=8)
def _uniforms(seed: int, epoch: int, block: int) -> npt.NDArray[Any]:
    return uniforms(BLOCK, seed, "drop", epoch, block)
