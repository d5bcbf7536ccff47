"""Stages run here as a user runs them, on small data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.cli import build
from pipeline.config.schema import STAGES
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.stages import get_stage

Run = Callable[..., dict[str, Any]]


def run_stage(stage: str, rank: Rank | None = None, **settings: object) -> dict[str, Any]:
    """Run a stage in this process, as one rank; what ``_SUCCESS`` says."""
    return engine.run(get_stage(stage)(build(STAGES[stage], settings), rank or Rank()))


def digests(output: Path) -> dict[str, str]:
    """Data files and ledgers with the hashes of their bytes."""
    files = sorted(p for p in output.glob("data/*/[0-9]*/*") if p.name != "record.json")
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def run() -> Run:
    return run_stage
