"""Embedded data: captioned scenes of one or two objects, rendered on demand; needs no external files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from io import BytesIO

from PIL import Image

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context
from pipeline.randomness import uniforms
from pipeline.registry import sources
from pipeline.samples import Outcome, Schema, caption_fields, content_hash
from pipeline.sources.base import Source
from pipeline.sources.shapes_scene import caption, questions, render, sample_scene


@sources.register("shapes")
class Shapes(Source):
    """``count`` scenes whose shorter edge has ``image_size`` pixels; scene i depends only on the seed and i."""

    rechecks = True

    def schema(self) -> Schema:
        return {**super().schema(), **({"questions": "json"} if self.config.questions else {})}

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each of the ``canvases``."""
        return [canvas_size(canvas, self.config.image_size) for canvas in self.config.canvases]

    def plan(self) -> Iterator[Partition]:
        for name in ("count", "image_size", "partition_size"):
            if getattr(self.config, name) < 1:
                raise ConfigError(f"{name}={getattr(self.config, name)}: must be at least 1")
        if not self.sizes:
            raise ConfigError("canvases=[]: name at least one, as 3:2")
        for start in range(0, self.config.count, self.config.partition_size):
            stop = min(start + self.config.partition_size, self.config.count)
            yield Partition((Input("shapes", start, stop),), stop - start)

    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (scenes,) = partition.inputs
        for index in range(scenes.start, scenes.stop):
            yield self._draw(index)

    def _draw(self, index: int) -> Outcome:
        config = self.config
        scene = sample_scene(config.seed, index, config.objects, config.holdout)
        size = height, width = self._size(index)
        file = BytesIO()
        Image.fromarray(render(scene, size)).save(file, "PNG", compress_level=6)
        data = file.getvalue()
        key = f"shapes/{index:08d}"
        row = {"key": key, "jpg": data, "format": "png", **caption_fields([caption(scene)])}
        if config.questions:
            row["questions"] = questions(scene)
        return Outcome(
            key,
            "kept",
            source="shapes",
            offset=index,
            source_bytes=len(data),
            source_hash=content_hash(data),
            width=width,
            height=height,
            row=row,
        )

    def _size(self, index: int) -> tuple[int, int]:
        place = int(uniforms(1, self.config.seed, "canvas", index)[0] * len(self.sizes))
        return self.sizes[place]


def canvas_size(canvas: str, shorter: int) -> tuple[int, int]:
    """Height and width of a canvas ``width:height`` whose shorter edge has ``shorter`` pixels.

    Raises:
        ConfigError: ``canvas`` is not of this form.
    """
    width, colon, height = canvas.partition(":")
    if not (colon and width.isdigit() and height.isdigit() and 0 < int(width) < 1000 and 0 < int(height) < 1000):
        raise ConfigError(f"canvases={canvas}: expected width:height, as 3:2")
    short = min(int(width), int(height))
    return int(height) * shorter // short, int(width) * shorter // short
