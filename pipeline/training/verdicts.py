"""Decides on the device whether each step is applied (its loss and gradient are finite); read only occasionally.

On a GPU, the host runs ahead of the device. If it read every loss, the device would be idle until the host submits the
next step. Therefore the test for NaN, and the number of consecutive failures, are tensors; the optimizer's kernel
itself skips a step that fails, and after too many failures, all following ones. The results are read at boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed import Rank


@dataclass(frozen=True)
class Step:
    """The result of a step.

    ``in_row``: number of consecutive steps, including this one, that were not finite.
    """

    loss: float
    norm: float
    applied: bool
    in_row: int


class Verdicts:
    """Judges steps on ``device``.

    Args:
        most: number of consecutive steps that may be skipped; after one more, no further step is applied.
        in_row: number of consecutive steps skipped before the first.
    """

    def __init__(self, device: torch.device, most: int, in_row: int = 0) -> None:
        self._most = torch.tensor(float(most), device=device)
        self._in_row = torch.tensor(float(in_row), device=device)
        self._over = torch.zeros((), dtype=torch.bool, device=device)
        self._unread: list[Tensor] = []
        self.immediate = device.type == "cpu"
        """Whether reading needs no synchronization."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 if the step is to be skipped, else 0.0, float32 ().

        Args:
            loss, norm: of the whole batch, (), so that all ranks decide the same.
        """
        finite = loss.isfinite() & norm.isfinite()
        self._in_row = torch.where(finite, torch.zeros_like(self._in_row), self._in_row + 1)
        self._over = self._over | (self._in_row > self._most)
        left_out = (~finite | self._over).float()
        self._unread.append(torch.stack([loss.float(), norm.float(), left_out, self._in_row]))
        return left_out

    def read(self) -> list[Step]:
        """All steps since the last call; synchronizes with the device."""
        if not self._unread:
            return []
        table = torch.stack(self._unread).tolist()
        self._unread.clear()
        return [Step(loss, norm, not left_out, int(in_row)) for loss, norm, left_out, in_row in table]


class StopRequests:
    """Finds out whether any rank was asked to stop: ranks receive signals at different times, and one that stops alone
    would leave the others waiting. On GPUs, flags are exchanged with gloo during a step, and read in the next one."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._asked: tuple[object, Tensor] | None = None

    def answer(self) -> bool:
        """The result for the previous step; starts the exchange for this one. All ranks must call it once per step."""
        stopping = self._rank.stopping
        if self._rank.world_size == 1:
            return stopping
        import torch.distributed as dist

        flag = torch.tensor(float(stopping))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._rank.process_group(), async_op=True)
        before, self._asked = self._asked, (work, flag)
        if before is None:
            return False
        before[0].wait()  # type: ignore[attr-defined]
        return bool(before[1] > 0)
