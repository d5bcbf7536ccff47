"""Advice is true: what a message says to set can be set, by the command that says it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.config.schema import (
    STAGES,
    DeviceConfig,
    LaunchConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    StatusConfig,
    TrainConfig,
)

ROOT = Path(__file__).parents[1]
_NAMED = re.compile(r"(?<![\w.<$&?/'\"-])(?:(\w+)\.)?([a-z][a-z0-9_]*)=(?![=\"'])")
SAID_OF_ANY_COMMAND = {"stage", "key", "help"}
"""``stage=filter`` names another command."""
IN_VALUES = {"activation", "layer", "length"}
"""Parts of a value: ``text_encoder=clip:name#layer=penultimate``."""
ELSEWHERE = {"journal_mode", "synchronous", "bytes", "version", "charset", "acdirmax", "user"}
"""SQLite, HTTP, mount options, SLURM's own commands."""


def options_of(*configs: type) -> set[str]:
    return {f.name for config in configs for f in fields(config)}


def options_of_stages(*names: str) -> set[str]:
    return options_of(*({**STAGES, "submit": LaunchConfig}[name] for name in names))


OWNERS: dict[str, tuple[type, ...]] = {
    "pipeline/partitions": (StageConfig,),
    "pipeline/sources": (SourceConfig,),
    "pipeline/training": (TrainConfig,),
    "pipeline/distributed": (DeviceConfig, RunConfig, LaunchConfig),
    **{f"pipeline/stages/{stage}.py": (cls,) for stage, cls in STAGES.items()},
    "launch/status.py": (StatusConfig,),
    "launch/monitor": (StatusConfig,),
}
"""Whose options a message may name, where only these commands say it."""
MEANT_FOR_OTHERS: dict[str, set[str]] = {
    "pipeline/partitions": {"keep_raw", "keep", "takedown", "source", "to"},  # what removes or publishes data; lists
    "pipeline/training": {"checkpoint"},  # of the stages that use a trained run
    "pipeline/stages/caption.py": {"prompt"},  # how the run was to be trained
    "pipeline/stages/generate.py": {"text_encoder"},  # how its latents were made
    "pipeline/stages/feidegger.py": options_of_stages("download", "filter"),  # arguments that it gives them
    "launch/monitor": options_of_stages("submit"),  # what SLURM says of what was submitted
}
"""And options of others that these sentences are about."""


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """String literals of a module, but for documentation; an f-string as a whole, with {} for its values."""
    tree = ast.parse(path.read_text())
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def named(path: Path) -> Iterator[tuple[int, set[str], str]]:
    """(line, stages that the sentence speaks of, option) of what the texts of a module say to set."""
    for line, text in texts(path):
        stages = {stage for stage in re.findall(r"stage=(\w+)", text) if stage in STAGES}
        for match in _NAMED.finditer(text):
            if match[2] not in SAID_OF_ANY_COMMAND | IN_VALUES | ELSEWHERE:
                yield line, {match[1]} & set(STAGES) or stages, match[2]


def modules() -> list[Path]:
    return [path for folder in ("pipeline", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]


def parameters() -> set[str]:
    """Names of parameters of functions and fields of classes, for messages to those who call them."""
    found = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def test_whatever_a_message_names_exists() -> None:
    known = options_of(*STAGES.values(), LaunchConfig, StatusConfig) | parameters()
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}="
        for path in modules()
        for line, _, name in named(path)
        if name not in known
    ]
    assert not wrong


@pytest.mark.parametrize("owner", OWNERS)
def test_a_message_names_options_of_the_command_that_says_it(owner: str) -> None:
    known = options_of(*OWNERS[owner])
    place = ROOT / owner
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}="
        for path in ([place] if place.is_file() else sorted(place.rglob("*.py")))
        for line, stages, name in named(path)
        if name not in known | options_of(*(STAGES[stage] for stage in stages)) | MEANT_FOR_OTHERS.get(owner, set())
    ]
    assert not wrong
