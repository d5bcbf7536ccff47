"""The stages of the main line and the tools around it; each is a program: ``python -m pipeline.stages.<name>``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.partitions.stage import Stage


def get_stage(name: str) -> type[Stage]:
    """The class of a stage with partitions: download, filter, shard or precompute."""
    return getattr(import_module(f"pipeline.stages.{name}"), name.capitalize())  # type: ignore[no-any-return]
