"""Options of every stage, and the folders that they determine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.options import ConfigError, Options, option


def seed_option(when: str = "") -> Any:
    """``seed``, which a stage declares again where it has no effect with some settings."""
    return option(0, "seed; all randomness is keyed by it and the sample's key", identity=True, ge=0, when=when)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """Every stage that runs on ranks."""

    dataset: str = option("", "a name in pipeline/conf/dataset (shapes, image_folder, ...) or a path to your own YAML")
    data_dir: str = option("", "root of everything: <data_dir>/<dataset>/<split>/<stage>[-<variant>]")
    split: str = option("train", "split of the dataset: train, valid, test, ...")
    subset: str = option(
        "", "small: about 1 % of a published dataset, for a first try; stored in <dataset>-<subset>", when="dataset"
    )
    input: str = option(
        "", "folder to read (also s3://, gs://, az://, hf://), instead of the upstream stage's folder below data_dir"
    )
    output: str = option("", "folder to write, instead of the stage's folder below data_dir")
    variant: str = option("", "suffix of the stage's folder, to keep several results side by side")
    seed: int = seed_option()
    expect_world_size: int = option(0, "stop unless exactly this many ranks were started (0: any number)", ge=0)
    rank_offset: int = option(0, "array jobs: added to the rank of this job's first task", ge=0)
    world_size: int = option(0, "array jobs: ranks of all elements together", ge=0)
    hang_timeout: float = option(
        1800.0, "seconds without progress after which a rank logs where it is stuck and exits (0: never)", ge=0
    )
    run_id: str = option(
        "", "identifier of a submission, the same on all its ranks and lives (default: set by the launcher)"
    )

    @property
    def default_variant(self) -> str:
        """The suffix of the stage's folder if ``variant`` is empty."""
        return ""


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Options):
    """Every stage that runs networks."""

    device: str = option(
        "auto",
        "auto: this rank's GPU, or the CPU where there is none (an error if GPUs were assigned but cannot be used); "
        "cpu; cuda",
        choices=("auto", "cpu", "cuda"),
    )


@dataclass(frozen=True, kw_only=True)
class StageConfig(RunConfig):
    """Every stage that works through partitions."""

    overwrite: bool = option(False, "move an existing output of this stage aside and start again")
    retry_failed: bool = option(False, "append a generation that retries the retryable failures")
    compact: bool = option(
        False,
        "pack ledgers and records into a few files when the stage has finished: half the inodes, see stage=compact",
    )
    restore: bool = option(False, "restore data that keep_raw=false or keep=latents have removed")
    max_failed_fraction: float = option(
        0.1, "the stage fails if more than this fraction of its samples failed", ge=0, le=1
    )
    lease: float = option(60.0, "seconds without a heartbeat after which another rank takes over a partition", gt=0)
    wait: float = option(0.0, "seconds to wait for an unfinished upstream stage before giving up", ge=0)


@dataclass(frozen=True, kw_only=True)
class CurationConfig(StageConfig):
    """Every stage that decides which samples go on, and with which captions."""

    curation: str = option(
        "", "settings of these stages by a name in pipeline/conf/recipe (curate), or by your own YAML"
    )


def stage_folder(config: RunConfig, stage: str, variant: str = "") -> Path:
    """The folder of ``stage`` for this dataset: ``<data_dir>/<dataset>/<split>/<stage>[-<variant>]``."""
    if not config.data_dir or not config.dataset:
        raise ConfigError(f"give data_dir= and dataset=, or input= and output=, to place stage {stage!r}")
    name = f"{stage}-{variant}" if variant else stage
    return Path(config.data_dir) / dataset_name(config.dataset, config.subset) / config.split / name


def run_folder(config: RunConfig, name: str) -> Path:
    """The folder of a training run: ``<data_dir>/<dataset>/runs/<name>``."""
    if not config.data_dir or not config.dataset:
        raise ConfigError("give data_dir= and dataset=, or output=, to place the run")
    return Path(config.data_dir) / dataset_name(config.dataset, config.subset) / "runs" / name


def dataset_name(dataset: str, subset: str = "") -> str:
    """Folder name of a dataset: its own name, or the stem of its YAML file, and the subset."""
    name = Path(dataset).stem if dataset.endswith((".yaml", ".yml")) else dataset
    return f"{name}-{subset}" if subset else name
