"""One stage of a command, ready to start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.request import Request
from pipeline.config import cli
from pipeline.config.schema import ConfigError, LaunchConfig, RunConfig, default_variant, run_folder, stage_folder
from pipeline.registry import stages
from pipeline.stores import is_url


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

    @classmethod
    def of(cls, stage: str, arguments: Sequence[str]) -> Job:
        """The job that a command for one stage describes.

        Raises:
            ConfigError: as :func:`pipeline.config.cli.load`.
        """
        config = cli.load(stage, arguments)
        return cls(stage, config, tuple(arguments), 1, output_of(stage, config), Request(LaunchConfig(stage=stage)))


def output_of(stage: str, config: Any) -> Path | None:
    """The output of the stage; None if it is a tool without an output.

    Raises:
        ConfigError: the output is in an object store, which has no place for logs.
    """
    if not isinstance(config, RunConfig):
        return None
    if is_url(config.output):
        raise ConfigError(
            f"output={config.output}: jobs keep their logs next to their output: run {cli.program(stage)} "
            "under srun or torchrun to write to an object store, or choose a local output= and stage=publish"
        )
    if config.output:
        return Path(config.output).absolute()
    if stage in ("train", "generate", "evaluate"):
        return run_folder(config, getattr(config, "name", "") or getattr(config, "task", "diffuse")).absolute()
    return stage_folder(config, stage, default_variant(config)).absolute()
