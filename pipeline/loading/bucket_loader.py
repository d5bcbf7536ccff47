"""Batches of latents in aspect-ratio buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.loading.bucketed import BucketSlots
from pipeline.loading.epoch_slots import MIXED
from pipeline.loading.latent_loader import LatentLoader, fair

BALANCES = ("samples", "tokens")


@dataclass
class BucketLoader(LatentLoader):
    """A :class:`LatentLoader` of latents in buckets: all samples of a batch are from one bucket, the same on all ranks.

    The bucket of each step is chosen by a keyed random number: see :mod:`pipeline.loading.bucketed`. Samples that
    remain in a bucket at the end of an epoch, too few for a batch on every rank, are left out; with ``drop_last=False``
    they form a smaller batch.

    Attributes:
        batch_size: Number of samples per batch of this rank. With ``balance="tokens"``, this is for samples of
            ``resolution`` x ``resolution`` pixels; batches of smaller buckets have more samples, up to the same number
            of pixels.
        position: Number of samples of each bucket that all ranks have finished in this epoch.
    """

    balance: str = "samples"
    resolution: int = 0
    position: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance not in BALANCES:
            raise ConfigError(f"balance={self.balance}: {nearest(self.balance, BALANCES)}")

    @property
    def _plan(self) -> BucketSlots:
        assert isinstance(self.slots, BucketSlots)
        return self.slots

    def batch_size_of(self, bucket: int) -> int:
        """Number of samples of this rank in a batch of ``bucket``."""
        if self.balance == "samples":
            return self.batch_size
        height, width = self._plan.sizes[bucket]
        return max(1, self.batch_size * self.resolution**2 // (height * width))

    def _steps(self) -> npt.NDArray[Any]:
        """Number of samples per step over all ranks, for each bucket."""
        world_size = self.place()[1]
        return np.array([self.batch_size_of(b) * world_size for b in range(len(self._plan.sizes))], np.int64)

    def __len__(self) -> int:
        """Number of batches of a whole epoch, on every rank."""
        steps = self._steps()
        return int((self._plan.quotas // steps if self.drop_last else -(-self._plan.quotas // steps)).sum())

    def _batches(self, epoch: int, position: Any) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        rank, world_size = self.place()
        plan, steps = self._plan, self._steps()
        ahead = self._planned(epoch, position)
        waiting: deque[tuple[int, int, int, Any]] = deque()
        required = 0
        while True:
            while required < MIXED if plan.blocks else not waiting:
                step = next(ahead, None)
                if step is None:
                    break
                waiting.append(step)
                required += step[2] - step[1]
                if plan.blocks:
                    self._require_all(*plan.samples(epoch, step[0], np.arange(step[1], step[2])))
            if not waiting:
                return
            bucket, start, stop, after = waiting.popleft()
            required -= stop - start
            first, last = (start + (stop - start) * r // world_size for r in (rank, rank + 1))
            places = np.arange(first, last)
            over = plan.choose(epoch, np.array(after), self._least(steps)) is None
            batch = self.dataset.batch(epoch, *plan.samples(epoch, bucket, places), plan.sizes[bucket])
            yield None if over else after, self._finished(batch, epoch, plan.starts[bucket] + places)

    def _least(self, steps: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return steps if self.drop_last else np.ones_like(steps)

    def _planned(self, epoch: int, position: Any) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
        """Yield for each step its bucket, first and last position in it, and the positions of all buckets after it."""
        plan, steps, world_size = self._plan, self._steps(), self.place()[1]
        taken = np.array(position or [0] * len(plan.sizes), np.int64)
        while (bucket := plan.choose(epoch, taken, self._least(steps))) is not None:
            start, total = int(taken[bucket]), int(plan.quotas[bucket])
            stop = min(start + int(steps[bucket]), total)
            stop = stop if self.drop_last else fair(start, stop, total, world_size)
            taken[bucket] = stop
            yield bucket, start, stop, tuple(taken.tolist())

    def _require_all(self, folders: npt.NDArray[Any], positions: npt.NDArray[Any]) -> None:
        for number in np.unique(folders):
            self.dataset.folders[number].require(positions[folders == number])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "position": list(self.position or ())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.position = tuple(state["position"])
