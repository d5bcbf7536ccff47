"""source=gradients: images of one colour that fades from left to right."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.config.options import Options, option, part_of
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import Outcome, caption_fields, content_hash
from pipeline.sources.base import Source

_COLOURS = ("red", "green", "blue")
_PARTITION = 20  # images


@dataclass(frozen=True, kw_only=True)
class GradientOptions(Options):
    """Drawn gradients, source=gradients."""

    gradients: int = option(60, "number of images", identity=True, ge=1)
    gradient_edge: int = option(64, "edge of the square images, in pixels", identity=True, ge=8, le=4096)


@sources.register("gradients", GradientOptions)
class Gradients(Source):
    def plan(self) -> Iterator[Partition]:
        count = part_of(self.config, GradientOptions).gradients
        for start in range(0, count, _PARTITION):
            stop = min(start + _PARTITION, count)
            yield Partition((Input("gradients", start, stop),), stop - start)

    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        edge = part_of(self.config, GradientOptions).gradient_edge
        (numbers,) = partition.inputs
        for number in range(numbers.start, numbers.stop):
            data = drawn(number, edge)
            key = f"gradients/{number:06d}"
            text = f"{_COLOURS[number % len(_COLOURS)]} that fades over {edge - number % edge} pixels"
            yield Outcome(
                key,
                "kept",
                source="gradients",
                offset=number,
                source_bytes=len(data),
                source_hash=content_hash(data),
                width=edge,
                height=edge,
                row={"key": key, "jpg": data, "format": "png", **caption_fields([text])},
            )


def drawn(number: int, edge: int) -> bytes:
    """A PNG; equal numbers give equal bytes, so that any rank may draw it."""
    width = edge - number % edge
    pixels = np.zeros((edge, edge, 3), np.uint8)
    pixels[:, :width, number % len(_COLOURS)] = np.linspace(255, 0, width).round()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
