"""Traces of some steps by torch's profiler, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from pipeline.distributed import Rank
from pipeline.storage import Folder

FOLDER = "profile"
SKIPPED = 10
"""Steps of a life that are skipped before recording, as they include compilation and memory allocation."""


class Profiler:
    """Records ``steps`` steps of rank 0 to ``profile/steps_<first>-<last>.json`` in the run's folder.

    Args:
        steps: number of steps; 0: nothing is recorded.
        left: steps that remain for this life; if few, the last ones are recorded.
    """

    def __init__(self, run: Folder, rank: Rank, steps: int, left: int) -> None:
        self._run, self._rank = run, rank
        self._first = max(0, min(SKIPPED, left - steps))
        self._last = min(left, self._first + steps) - 1
        self._number = 0
        self._on = steps > 0 and left > 0 and rank.is_main
        self._profile: Any = None

    def step(self, step: int) -> None:
        """Call when step ``step`` of the run begins."""
        if self._on and self._number == self._first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._rank.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profile.start()
            self._begin = step
        self._number += 1

    def done(self, step: int) -> None:
        """Call when step ``step`` of the run has ended."""
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
