"""The stages of the main line and the tools around it; each is a program: ``python -m pipeline.stages.<name>``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.distributed import Rank
    from pipeline.partitions.dataset import Dataset
    from pipeline.partitions.stage import Stage


def get_stage(name: str) -> type[Stage]:
    """The class of a stage with partitions: download, filter, shard, precompute or generate."""
    return getattr(import_module(f"pipeline.stages.{name}"), name.capitalize())  # type: ignore[no-any-return]


def stage_that_made(dataset: Dataset, rank: Rank, *, lenient: bool) -> Stage:
    """The stage that made ``dataset``, with its settings, to work on it again; ``lenient``: whatever part failed."""
    from dataclasses import replace
    from typing import Any

    from pipeline.config import cli
    from pipeline.config.schema import STAGES

    config: Any = cli.build(STAGES[dataset.stage], dataset.header["config"])
    again = replace(config, output=str(dataset.root.path), overwrite=False, retry_failed=False, run_id="")
    return get_stage(dataset.stage)(replace(again, max_failed_fraction=1.0) if lenient else again, rank)
