"""stage=filter: images upright, RGB and of a bounded size, captions clean, or a ledger row that says why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from typing import Any

from pipeline import filters, images
from pipeline.captions import clean_caption
from pipeline.cli import config_for, nearest
from pipeline.config import ConfigError, FilterConfig
from pipeline.distributed import Rank, distributed
from pipeline.partitions import engine
from pipeline.partitions.dataset import Stored
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Stage, follow_upstream
from pipeline.samples import Outcome, Row, SampleError, Schema, caption_fields, content_hash
from pipeline.workers import Lost, Pool, worker_count

_NOT_TAKEN = ("svg",)
"""Reasons that are no failure of the data: kinds of file that we do not take."""


class Filter(Stage):
    name = "filter"
    version = 2
    function = "pipeline.images:judge"

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg", "captions")
        return {**self.upstream.schema, "width": "int", "height": "int", "min_side": "int"}

    def extra(self) -> dict[str, Any]:
        return dict(self.upstream.header["extra"])

    @cached_property
    def rules(self) -> images.Rules:
        config = self.config
        try:
            return images.Rules(
                **{f.name: getattr(config, f.name) for f in fields(images.Rules) if hasattr(config, f.name)}
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @cached_property
    def limits(self) -> images.Limits:
        return images.Limits(max_pixels=self.config.max_pixels, max_frames=self.config.max_frames)

    @cached_property
    def pool(self) -> Pool:
        config = self.config
        return Pool(
            self.function,
            (self.rules, self.limits),
            workers=worker_count(config.workers, self.rank.local_world_size),
            timeout=config.decode_timeout,
            memory=config.worker_memory * 2**20,
        )

    @cached_property
    def caption_checks(self) -> list[filters.CaptionCheck]:
        config = self.config
        for name in config.caption_checks:
            if name not in filters.CAPTION_CHECKS:
                raise ConfigError(f"caption_checks={name}: {nearest(name, filters.CAPTION_CHECKS)}")
        checks = [filters.CAPTION_CHECKS[name] for name in config.caption_checks]
        return checks + ([filters.at_least(config.min_caption_length)] if config.min_caption_length else [])

    @cached_property
    def row_checks(self) -> list[filters.RowCheck]:
        return [filters.score(text) for text in self.config.scores]

    def plan(self, since: int = 0) -> Iterator[Partition]:
        self.rules, self.caption_checks, self.row_checks  # noqa: B018 - wrong settings are found before the work
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition) -> Iterator[Outcome]:
        stored = (s for s in self.upstream.samples(partition.inputs[0].start) if partition.wants(s.key))
        for (outcome, row), result in self.pool.map(map(self._read, stored), self.rank.check_stop):
            yield self._judged(outcome, row, result)

    def _judged(self, outcome: Outcome, row: Row, result: Any) -> Outcome:
        match result:
            case None:
                pass  # decided before it was looked at
            case images.Result():
                outcome.status, outcome.width, outcome.height = "kept", result.width, result.height
                outcome.source_pixels, outcome.phash = result.source_width * result.source_height, result.phash
                outcome.row = self._row(row, result)
            case images.Dropped():
                outcome.status, outcome.reason, outcome.detail = "dropped", result.reason, result.detail
            case images.ImageError():
                outcome.status = "dropped" if result.reason in _NOT_TAKEN else "failed"
                outcome.reason, outcome.detail = result.reason, result.detail
            case Lost():
                outcome.reason, outcome.detail, outcome.retryable = f"decoder_{result.reason}", result.detail, True
        return outcome

    def _read(self, stored: Stored) -> tuple[tuple[Outcome, Row], bytes | None]:
        """A sample's outcome so far, the rest of its row, and the image; None where there is no need to look at it."""
        outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
        try:
            row = stored.read()
        except SampleError as error:
            outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
            return (outcome, {}), None
        data = row.pop("jpg")
        outcome.source_bytes, outcome.source_hash = len(data), content_hash(data)
        captions = [clean_caption(caption, self.config.max_caption_length) for caption in row["captions"]]
        good, reason = filters.good_captions(captions, self.caption_checks)
        row |= caption_fields([caption for caption in good if caption])
        reason = next(filter(None, (check(row) for check in self.row_checks)), reason)
        if reason:
            outcome.status, outcome.reason = "dropped", reason
            return (outcome, {}), None
        return (outcome, row), data

    def _row(self, row: Row, result: images.Result) -> Row:
        return {
            **row,
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
