"""The learning rate as a function of the step (and, for "plateau", of the metric's progress)."""

from __future__ import annotations

import math

from pipeline.config.schema import TrainConfig

SCHEDULES = ("cosine", "constant", "step", "plateau", "wsd")


def learning_rate(config: TrainConfig, step: int, reductions: int = 0) -> float:
    """The rate for ``step`` (0 is the first): a linear rise to ``lr``, then as ``schedule`` says, down to ``min_lr``.

    cosine: half a cosine to ``min_lr``. step: times ``lr_factor`` after every ``lr_step`` of the way. plateau: times
    ``lr_factor`` for each of ``reductions``. wsd (Hu et al. 2024): constant, and over the last ``lr_step`` of the way
    linearly to ``min_lr``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    if config.schedule == "step":
        return max(config.min_lr, config.lr * config.lr_factor ** int(done / config.lr_step + 1e-9))
    if config.schedule == "plateau":
        return max(config.min_lr, config.lr * config.lr_factor**reductions)
    share = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "wsd": min(1.0, (1 - done) / config.lr_step),
    }[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * share
