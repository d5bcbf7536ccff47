"""Runs in a folder of their own, on one thread, so that sums come out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_training import Run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """A new life of the run called ``name``."""
    return lambda name="run": Run(tmp_path / name)
