"""A trace of some steps by torch's profiler, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from pipeline.distributed import Rank
from pipeline.storage import Folder

FOLDER = "profile"
SKIPPED = 10
"""Steps of a life before the first that is recorded: compilation, and memory that is allocated."""


class Profiler:
    """Records ``steps`` steps of rank 0 into ``profile/steps_<first>-<last>.json`` of the run's folder.

    Args:
        steps: 0: nothing is recorded.
        left: steps that this life has to do; of few, the last ones are recorded.
    """

    def __init__(self, run: Folder, rank: Rank, steps: int, left: int) -> None:
        self._run, self._rank = run, rank
        self._first = max(0, min(SKIPPED, left - steps))
        self._last = min(left, self._first + steps) - 1
        self._number = 0
        self._on = steps > 0 and left > 0 and rank.is_main
        self._profile: Any = None

    def step(self, step: int) -> None:
        """A step begins, the ``step``-th of the run."""
        if self._on and self._number == self._first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._rank.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profile.start()
            self._begin = step
        self._number += 1

    def done(self, step: int) -> None:
        """The ``step``-th step of the run has ended."""
        if self._profile is not None and self._number > self._last:
            self.close(step)

    def close(self, step: int) -> None:
        """Write what was recorded, also if the run ends early."""
        if self._profile is None:
            return
        profile, self._profile, self._on = self._profile, None, False
        profile.stop()
        name = f"steps_{self._begin:06d}-{step:06d}.json"
        with suppress(FileExistsError):
            self._run.mkdir(FOLDER)
        place = self._run.path / FOLDER / name
        profile.export_chrome_trace(str(place))
        self._rank.log.info("profile=: %s; open it in https://ui.perfetto.dev", place)
