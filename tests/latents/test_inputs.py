"""Precompute reads what lies in any storage format; of what it cannot read it says how to make it readable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from latents.conftest import COUNT, Make
from PIL import Image
from stages.conftest import run_stage

from pipeline.partitions.dataset import Dataset, RandomAccess, Unfinished

SETTINGS = {"image_resolutions": (32, 64), "vae": "embedded16"}


@pytest.mark.parametrize("name", ["mds", "tar", "parquet", "ipc", "memmap", "hdf5"])
def test_latents_do_not_depend_on_how_pictures_are_stored(make: Make, dense: Path, tmp_path: Path, name: str) -> None:
    upstream = Dataset.open(dense).header["upstream"]["path"]
    run_stage("shard", input=upstream, output=str(tmp_path / "shards"), format=name, partition_size=12)
    run_stage("precompute", input=str(tmp_path / "shards"), output=str(tmp_path / "latents"), **SETTINGS)
    found, expected = (list(RandomAccess(Dataset.open(p)).rows(range(COUNT))) for p in (tmp_path / "latents", dense))
    assert found == expected


def test_other_folders_are_one_clear_error(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "one.png")
    with pytest.raises(Unfinished, match=r"no plan/ in it\): stage=download makes one of images, tars of WebDataset"):
        run_stage("precompute", input=str(tmp_path), output=str(tmp_path / "out"), **SETTINGS)
    with pytest.raises(Unfinished, match="stage precompute cannot start: .*nowhere does not exist"):
        run_stage("precompute", input=str(tmp_path / "nowhere"), output=str(tmp_path / "out"), **SETTINGS)
