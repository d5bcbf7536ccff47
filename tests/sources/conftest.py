"""The loopback server, and outputs in memory where that is possible."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources.server import Server

_MEMORY = Path("/dev/shm")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


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
