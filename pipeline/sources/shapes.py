"""Embedded data: captioned scenes of one or two objects, drawn as asked for; needs nothing from outside."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input, Partition
from pipeline.samples import Outcome, Schema, caption_fields, content_hash
from pipeline.sources.base import Source
from pipeline.sources.shapes_scene import caption, questions, render, sample_scene


class Shapes(Source):
    """``count`` scenes of ``image_size`` pixels; scene number i depends on the seed and i alone."""

    rechecks = True

    def schema(self) -> Schema:
        return {**super().schema(), **({"questions": "json"} if self.config.questions else {})}

    def plan(self) -> Iterator[Partition]:
        for name in ("count", "image_size", "partition_size"):
            if getattr(self.config, name) < 1:
                raise ConfigError(f"{name}={getattr(self.config, name)}: must be at least 1")
        for start in range(0, self.config.count, self.config.partition_size):
            stop = min(start + self.config.partition_size, self.config.count)
            yield Partition((Input("shapes", start, stop),), stop - start)

    def samples(self, partition: Partition) -> Iterator[Outcome]:
        (scenes,) = partition.inputs
        for index in range(scenes.start, scenes.stop):
            yield self._draw(index)

    def _draw(self, index: int) -> Outcome:
        config = self.config
        scene = sample_scene(config.seed, index, config.objects, config.holdout)
        file = BytesIO()
        Image.fromarray(render(scene, config.image_size)).save(file, "PNG", compress_level=6)
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
            width=config.image_size,
            height=config.image_size,
            row=row,
        )


SOURCE = Shapes
