"""Encoding on a pretended GPU whose copies take their time: what is stored is what a CPU stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stages.conftest import digests, run_stage
from transfer_double import Gpus, TransferError

from pipeline.encoders.base import autoencoder, text_encoder
from pipeline.latents.encoding import Batch, Encoding
from pipeline.latents.transfers import Transfers


def encoding(device: str) -> Encoding:
    texts = {name: text_encoder("embedded", device) for name in ("caption_latents", "caption_latents_2")}
    return Encoding(
        torch.device(device), autoencoder("embedded", device), texts, None, (64,), False, "dense", "float16"
    )


def batch() -> Batch:
    slots = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3 * 64 * 64), dtype=np.uint8))
    return Batch(slots.pin_memory() if torch.cuda.is_available() else slots, captions=["a", "b", "c"])


def test_results_are_there_once_they_are_waited_for(gpus: Gpus) -> None:
    expected = encoding("cpu").encode(batch())
    found = encoding("cuda:0").encode(batch())
    found.wait()
    assert found.finite.all() and found.texts_finite.all()
    assert torch.equal(found.columns["latents_64"], expected.columns["latents_64"])
    assert torch.equal(found.texts["caption_latents_2"], expected.texts["caption_latents_2"])


def test_a_stack_of_copies_in_flight_is_found(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The double would have found a fault that there was: flags stacked on the host while they were being copied."""
    download = Transfers.download

    def too_early(self: Transfers, values: torch.Tensor) -> torch.Tensor:
        return torch.stack([download(self, value) for value in values.unbind()])

    monkeypatch.setattr(Transfers, "download", too_early)
    with pytest.raises(TransferError, match="pipeline/latents/.*still on their way"):
        encoding("cuda:0").encode(batch())
    gpus.errors.clear()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stage_stores_the_same_bytes(gpus: Gpus, tmp_path: Path, workers: int) -> None:
    source = {"source": "shapes", "count": 20, "image_size": 64, "holdout": False, "partition_size": 12}
    run_stage("download", **source, output=str(tmp_path / "in"))
    settings = {"input": str(tmp_path / "in"), "image_resolutions": (32, 64), "batch_size": "8", "workers": workers}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run_stage("precompute", **settings, output=str(tmp_path / "cpu"))
    run_stage("precompute", **settings, output=str(tmp_path / "gpu"))
    assert digests(tmp_path / "gpu") == digests(tmp_path / "cpu")
