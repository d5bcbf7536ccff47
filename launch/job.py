"""One stage of a command, ready to start."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.request import Request
from pipeline.registry import stages


@dataclass(frozen=True)
class Job:
    """One stage, ready to start: its config, and the arguments from which it is built."""

    stage: str
    config: Any
    arguments: tuple[str, ...]
    ranks: int
    output: Path | None
    request: Request
    """The resources that it requests from SLURM."""
    parts: tuple[Job, ...] = ()
    """The stages of a packed job (pack=true), in order; see launch/pack.py."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", stages.module(self.stage), *self.arguments]
