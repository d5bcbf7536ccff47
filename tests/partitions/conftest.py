"""The fake stages are known to the engine, and outputs lie in memory where that is possible."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import fake_stage
import pytest

from pipeline.registry import Registered, stages

_MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def _fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in fake_stage.STAGES:
        monkeypatch.setitem(stages.added, name, Registered(fake_stage.STAGES[name], fake_stage.FakeConfig))
    monkeypatch.setattr("pipeline.partitions.engine._POLL", 0.02)
    monkeypatch.setattr("pipeline.partitions.planning._POLL", 0.02)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory (fsync costs milliseconds on disks), or on disk where there is no /dev/shm."""
    if not os.access(_MEMORY, os.W_OK):
        yield tmp_path
        return
    folder = _MEMORY / f"latentmill-test-{uuid.uuid4().hex}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
