"""The stages of the main line and the tools around it; each is a program: ``python -m pipeline.stages.<name>``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.registry import ConfigError, stages

if TYPE_CHECKING:
    from pipeline.distributed import Rank
    from pipeline.partitions.dataset import Dataset
    from pipeline.partitions.stage import AnyStage


def get_stage(name: str) -> type[AnyStage]:
    """The class of the stage with partitions that is called ``name``.

    Raises:
        ConfigError: there is no such stage, or it has no partitions.
    """
    found = stages.get(name)
    if not isinstance(found, type):
        raise ConfigError(f"stage={name}: it does not write a dataset directory")
    return found


def stage_that_made(dataset: Dataset, rank: Rank, *, lenient: bool) -> AnyStage:
    """The stage that made ``dataset``, with its settings, to work on it again; ``lenient``: whatever part failed."""
    from dataclasses import replace
    from typing import Any

    from pipeline.config import cli
    from pipeline.config.schema import STAGES

    config: Any = cli.build(STAGES[dataset.stage], dataset.header["config"])
    again = replace(config, output=str(dataset.root.path), overwrite=False, retry_failed=False, run_id="")
    return get_stage(dataset.stage)(replace(again, max_failed_fraction=1.0) if lenient else again, rank)
