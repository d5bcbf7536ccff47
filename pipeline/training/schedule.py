"""The learning rate as a function of the step (and, for "plateau", of the metric's progress)."""

from __future__ import annotations

import math

from pipeline.config.schema import TrainConfig

SCHEDULES = ("cosine", "constant", "step", "plateau", "wsd")


def learning_rate(config: TrainConfig, step: int, reductions: int = 0) -> float:
    """The rate for ``step`` (from 0): linear warm-up to ``lr``, then according to ``schedule``, not below ``min_lr``.

    cosine: half a cosine down to ``min_lr``. step: multiplied by ``lr_factor`` after every fraction ``lr_step`` of the
    steps. plateau: multiplied by ``lr_factor`` for each of ``reductions``. wsd (Hu et al. 2024): constant, then
    linearly down to ``min_lr`` over the last fraction ``lr_step`` of the steps.
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
