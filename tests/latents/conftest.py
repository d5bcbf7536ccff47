"""Small datasets of latents, made by the stage itself with encoders that need no weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stages.conftest import run_stage

from pipeline.partitions.dataset import Dataset

COUNT = 47
Make = Callable[..., Dataset]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes latents of 47 scenes in four partitions, with any settings of the stage."""
    root = tmp_path_factory.mktemp("latents")
    run_stage(
        "download",
        source="shapes",
        count=COUNT,
        image_size=64,
        holdout=False,
        partition_size=12,
        output=str(root / "in"),
    )
    made: dict[str, Dataset] = {}

    def make(name: str, **settings: Any) -> Dataset:
        if name not in made:
            given = {"image_resolutions": (32, 64), "vae": "embedded16", **settings}
            run_stage("precompute", input=str(root / "in"), output=str(root / name), **given)
            made[name] = Dataset.open(root / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def dense(make: Make) -> Path:
    return make("dense").root.path
