"""Trained models on a GPU (a pretended one): images, captions and classes, without waits where the work is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from image_files import picture, saved

from pipeline.config.schema import EvaluateConfig, TrainConfig
from pipeline.distributed import Rank
from pipeline.encoders.tokenizer import train_bpe
from pipeline.encoders.vision import vision_encoder
from pipeline.models.decoding import Decoding, write
from pipeline.stages import evaluate, evaluate_classes, generate
from pipeline.stages.caption import load_writer
from pipeline.stages.evaluate_classes import load_classifier
from pipeline.stages.generate import Manner, load_painter, sample_images
from pipeline.storage import Folder
from pipeline.training.images import ImageDataset
from pipeline.training.loop import train
from pipeline.training.tasks.caption import Caption, CaptionDataset, marks_of
from pipeline.training.tasks.classify import Classify
from pipeline.training.tasks.diffuse import Diffuse, LatentInfo

GPU = torch.device("cuda", 0)
SMALL: dict[str, Any] = {"steps": 1, "batch_size": 4, "log_every": 1}
PROMPTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as cuda:
        yield cuda


class Latents:
    def __len__(self) -> int:
        return 8

    def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        image, text = (torch.randn(8, *shape, generator=generator) for shape in ((4, 4, 4), (16, 64)))
        return {"image_latents": image[positions], "caption_latents": text[positions]}


class Images:
    def __len__(self) -> int:
        return 8

    def rows(self, positions: Any) -> list[dict[str, Any]]:
        texts = ["a red thing", "a blue thing"]
        return [
            {"key": str(p), "jpg": saved(picture(24, 20, int(p)), "PNG"), "label": int(p) % 3, "captions": texts}
            for p in positions
        ]


def trained(task: Any, data: Any, config: TrainConfig, place: Path) -> Path:
    torch.set_num_threads(1)
    with Folder.open(place) as folder:
        train(task, data, config, Rank(), folder)
    return place


@pytest.fixture(scope="module")
def painting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig(**SMALL)
    task = Diffuse(config, Latents(), LatentInfo("embedded", "embedded", 32, (4, 4, 4), (16, 64)))
    return trained(task, Latents(), config, tmp_path_factory.mktemp("painting"))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_are_drawn_without_waiting_for_a_step(
    sampler: str, precision: str, painting: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, drawn = generate.sample, []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(len(args[1]))
        if len(drawn) == 1:  # constants are copied once
            return sample(*args, **kwargs)
        with cuda.no_waits():
            return sample(*args, **kwargs)

    monkeypatch.setattr(generate, "sample", watched)
    painter = load_painter(painting, GPU, precision=precision)
    assert next(painter.model.parameters()).device == GPU and painter.precision == precision
    manner = Manner(4, 1.5, sampler)
    first, images = (sample_images(painter, PROMPTS, 0, manner) for _ in range(2))
    assert images.shape == (3, 32, 32, 3) and np.array_equal(first, images) and len(drawn) == 2
    if precision == "float32":
        on_cpu = sample_images(load_painter(painting, "cpu", precision="bfloat16"), PROMPTS, 0, manner)
        assert np.abs(on_cpu.astype(int) - images).max() <= 1


@pytest.fixture(scope="module")
def writing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig(**{**SMALL, "task": "caption", "encoder": "embedded", "max_length": 40})
    tokenizer = train_bpe(("a red thing", "a blue thing"), 300)
    encoder = vision_encoder("embedded")
    data = CaptionDataset(Images(), tokenizer, config.max_length, encoder, False)
    task = Caption(config, data, encoder.describe(), [["a red thing"]], [])
    return trained(task, data, config, tmp_path_factory.mktemp("writing"))


@pytest.mark.parametrize(
    "how", [Decoding(max_length=32), Decoding(max_length=32, top_p=0.9), Decoding(max_length=32, beams=3)]
)
def test_captions_are_written_and_seldom_looked_at(how: Decoding, writing: Path, cuda: FakeCuda) -> None:
    writer = load_writer(writing, GPU, "float32")
    images = [np.full((20, 30, 3), shade, np.uint8) for shade in (0, 90, 200)]
    texts = writer.write(images, how)
    assert texts == load_writer(writing, "cpu").write(images, how)
    features = writer.encoder.encode(writer.encoder.preprocess(images).to(GPU))
    prompts = writer.tokenizer.prompts([None] * 3)
    before = len(cuda.waits)
    write(writer.model, features, prompts, marks_of(writer.tokenizer), how)
    waits = Counter(wait.where for wait in cuda.waits[before:])
    if how.beams == 1:  # beams are sorted out on the host after every token
        assert sum(waits.values()) <= 12 + 32 / 8, waits


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig(**{**SMALL, "task": "classify", "depth": 1})
    data = ImageDataset(Images(), 16)
    return trained(Classify(config, data), data, config, tmp_path_factory.mktemp("judging"))


def test_classes_are_told_on_a_gpu(judging: Path, cuda: FakeCuda) -> None:
    images = torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8)
    ours, theirs = (
        load_classifier(judging, device, precision).probabilities(images)
        for device, precision in ((GPU, "float32"), ("cpu", "bfloat16"))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_evaluation_takes_the_gpu_unless_told_otherwise(
    painting: Path, judging: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def see(checkpoint: Path, device: torch.device, precision: str) -> None:
        raise Seen(device.type, precision)

    monkeypatch.setattr(generate, "load_painter", see)
    monkeypatch.setattr(evaluate_classes, "load_classifier", see)
    for judge, run in ((evaluate.evaluate_shapes, painting), (evaluate_classes.evaluate_classes, judging)):
        for asked, expected in (("auto", "cuda"), ("cpu", "cpu")):
            with pytest.raises(Seen) as seen:
                judge(EvaluateConfig(device=asked), run)
            assert seen.value.args == (expected, "bfloat16")
