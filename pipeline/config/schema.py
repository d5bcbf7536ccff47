"""All configs, and functions that apply to any of them.

Each module of this package declares the options of one owner as a frozen dataclass whose fields are created by
:func:`pipeline.config.options.option`. Two runs with the same identity fields, inputs and stage versions write the same
bytes; ranks, workers, time-outs and paths are not part of the identity. :mod:`pipeline.config.cli` converts
``key=value`` settings to configs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.caption import CaptionConfig
from pipeline.config.curate import ScoreConfig, SelectConfig
from pipeline.config.dedup import DedupConfig
from pipeline.config.encode import EncodingConfig, FeaturesConfig, PrecomputeConfig, TextsConfig, TextStatesConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.filter import FilterConfig
from pipeline.config.generate import GenerateConfig
from pipeline.config.launch import DoctorConfig, LaunchConfig, StatusConfig
from pipeline.config.options import Options, default_value, holds, inherited_condition, option
from pipeline.config.recaption import RecaptionConfig
from pipeline.config.redaction import public, public_text
from pipeline.config.run import DeviceConfig, RunConfig, StageConfig, dataset_name, run_folder, stage_folder
from pipeline.config.shard import FORMATS, ShardConfig
from pipeline.config.sources import (
    ArchiveOptions,
    DownloadConfig,
    FetchOptions,
    ImageFolderOptions,
    ShapesOptions,
    SourceConfig,
    SourceOptions,
    UrlListOptions,
)
from pipeline.config.tools import (
    CompactConfig,
    CostConfig,
    FeideggerConfig,
    GcConfig,
    PublishConfig,
    RepairConfig,
    ReportConfig,
    TakedownConfig,
    ToolConfig,
    VerifyConfig,
)
from pipeline.config.train import AugmentationOptions, CaptionTaskOptions, ClassifyOptions, DiffuseOptions, TrainConfig
from pipeline.registry import ConfigError, Traits, stages

__all__ = [
    "CURATION",
    "FORMATS",
    "MAIN_LINE",
    "STAGES",
    "ArchiveOptions",
    "AugmentationOptions",
    "CaptionConfig",
    "CaptionTaskOptions",
    "ClassifyOptions",
    "CompactConfig",
    "ConfigError",
    "CostConfig",
    "DedupConfig",
    "DeviceConfig",
    "DiffuseOptions",
    "DoctorConfig",
    "DownloadConfig",
    "EncodingConfig",
    "EvaluateConfig",
    "FeaturesConfig",
    "FeideggerConfig",
    "FetchOptions",
    "FilterConfig",
    "GcConfig",
    "GenerateConfig",
    "ImageFolderOptions",
    "LaunchConfig",
    "PrecomputeConfig",
    "PublishConfig",
    "RecaptionConfig",
    "RepairConfig",
    "ReportConfig",
    "RunConfig",
    "ScoreConfig",
    "SelectConfig",
    "ShapesOptions",
    "ShardConfig",
    "SourceConfig",
    "SourceOptions",
    "StageConfig",
    "StatusConfig",
    "TakedownConfig",
    "TextStatesConfig",
    "TextsConfig",
    "ToolConfig",
    "TrainConfig",
    "UrlListOptions",
    "VerifyConfig",
    "dataset_name",
    "default_of",
    "default_variant",
    "identity",
    "option",
    "public",
    "public_text",
    "run_folder",
    "stage_folder",
    "traits_of",
]


class _StageConfigs(Mapping[str, type[Options]]):
    """The config class of each stage by name; those of installed packages are loaded on request."""

    def __getitem__(self, name: str) -> type[Options]:
        if name not in stages:
            raise KeyError(name)
        return stages.options(name) or Options

    def __iter__(self) -> Iterator[str]:
        return iter(stages)

    def __len__(self) -> int:
        return len(list(stages))

    def __contains__(self, name: object) -> bool:
        return name in stages


STAGES: Mapping[str, type[Options]] = _StageConfigs()
MAIN_LINE = ("download", "filter", "shard", "precompute", "train")
CURATION = ("dedup", "score", "select", "recaption")
"""Stages between filter and shard, which stage=all runs if they are configured."""


def traits_of(stage: str) -> Traits:
    """How a stage runs, without importing it. Names that are not stages, such as packed jobs, have no traits."""
    if stage not in stages:
        return Traits()
    return (stages.options(stage) or Options).traits


def identity(config: Any) -> dict[str, Any]:
    """The fields of ``config`` on which the bytes of the result depend, as JSON-serializable values.

    Options that a config shares with another stage are included only if they have an effect.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        f.name: public(values[f.name])
        for f in dataclasses.fields(config)
        if f.metadata.get("identity") and holds(inherited_condition(type(config), f), values)
    }


def default_of(cls: type, name: str) -> Any:
    """Default of a field as a JSON-serializable value, for settings that are missing in older plans."""
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    value = default_value(field)
    return list(value) if isinstance(value, tuple) else value


def default_variant(config: RunConfig) -> str:
    """The suffix of a stage's folder: as given, or otherwise the one that distinguishes results of this stage."""
    return config.variant or config.default_variant
