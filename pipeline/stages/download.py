"""stage=download: read the samples of a dataset and store them, each with its key, captions and content hash."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from pipeline.config.cli import config_for
from pipeline.config.schema import DownloadConfig
from pipeline.distributed import Rank, distributed
from pipeline.partitions import engine
from pipeline.partitions.plan import Input, LeftOut, Partition
from pipeline.partitions.stage import Context, Stage
from pipeline.registry import stages
from pipeline.samples import Outcome, Schema
from pipeline.sources.base import Source, get_source


@stages.register("download", DownloadConfig)
class Download(Stage[DownloadConfig]):
    name = "download"
    reads_upstream = False

    @cached_property
    def source(self) -> Source:
        return get_source(self.config, self.output, self.rank.check_stop)

    @property
    def rechecks(self) -> bool:  # type: ignore[override]
        return self.source.rechecks

    @property
    def retries_added(self) -> bool:  # type: ignore[override]
        return self.source.retries_added

    @property
    def format(self) -> str:
        return self.source.format

    def schema(self) -> Schema:
        return self.source.schema()

    def extra(self) -> dict[str, Any]:
        return self.source.extra()

    def origin(self) -> str:
        return self.source.origin()

    def watched(self) -> dict[str, str]:
        return self.source.watched()

    def left_out(self) -> LeftOut:
        return self.source.left_out

    def changed(self, file: Input) -> bool:
        return self.source.changed(file)

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return self.source.plan()

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        self.source.noted.clear()
        yield from self.source.samples(partition, context)
        context.notes["noted"] = {reason: count for reason, count in self.source.noted.items() if count}


@distributed
def main(rank: Rank, config: DownloadConfig) -> None:
    engine.main(Download, config, rank)


if __name__ == "__main__":
    main(config_for("download"))
