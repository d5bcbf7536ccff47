"""The resources that a command requests: options of LaunchConfig, options of sbatch, and a site's preset.

Layers, later ones win: defaults < preset < the preset's section for a stage < command line < ``<stage>.<key>`` there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from launch.quantities import minutes
from pipeline.config import cli
from pipeline.config.options import condition_text, without_effect
from pipeline.config.schema import STAGES, ConfigError, LaunchConfig
from pipeline.config.yaml_files import read_settings

KINDS = ("local", "inline", "slurm")
PRESETS = cli.CONF / "cluster"
_OF_ALL = ("stage", "cluster", "ranks", "dry_run", "pack")  # keys that are the same for all stages of a command
_FIELDS = {f.name for f in fields(LaunchConfig)}
_PER_STAGE = _FIELDS - set(_OF_ALL)
_ALSO = ("gpus",)  # alternative to gpus_per_node=
_OURS = {
    "array": "array=",
    "chdir": "the folder to submit from",
    "job_name": "",
    "ntasks": "nodes= and tasks_per_node=",
    "ntasks_per_node": "tasks_per_node=",
    "open_mode": "",
    "output": "",
    "error": "",
    "requeue": "",
    "signal": "signal_seconds=",
    "wait": "",
}
"""Options of sbatch that the launcher sets itself, and the key to use instead, if there is one."""


@dataclass(frozen=True)
class Request:
    """The resources that one stage requests."""

    config: LaunchConfig
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch, by their long names."""


@dataclass(frozen=True)
class Launch:
    """A parsed command line."""

    kind: str
    """local, inline or slurm."""
    config: LaunchConfig
    settings: dict[str, str]
    """Settings of stages: all keys that are not options of the launcher."""
    requests: Mapping[str, Request]
    """Stage → its request."""


def read(arguments: list[str]) -> Launch:
    """Parse a command line.

    Raises:
        ConfigError: a key or value is invalid, or a preset does not exist.
    """
    given = cli.parse(arguments)
    stages = str(given.get("stage", "")).split(",")
    theirs = {key for key in given if not _is_ours(key) or (key == "gpus" and "cost" in stages)}
    settings = {key: value for key, value in given.items() if key in theirs}
    own = {key: value for key, value in given.items() if key not in theirs}
    kind, preset = load_preset(own.get("cluster", "local"))
    layers = [*_layers(preset), *_layers(own)]
    config, _ = _build(layers, "")
    if kind == "slurm" and "ranks" in own:
        raise ConfigError("ranks= is for cluster=local; on SLURM: nodes= and tasks_per_node=")
    requests = {stage: Request(*_build(layers, stage)) for stage in STAGES}
    _require_effect(preset | own, kind, requests)
    return Launch(kind, config, settings, requests)


def _require_effect(given: Mapping[str, Any], kind: str, requests: Mapping[str, Request]) -> None:
    """Refuse options that have no effect on any stage, such as those for another kind of cluster.

    Raises:
        ConfigError: there is such an option; the message names it.
    """
    configs = {stage: replace(request.config, cluster=kind) for stage, request in requests.items()}
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        if name.startswith("slurm_"):
            found = {} if kind == "slurm" else {name: "cluster=slurm"}
        else:
            chosen = [configs[section]] if section else configs.values()
            found = min((without_effect(config, [name]) for config in chosen), key=len)
        for condition in found.values():
            raise ConfigError(f"{key}={value} has no effect with cluster={kind}: it needs {condition_text(condition)}")


def _is_ours(key: str) -> bool:
    section, dot, name = key.rpartition(".")
    if dot and section not in STAGES:
        return False
    return name.startswith("slurm_") or name in (_PER_STAGE if dot else _FIELDS) or name in _ALSO


def load_preset(name: str) -> tuple[str, dict[str, Any]]:
    """The kind of ``cluster=<name>``, and the settings of its preset.

    Raises:
        ConfigError: there is no preset of this name, or its file is invalid.
    """
    if name in ("local", "inline"):
        return name, {}
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = {*KINDS, *(preset.stem for preset in PRESETS.glob("*.yaml"))}
        raise ConfigError(
            f"cluster={name}: no such preset; {cli.nearest(name, known)} (or give a path to a .yaml file)"
        )
    values = read_settings(path)
    if values.get("kind") not in KINDS:
        raise ConfigError(f"{path}: expected a mapping with kind: {', '.join(KINDS)}")
    return str(values.pop("kind")), _flat(values, path)


def _flat(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert ``precompute: {nodes: 2}`` to ``precompute.nodes: 2``; unknown keys raise ConfigError."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in STAGES and isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[str(key)] = value
    for key in flat:
        if not _is_ours(key) or key in ("stage", "cluster"):
            raise ConfigError(f"{path}: unknown key {key!r}; {cli.nearest(key.rpartition('.')[2], _PER_STAGE)}")
    return flat


def _layers(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Pairs (stage, settings), beginning with the settings for all stages, whose stage is ""."""
    layers: dict[str, dict[str, Any]] = {"": {}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        layers.setdefault(section, {})[name] = value
    return list(layers.items())


def _build(layers: list[tuple[str, dict[str, Any]]], stage: str) -> tuple[LaunchConfig, dict[str, str]]:
    values: dict[str, Any] = {}
    for section, layer in layers:
        if section in ("", stage):
            values |= _with_gpus(layer, values)
    options = {name.removeprefix("slurm_"): _text(values.pop(name)) for name in [*values] if name.startswith("slurm_")}
    for name in options:
        if name.replace("-", "_") in _OURS:
            instead = _OURS[name.replace("-", "_")]
            raise ConfigError(f"slurm_{name}= is set by the launcher" + (f": use {instead}" if instead else ""))
    config = cli.build(LaunchConfig, values)
    _check(config)
    return config, options


_GPUS = re.compile(r"(?:([A-Za-z][\w.-]*):)?(\d+)")


def _with_gpus(layer: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """``layer`` with ``gpus=``, ``gpus_per_node=h100:8`` and ``gres=gpu:h100:8`` as ``gpus_per_node=8 gpu_type=h100``.

    Raises:
        ConfigError: the number is invalid, or GPUs are requested in two ways.
    """
    layer = dict(layer)
    gres = [word for word in str(layer.get("gres", "")).split(",") if word]
    gpu = [word for word in gres if word.partition(":")[0] == "gpu"]
    ways = [name for name in ("gpus_per_node", "gpus") if layer.get(name) not in (None, "", 0, "0")]
    ways += ["gres=gpu"] if gpu else []
    if len(ways) > 1 or len(gpu) > 1:
        raise ConfigError(f"{' and '.join(ways)} request GPUs twice: use only gpus_per_node=")
    if not ways:
        return layer
    if gpu:
        text = gpu[0].partition(":")[2] or "1"
        layer["gres"] = ",".join(word for word in gres if word not in gpu)
    else:
        text = str(layer.pop(ways[0]))
    found = _GPUS.fullmatch(text if text[-1:].isdigit() else f"{text}:1" if gpu else text)
    if not found:
        raise ConfigError(f"{ways[0]}={text}: expected a number, or a type and a number, as h100:8")
    count = int(found[2])
    if ways == ["gpus"]:
        nodes = str(layer.get("nodes", before.get("nodes", 1)))
        if nodes.isdigit() and int(nodes) and count % int(nodes):
            raise ConfigError(f"gpus={text}: not the same number on each of nodes={nodes}: use gpus_per_node=")
        count //= int(nodes) if nodes.isdigit() and int(nodes) else 1
    return {**layer, "gpus_per_node": count, **({"gpu_type": found[1]} if found[1] else {})}


def _check(config: LaunchConfig) -> None:
    """Raises ConfigError for options that SLURM would refuse late or cannot satisfy."""
    for name in ("gpu_type", "gpu_bind"):
        if getattr(config, name) and not config.gpus_per_node:
            raise ConfigError(f"{name}={getattr(config, name)}: there are no GPUs; set gpus_per_node=")
    if config.after and not re.fullmatch(r"((after\w+:)?\d+(_\d+)?)([,:](after\w+:)?\d+(_\d+)?)*", config.after):
        raise ConfigError(f"after={config.after}: expected the ids of jobs, as 1234 or 1234,1240")
    limit = 60 * minutes(config.time) if config.time else float("inf")
    if config.signal_seconds >= limit:
        raise ConfigError(
            f"signal_seconds={config.signal_seconds}: ranks would be told to stop as soon as they start, with "
            f"time={config.time}; make one shorter or the other longer"
        )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
