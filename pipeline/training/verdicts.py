"""Whether each step is applied (its loss and gradient are finite): decided on the device, read only now and then.

On a GPU the host runs ahead of the device. Were it to look at every loss, the device would have nothing to do until
the host comes with the next step. So the test for NaN, and the count of steps in a row that failed it, are tensors; a
step that fails is left out by the optimizer's kernel itself, and after too many of them, all that follow. What happened
is read at boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed import Rank


@dataclass(frozen=True)
class Step:
    """What became of a step.

    ``in_row``: steps in a row, this one included, that were not finite.
    """

    loss: float
    norm: float
    applied: bool
    in_row: int


class Verdicts:
    """Judges steps on ``device``.

    Args:
        most: steps in a row that may be left out; one more, and nothing is applied any longer.
        in_row: left out in a row before the first step.
    """

    def __init__(self, device: torch.device, most: int, in_row: int = 0) -> None:
        self._most = torch.tensor(float(most), device=device)
        self._in_row = torch.tensor(float(in_row), device=device)
        self._over = torch.zeros((), dtype=torch.bool, device=device)
        self._unread: list[Tensor] = []
        self.immediate = device.type == "cpu"
        """Whether reading costs nothing."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 if the step is to be left out, else 0.0, float32 ().

        Args:
            loss, norm: of the whole batch (), so that all ranks find the same.
        """
        finite = loss.isfinite() & norm.isfinite()
        self._in_row = torch.where(finite, torch.zeros_like(self._in_row), self._in_row + 1)
        self._over = self._over | (self._in_row > self._most)
        left_out = (~finite | self._over).float()
        self._unread.append(torch.stack([loss.float(), norm.float(), left_out, self._in_row]))
        return left_out

    def read(self) -> list[Step]:
        """All steps since the last call; waits for the device."""
        if not self._unread:
            return []
        table = torch.stack(self._unread).tolist()
        self._unread.clear()
        return [Step(loss, norm, not left_out, int(in_row)) for loss, norm, left_out, in_row in table]


class StopRequests:
    """Whether any rank was asked to stop: ranks get signals at different times, and one that stops alone leaves the
    others waiting. On GPUs the question goes over gloo, next to the step, and is answered with the next one."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._asked: tuple[object, Tensor] | None = None

    def answer(self) -> bool:
        """To the question of the step before; asks that of this one. All ranks call it, once a step."""
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
