"""stage=filter: images upright, RGB and of a bounded size, captions clean, or a ledger row that says why not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from pipeline import images
from pipeline.captions import clean_caption
from pipeline.cli import config_for
from pipeline.config import ConfigError, FilterConfig
from pipeline.distributed import Rank, distributed
from pipeline.partitions import engine
from pipeline.partitions.dataset import Stored
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Stage, follow_upstream
from pipeline.samples import Outcome, Row, SampleError, Schema, caption_fields, content_hash

_NOT_TAKEN = ("svg",)
"""Reasons that are no failure of the data: kinds of file that we do not take."""


class Filter(Stage):
    name = "filter"

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg", "captions")
        return {**self.upstream.schema, "width": "int", "height": "int", "min_side": "int"}

    def extra(self) -> dict[str, Any]:
        return dict(self.upstream.header["extra"])

    @cached_property
    def rules(self) -> images.Rules:
        config = self.config
        try:
            return images.Rules(config.min_image_size, config.max_image_size, encode_quality=config.encode_quality)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @cached_property
    def limits(self) -> images.Limits:
        return images.Limits(max_pixels=self.config.max_pixels)

    def plan(self, since: int = 0) -> Iterator[Partition]:
        self.rules  # noqa: B018 - wrong settings are found before the work
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition) -> Iterator[Outcome]:
        for stored in self.upstream.samples(partition.inputs[0].start):
            if partition.wants(stored.key):
                yield self._judge(stored)

    def _judge(self, stored: Stored) -> Outcome:
        outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
        try:
            row = stored.read()
            outcome.source_bytes = len(row["jpg"])
            outcome.source_hash = content_hash(row["jpg"])
            result = images.process(row["jpg"], self.rules, self.limits)
        except SampleError as error:
            outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
        except images.Dropped as error:
            outcome.status, outcome.reason, outcome.detail = "dropped", error.reason, error.detail
        except images.ImageError as error:
            outcome.status = "dropped" if error.reason in _NOT_TAKEN else "failed"
            outcome.reason, outcome.detail = error.reason, error.detail
        else:
            outcome.status, outcome.width, outcome.height = "kept", result.width, result.height
            outcome.row = self._row(row, result)
        return outcome

    def _row(self, row: Row, result: images.Result) -> Row:
        captions = [clean_caption(caption, self.config.max_caption_length) for caption in row["captions"]]
        return {
            **row,
            **caption_fields([caption for caption in captions if caption]),
            "jpg": result.data,
            "format": result.format,
            "width": result.width,
            "height": result.height,
            "min_side": min(result.source_width, result.source_height),
        }


@distributed
def main(rank: Rank, config: FilterConfig) -> None:
    engine.main(Filter, config, rank)


if __name__ == "__main__":
    main(config_for("filter"))
