"""Latents of a real network, made and checked in depth on a pretended GPU: no mix of devices, and nothing waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stages.conftest import run_stage
from transfer_double import Gpus

from pipeline.partitions.dataset import Dataset
from pipeline.stages import verify

HOT = ("latents/encoding.py", "latents/transfers.py", "latents/stage.py", "stages/precompute.py", "preprocessing.py")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made before anything is pretended: diffusers makes types of what torch.cuda has when it is imported."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, **blocks).save_pretrained(path)
    return str(path)


def test_latents_are_made_without_waiting_and_pass_the_deep_check(
    vae: str, gpus: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    source = {"source": "shapes", "count": 20, "image_size": 64, "holdout": False, "partition_size": 12}
    run_stage("download", **source, output=str(tmp_path / "in"))
    settings: dict[str, Any] = {"image_resolutions": (32, 64), "batch_size": "8", "vae": vae}
    run_stage("precompute", **settings, input=str(tmp_path / "in"), output=str(tmp_path / "out"))
    assert set(precisions) == {"high"}, "float32 is TF32 on a GPU"
    assert [line for line in gpus.blocking if any(place in line for place in HOT)] == []
    found = [finding.what for finding in verify.findings_of(tmp_path / "out", deep=True)[1]]
    assert len(found) == 1 and "brings back a smooth" in found[0], "random weights, and nothing else to find"
    speed = (Dataset.open(tmp_path / "out").record(1) or {})["notes"]["speed"]
    assert 0 <= speed["mfu"] < 1 and speed["images_per_second"] > 0
