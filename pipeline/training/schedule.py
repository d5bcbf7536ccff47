"""The learning rate as a function of the step alone, so that there is no state to save."""

from __future__ import annotations

import math


def learning_rate(step: int, peak: float, warmup_steps: int, steps: int, schedule: str = "cosine") -> float:
    """The rate for ``step`` (0 is the first): a linear rise to ``peak``, then a cosine to 0, or "constant"."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
