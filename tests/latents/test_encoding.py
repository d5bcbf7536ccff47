"""Encoding on a pretended GPU whose copies take their time: what is stored is what a CPU stores."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stages.conftest import digests, run_stage
from transfer_double import Gpus, TransferError

from pipeline.config.cli import build
from pipeline.config.schema import PrecomputeConfig
from pipeline.distributed import Rank
from pipeline.encoders.base import autoencoder, text_encoder
from pipeline.encoders.embedded import EmbeddedAutoencoder
from pipeline.encoders.preprocessing import Preprocessing
from pipeline.encoders.vision import _Patches
from pipeline.latents.encoding import Batch, Encoding
from pipeline.latents.image_decoding import Layout
from pipeline.latents.transfers import Transfers
from pipeline.partitions.dataset import Dataset
from pipeline.stages.precompute import Precompute


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 scenes in two partitions."""
    place = tmp_path_factory.mktemp("source") / "in"
    settings = {"source": "shapes", "count": 20, "image_size": 64, "holdout": False, "partition_size": 12}
    run_stage("download", **settings, output=str(place))
    return place


def encoding(device: str) -> Encoding:
    texts = {name: text_encoder("embedded", device) for name in ("caption_latents", "caption_latents_2")}
    return Encoding(
        device=torch.device(device),
        vae=autoencoder("embedded", device),
        texts=texts,
        image_encoder=None,
        resolutions=(64,),
        moments=False,
        storage="dense",
        dtype="float16",
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
def test_the_stage_stores_the_same_bytes(gpus: Gpus, tmp_path: Path, source: Path, workers: int) -> None:
    settings = {"input": str(source), "image_resolutions": (32, 64), "batch_size": "8", "workers": workers}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run_stage("precompute", **settings, output=str(tmp_path / "cpu"))
    run_stage("precompute", **settings, output=str(tmp_path / "gpu"))
    assert digests(tmp_path / "gpu") == digests(tmp_path / "cpu")


def test_features_are_encoded_beside_the_writer_and_the_same_on_a_gpu(
    gpus: Gpus, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    encode, fill = _Patches.encode, Layout.fill

    def encoding_here(self: _Patches, x: torch.Tensor) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        shapes.add(len(x))
        return encode(self, x)

    def filling_here(self: Layout, *arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        return fill(self, *arguments)

    shapes: set[int] = set()
    monkeypatch.setattr(_Patches, "encode", encoding_here)
    monkeypatch.setattr(Layout, "fill", filling_here)
    settings: dict[str, Any] = {"input": str(source), "batch_size": 8, "workers": 0}
    run_stage("features", **settings, output=str(tmp_path / "gpu"))
    assert threads == {"ahead"} and shapes == {8}, "all batches have one shape on a GPU"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run_stage("features", **settings, output=str(tmp_path / "cpu"))
    assert digests(tmp_path / "gpu") == digests(tmp_path / "cpu")


def test_means_and_deviations_are_not_copied_to_the_device(gpus: Gpus) -> None:
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3)
    with gpus.no_waits():
        there = preprocessing.normalise(pixels.pin_memory().to("cuda", non_blocking=True))
    assert torch.equal(there.cpu(), preprocessing.normalise(pixels))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_memory_that_does_not_suffice_is_known_by_its_messages(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, is_one: bool
) -> None:
    plain = encoding("cpu")
    encode, failed = EmbeddedAutoencoder.encode, []

    def failing(self: EmbeddedAutoencoder, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        if len(x) > 2:
            failed.append(len(x))
            raise error
        return encode(self, x, noise)

    monkeypatch.setattr(EmbeddedAutoencoder, "encode", failing)
    if is_one:
        assert plain.encode(batch()).finite.all() and failed == [4]
        return
    with pytest.raises(RuntimeError, match="illegal memory access"):
        plain.encode(batch())


def test_batches_stay_below_2_to_the_31_elements() -> None:
    plain = encoding("cpu")
    plain.vae.widest, plain.resolutions = 128, (1024,)
    assert plain.largest_batch() == 15


def test_the_batch_size_that_was_found_is_the_plans(
    gpus: Gpus, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([8, 16])
    monkeypatch.setattr(Encoding, "find_batch_size", lambda self: next(found))
    settings = {"input": str(source), "output": str(tmp_path / "out"), "image_resolutions": (64,), "batch_size": "auto"}
    run_stage("precompute", **settings)
    header = Dataset.open(tmp_path / "out").header
    assert header["extra"]["batch_size"] == 8
    later = Precompute(build(PrecomputeConfig, settings), Rank())
    later.planned_extra = header["extra"]
    assert later.batch_size == 8 and next(found) == 16, "a rank that adopts the plan has measured by itself"


def test_the_batch_size_is_measured_once_before_threads_ask_for_it(
    gpus: Gpus, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``cached_property`` has no lock from Python 3.12 on: two threads would measure, and might disagree."""
    measured: list[str] = []

    def measure(self: Encoding) -> int:
        measured.append(threading.current_thread().name)
        time.sleep(0.05)
        return 8 * len(measured)

    monkeypatch.setattr(Encoding, "find_batch_size", measure)
    settings = {"input": str(source), "output": str(tmp_path / "out"), "image_resolutions": (64,), "batch_size": "auto"}
    stage = Precompute(build(PrecomputeConfig, {**settings, "workers": 0}), Rank())
    line = stage._begin_line()
    try:
        assert measured == [threading.current_thread().name]
        together, seen = threading.Barrier(2), []

        def ask() -> None:
            together.wait(10)
            seen.append(stage.batch_size)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [8, 8] and len(measured) == 1
    finally:
        line.close()
        stage.close()


def test_latents_of_a_resolution_do_not_depend_on_the_others(tmp_path: Path) -> None:
    for number in range(3):
        coarse = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((700, 560 + number), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"{number}.jpg", quality=95)
    run_stage("download", source="image_folder", input=str(tmp_path), output=str(tmp_path / "raw"))
    found = {}
    for resolutions in ((32,), (32, 256)):
        place = tmp_path / f"latents{len(resolutions)}"
        run_stage("precompute", input=str(tmp_path / "raw"), output=str(place), image_resolutions=resolutions)
        dataset = Dataset.open(place)
        found[resolutions] = [stored.read()["latents_32"] for stored in dataset.samples(0)]
    assert found[(32,)] == found[(32, 256)]
