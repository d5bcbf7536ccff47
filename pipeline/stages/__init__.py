"""The pipeline's stages and the tools around them; each is a program: ``python -m pipeline.stages.<name>``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.registry import ConfigError, stages

if TYPE_CHECKING:
    from pipeline.distributed import Rank
    from pipeline.partitions.dataset import Dataset
    from pipeline.partitions.stage import AnyStage


def get_stage(name: str) -> type[AnyStage]:
    """Return the class of the stage ``name``, which must be one that writes partitions.

    Raises:
        ConfigError: there is no such stage, or it does not write partitions.
    """
    found = stages.get(name)
    if not isinstance(found, type):
        raise ConfigError(f"stage={name}: it does not write a dataset directory")
    return found


def stage_that_made(dataset: Dataset, rank: Rank, *, lenient: bool) -> AnyStage:
    """Recreate the stage that made ``dataset``, with its settings.

    ``lenient``: accept any fraction of failed samples.
    """
    from dataclasses import replace
    from typing import Any

    from pipeline.config import cli
    from pipeline.config.schema import STAGES

    config: Any = cli.build(STAGES[dataset.stage], dataset.header["config"])
    again = replace(config, output=str(dataset.root.path), overwrite=False, retry_failed=False, run_id="")
    return get_stage(dataset.stage)(replace(again, max_failed_fraction=1.0) if lenient else again, rank)
