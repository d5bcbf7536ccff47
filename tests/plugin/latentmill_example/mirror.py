"""stage=mirror: images whose left and right are exchanged."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image, ImageOps

from pipeline.config.cli import config_for
from pipeline.config.options import option
from pipeline.config.schema import StageConfig
from pipeline.distributed import Rank, distributed
from pipeline.partitions import engine
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context, Stage, follow_upstream
from pipeline.registry import Traits, stages
from pipeline.samples import Outcome, SampleError, Schema


@dataclass(frozen=True, kw_only=True)
class MirrorConfig(StageConfig):
    """stage=mirror: exchange left and right of the images that stage=filter has kept."""

    traits: ClassVar = Traits(upstream=("filter",), partitioned=True)

    upside_down: bool = option(False, "exchange top and bottom as well", identity=True)


@stages.register("mirror", MirrorConfig)
class Mirror(Stage[MirrorConfig]):
    name = "mirror"
    version = 1

    def schema(self) -> Schema:
        """Columns of the rows that are kept."""
        return dict(self.upstream.schema)

    def plan(self, since: int = 0) -> Iterator[Partition]:
        """One partition for each of the upstream's."""
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        """One outcome for each sample: kept with its row, dropped, or failed with a reason."""
        for stored in self.upstream.samples(partition.inputs[0].start):
            if not partition.wants(stored.key):
                continue
            outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
            try:
                row = stored.read()
                outcome.row = {**row, "jpg": self.mirrored(row["jpg"]), "format": "png"}
                outcome.status = "kept"
            except SampleError as error:
                outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
            yield outcome

    def mirrored(self, data: bytes) -> bytes:
        with Image.open(io.BytesIO(data)) as image:
            turned = ImageOps.mirror(image)
        file = io.BytesIO()
        (ImageOps.flip(turned) if self.config.upside_down else turned).save(file, "PNG")
        return file.getvalue()


@distributed
def main(rank: Rank, config: MirrorConfig) -> None:
    engine.main(Mirror, config, rank)


if __name__ == "__main__":
    main(config_for("mirror"))
