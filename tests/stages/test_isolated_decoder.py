"""Images that crash, hang, flood or take over the process that decodes them cost no stage more than their rows.

Of the stages that use a pool in the same way, one meets all kinds of evil, the others a few: each costs a process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty
import numpy as np
import pytest
from fake_stage import assert_sound
from PIL import Image
from stages.conftest import digests, run_stage

from pipeline.config.cli import build
from pipeline.config.schema import CaptionConfig, EvaluateConfig, VerifyConfig
from pipeline.imaging import decoder
from pipeline.imaging.decoder import ImageDecoder
from pipeline.imaging.worker_pool import WorkerLimits
from pipeline.latents import image_decoding
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.stages.caption import batches_about
from pipeline.stages.evaluate import evaluate_fidelity
from pipeline.stages.filter import Filter
from pipeline.stages.verify import main as verify
from pipeline.training.images import ImageDataset

COUNT = 30
EVIL = {f"{3 * n + 1:03d}-png": kind for n, kind in enumerate(faulty.EVIL)}
DIED = dict.fromkeys(faulty.EVIL, "decoder_crash")
REASONS = {**DIED, "hang": "decoder_timeout", "flood": "out_of_memory"}
FEW = {kind: REASONS[kind] for kind in ("segfault", "hang", "flood", "garbage", "raise")}
SETTINGS: dict[str, Any] = {"decode_timeout": 0.5, "worker_memory": 1024}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third one is evil, to decoders that are."""
    place = tmp_path_factory.mktemp("evil")
    (place / "images").mkdir()
    for number in range(COUNT):
        kind = EVIL.get(f"{number:03d}-png")
        data = faulty.evil_png(kind) if kind else harmless(number)
        (place / f"images/{number:03d}.png").write_bytes(data)
    run_stage("download", source="image_folder", input=str(place / "images"), output=str(place / "download"))
    run_stage("filter", input=str(place / "download"), output=str(place / "filter"), min_image_size=8)
    return place


def harmless(number: int) -> bytes:
    file = BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def planted(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Filter, "function", "faulty:judge")
    monkeypatch.setattr(image_decoding, "FILL", "faulty:fill")
    monkeypatch.setattr(decoder, "PIXELS", "faulty:pixels")
    monkeypatch.setattr(decoder, "SIZE", "faulty:size")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only these kinds are evil; the images of others are harmless."""
    monkeypatch.setenv("EVIL", " ".join(FEW))


def outcomes(output: Path) -> tuple[dict[str, str], list[str]]:
    """Reasons of the samples that failed, by what is evil about them, and the keys of those that were kept."""
    rows = SlotReader(Dataset.open(output), 0).ledger(["key", "outcome", "reason", "retryable"]).to_pylist()
    failed = {EVIL[row["key"]]: row["reason"] for row in rows if row["outcome"] == "failed"}
    assert all(row["retryable"] == row["reason"].startswith("decoder_") for row in rows if row["outcome"] == "failed")
    return failed, [row["key"] for row in rows if row["outcome"] == "kept"]


@pytest.mark.parametrize("stage", ["filter", "precompute", "features"])
def test_an_evil_image_is_a_failed_row(
    images: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = FEW if stage == "features" else REASONS
    monkeypatch.setenv("EVIL", " ".join(reasons))
    more: dict[str, Any] = {"min_image_size": 8} if stage == "filter" else {"batch_size": 8}
    more |= {"image_resolutions": (64,)} if stage == "precompute" else {}
    source = images / ("download" if stage == "filter" else "filter")
    settings = {"input": str(source), "max_failed_fraction": 1.0, **more, **SETTINGS}
    run_stage(stage, output=str(tmp_path / "out"), workers=("2" if stage == "filter" else 2), **settings)
    kept = [key for number in range(COUNT) if EVIL.get(key := f"{number:03d}-png") not in reasons]
    assert outcomes(tmp_path / "out") == (reasons, kept)


@pytest.mark.usefixtures("few")
def test_the_result_does_not_depend_on_the_number_of_workers(images: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        settings = {"input": str(images / "download"), "min_image_size": 8, "max_failed_fraction": 1.0, **SETTINGS}
        run_stage("filter", output=str(tmp_path / workers), workers=workers, **settings)
        assert_sound(tmp_path / workers)
        assert len(outcomes(tmp_path / workers)[0]) == len(FEW)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


@pytest.mark.usefixtures("few")
def test_verify_names_what_does_not_decode(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"input": str(images / "filter"), "deep": True, "workers": 1, **SETTINGS}
    assert verify(build(VerifyConfig, settings)) == 1
    lines = capsys.readouterr().out.splitlines()
    for key, kind in EVIL.items():
        if kind in FEW:
            assert sum(f"sample {key}: does not decode: {FEW[kind]}" in line for line in lines) == 1
    assert len(lines) == len(FEW) + 1


class Distance:
    """Stands in for torchmetrics', which take seconds to import: the distance between means, and the smaller count."""

    def __init__(self, **settings: Any) -> None:
        self.vectors: dict[bool, list[Any]] = {True: [], False: []}

    def update(self, vectors: Any, real: bool) -> None:
        self.vectors[real] += list(vectors)

    def compute(self) -> Any:
        real, drawn = (np.mean([vector.numpy() for vector in self.vectors[kind]], axis=0) for kind in (True, False))
        return np.abs(real - drawn).sum()


class Kernel(Distance):
    def compute(self) -> Any:
        return len(self.vectors[True]), len(self.vectors[False])


@pytest.mark.usefixtures("few")
def test_evaluate_leaves_out_what_does_not_decode(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles = {"fid": {"FrechetInceptionDistance": Distance}, "kid": {"KernelInceptionDistance": Kernel}}
    for name, double in doubles.items():
        monkeypatch.setitem(sys.modules, f"torchmetrics.image.{name}", SimpleNamespace(**double))
    place = str(images / "filter")
    given = {"metric": "fidelity", "generated": place, "reference": place, "features": "pixels", **SETTINGS}
    result = evaluate_fidelity(build(EvaluateConfig, given), tmp_path)
    assert {EVIL[key]: reason.partition(":")[0] for key, reason in result["failed"].items()} == FEW
    good = COUNT - len(FEW)
    assert result["values"] == {"fid": pytest.approx(0, abs=1e-6), "kid": good, "kid_std": good}


class Rows:
    """The images with labels."""

    def __len__(self) -> int:
        return COUNT

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        def image(key: str, number: int) -> bytes:
            return faulty.evil_png(EVIL[key]) if key in EVIL else harmless(number)

        keys = [(f"{n:03d}-png", n) for n in positions]
        return [{"key": key, "label": n, "jpg": image(key, n)} for key, n in keys]


@pytest.mark.usefixtures("few")
def test_labelled_images_that_do_not_decode_are_noted() -> None:
    with closing(ImageDecoder(WorkerLimits(0.5, 2**30))) as isolated:
        data = ImageDataset(Rows(), 64, decoder=isolated)
    labels = data.batch(np.arange(COUNT))["labels"].tolist()
    assert [n for n, label in enumerate(labels) if label != n] == [
        int(key[:3]) for key, kind in EVIL.items() if kind in FEW
    ]
    assert {EVIL[key]: reason.partition(":")[0] for key, reason in data.failed.items()} == FEW


class Writer:
    """Stands in for a trained captioner, which takes no part in this: its text about an image is its mean colour."""

    prompt = "none"

    def write(self, pictures: Sequence[np.ndarray], *more: Any) -> list[str]:
        return [str(round(float(picture.mean()), 3)) for picture in pictures]


@pytest.mark.usefixtures("few")
def test_caption_says_which_images_do_not_decode(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.caption.decoding_of", lambda *given: None)
    config = build(CaptionConfig, {"image_path": str(images / "images"), "batch_size": COUNT, **SETTINGS})
    ((_, lines),) = batches_about(config, Writer())  # type: ignore[arg-type]
    broken = {line["image"].replace(".", "-"): line["error"] for line in lines if "error" in line}
    failed = {EVIL[key]: error.partition(":")[0] for key, error in broken.items()}
    assert failed == FEW
    for number, line in enumerate(lines):
        if "error" not in line:
            pixels = np.asarray(Image.open(images / f"images/{number:03d}.png"))
            assert line["caption"] == str(round(float(pixels.mean()), 3))
