"""Trained models on a GPU (a pretended one): images, captions and classes, without waits where the work is done."""

from __future__ import annotations

import json
import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from image_files import picture, saved
from stages.conftest import run_stage

from pipeline.captioning.trained_run import load_writer
from pipeline.config.schema import EvaluateConfig, TrainConfig
from pipeline.distributed import Rank
from pipeline.encoders.tokenizer import train_bpe
from pipeline.encoders.vision import vision_encoder
from pipeline.imaging.decoder import ImageDecoder
from pipeline.metrics import fidelity
from pipeline.models.text_generation import Decoding, write
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.stages import evaluate, evaluate_classes, generate
from pipeline.stages.caption import Caption as CaptionStage
from pipeline.stages.evaluate_classes import load_classifier
from pipeline.stages.generate import Manner, load_painter, sample_images
from pipeline.storage import Folder
from pipeline.training.images import ImageDataset
from pipeline.training.loop import train
from pipeline.training.tasks.caption import Caption, CaptionDataset, marks_of
from pipeline.training.tasks.classify import Classify
from pipeline.training.tasks.diffuse import Diffuse, LatentInfo

GPU = torch.device("cuda", 0)
SMALL: dict[str, Any] = {"steps": 1, "batch_size": 4, "log_every": 1, "workers": 0}
PROMPTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as cuda:
        yield cuda


class Latents:
    def __len__(self) -> int:
        return 8

    def batch(self, positions: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, torch.Tensor]:
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
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network of transformers, made before anything is pretended."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(place)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place)
    return f"vit:{place}"


def writer_of(encoder_name: str, place: Path) -> Path:
    """Trained on a GPU where one is pretended."""
    config = TrainConfig(**{**SMALL, "task": "caption", "encoder": encoder_name, "max_length": 40})
    tokenizer = train_bpe(("a red thing", "a blue thing"), 300)
    encoder = vision_encoder(encoder_name, device=Rank().device)
    data = CaptionDataset(Images(), tokenizer, config.max_length, encoder, False)
    task = Caption(config, data, encoder.describe(), [["a red thing"]], [])
    assert b"CudaTensor" not in pickle.dumps((task.for_workers(), data)), "what worker processes get has no network"
    return trained(task, data, config, place)


@pytest.fixture(scope="module")
def writing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writer_of("embedded", tmp_path_factory.mktemp("writing"))


def test_captions_are_written_from_the_features_of_a_network(vit: str, tmp_path: Path, cuda: FakeCuda) -> None:
    place = writer_of(vit, tmp_path)
    writer = load_writer(place, GPU, "float32")
    assert writer.encoder.model.device == GPU
    images = [np.full((20, 30, 3), shade, np.uint8) for shade in (0, 90, 200)]
    how = Decoding(max_length=8)
    features = writer.encoder.encode(writer.encoder.preprocess(images).to(GPU))
    assert features.device == GPU and features.dtype == torch.float32
    with cuda.no_waits():
        writer.encoder.encode(torch.zeros(2, 3, 32, 32, device=GPU))
    assert writer.write(images, how) == load_writer(place, "cpu").write(images, how)


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
    looks = 32 / 8 if how.beams == 1 else 32  # the host keeps the texts of beams, and reads once per token
    assert sum(waits.values()) <= 12 + looks, waits


def test_a_data_set_is_captioned_on_a_gpu(
    writing: Path, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tmp_path / "in")
    run_stage("download", source="shapes", count=20, image_size=48, holdout=False, partition_size=12, output=source)
    settings: dict[str, Any] = {"checkpoint": str(writing), "batch_size": 4, "max_length": 32, "precision": "float32"}
    run_stage("caption", Rank(device="cpu"), **settings, input=source, output=str(tmp_path / "cpu"))
    encode, waits = CaptionStage.encode, []

    def counted(self: CaptionStage, *arguments: Any) -> list[str]:
        before = len(cuda.waits)
        texts = encode(self, *arguments)
        ours = threading.get_ident()
        waits.append(Counter(wait.where for wait in cuda.waits[before:] if wait.thread == ours))
        return texts

    monkeypatch.setattr(CaptionStage, "encode", counted)
    run_stage("caption", **settings, input=source, output=str(tmp_path / "gpu"))
    assert len(waits) == 5 and all(sum(batch.values()) <= 12 + 32 / 8 for batch in waits), waits
    ours, theirs = (
        [row["generated"] for row in RandomAccess(Dataset.open(tmp_path / name)).rows(range(20))]
        for name in ("gpu", "cpu")
    )
    assert ours == theirs and len(ours) == 20


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
    classifier = load_classifier(judging, GPU)
    classifier.probabilities(images)
    before = len(cuda.waits)
    classifier.probabilities(images)
    assert [wait.what for wait in cuda.waits[before:]] == ["copy to the host"], "the result, once a batch"


def test_shapes_are_judged_on_a_gpu(painting: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, drawn = generate.sample, []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(len(args[1]))
        if len(drawn) == 1:
            return sample(*args, **kwargs)
        with cuda.no_waits():
            return sample(*args, **kwargs)

    monkeypatch.setattr(generate, "sample", watched)
    monkeypatch.setattr(evaluate, "_RENDERS", 8)
    monkeypatch.setattr(evaluate, "_PROMPTS", 4)
    before = len(cuda.waits)
    result = evaluate.evaluate_shapes(EvaluateConfig(metric="shapes", steps=2), painting)
    assert result["step"] == 1 and len(result["scores"]) == 6 and len(drawn) == 2
    places = Counter(wait.where.partition(":")[0] for wait in cuda.waits[before:] if wait.what == "copy to the host")
    assert places["pipeline/encoders/base.py"] == 3, "images come to the host a batch at a time"


def test_distances_are_those_of_a_cpu_and_features_do_not_wait(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(24, 20), (24, 20), (16, 30)] * 20
    real, drawn = (
        Stored([saved(picture(*size, seed + 7 * number), "PNG") for number, size in enumerate(sizes)])
        for seed in (0, 1)
    )
    compute, computed = fidelity._Given.compute, []

    def watched(self: Any, x: torch.Tensor) -> torch.Tensor:
        computed.append(tuple(x.shape[1:]))
        with cuda.no_waits():
            return compute(self, x)

    monkeypatch.setattr(fidelity._Given, "compute", watched)
    with closing(ImageDecoder()) as decoder:
        ours, theirs = (
            fidelity.distances(real, drawn, "pixels", decoder=decoder, failed={}, device=device)
            for device in (GPU, "cpu")
        )
    assert ours == pytest.approx(theirs, rel=1e-6) and set(computed) == {(3, 20, 24), (3, 30, 16)}


def test_the_clip_score_is_that_of_a_cpu(tmp_path: Path, cuda: FakeCuda) -> None:
    import open_clip

    towers = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-of-a-gpu.json").write_text(json.dumps(towers))
    open_clip.add_model_config(tmp_path / "tiny-of-a-gpu.json")
    model = open_clip.create_model("tiny-of-a-gpu", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    drawn = Stored([saved(picture(32, 32, number), "PNG") for number in range(5)])
    clip = f"tiny-of-a-gpu:{tmp_path / 'weights.pt'}"
    with closing(ImageDecoder()) as decoder:
        ours, theirs = (
            fidelity.clip_score(drawn, clip, decoder=decoder, failed={}, device=device) for device in (GPU, "cpu")
        )
    assert ours == pytest.approx(theirs, abs=1e-3)


class Stored:
    """Images as a dataset directory has them."""

    def __init__(self, files: list[bytes]) -> None:
        self._rows = [{"jpg": file, "caption": "an image", "key": str(i)} for i, file in enumerate(files)]

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, positions: Any) -> list[dict[str, Any]]:
        return [self._rows[position] for position in positions]


def test_evaluation_takes_the_gpu_unless_told_otherwise(
    painting: Path, judging: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def see(checkpoint: Path, device: torch.device, precision: str) -> None:
        raise Seen(device.type, precision)

    monkeypatch.setattr(generate, "load_painter", see)
    monkeypatch.setattr(fidelity, "distances", lambda *given, device, **more: see(Path(), device, "bfloat16"))
    monkeypatch.setattr(evaluate, "_images_of", lambda place: [])
    monkeypatch.setattr(evaluate_classes, "load_classifier", see)
    judges: list[tuple[Any, Path, dict[str, str]]] = [
        (evaluate.evaluate_shapes, painting, {}),
        (evaluate.evaluate_fidelity, painting, {"metric": "fidelity", "generated": "a", "reference": "b"}),
        (evaluate_classes.evaluate_classes, judging, {}),
    ]
    for judge, run, settings in judges:
        for asked, expected in (("auto", "cuda"), ("cpu", "cpu")):
            with pytest.raises(Seen) as seen:
                judge(EvaluateConfig(device=asked, **settings), run)
            assert seen.value.args == (expected, "bfloat16")
