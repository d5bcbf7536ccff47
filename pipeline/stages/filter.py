"""stage=filter: convert each image to an upright RGB image of limited size, or record why it is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cached_property
from typing import Any

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, FilterConfig
from pipeline.curation import rules
from pipeline.curation.keylist import KeyList, key_digest
from pipeline.distributed import Rank, distributed
from pipeline.imaging import blur, transform
from pipeline.imaging.worker_pool import Lost, Pool, WorkerLimits, worker_count
from pipeline.imaging.worker_protocol import understood, with_boxes
from pipeline.partitions.dataset import RandomAccess, Stored
from pipeline.partitions.plan import Input, LeftOut, Partition
from pipeline.partitions.stage import Context, Stage, evaluate, follow_upstream
from pipeline.registry import stages
from pipeline.samples import Outcome, Row, SampleError, Schema, caption_fields, content_hash
from pipeline.samples.captions import clean_caption
from pipeline.sources.base import Source, get_source
from pipeline.stages import release

_KEY_LISTS = ("keep_keys", "deny_keys")
_LOOKED_AT, _SPREAD = 500, 200
"""Samples that are read to find out which columns and fields exist: the first ones, and some spread over the rest."""
_NOT_TAKEN = ("svg",)
"""Reasons that count as dropped, not failed: file types that are valid but not supported."""
_Judgement = transform.Result | transform.ImageError | transform.Dropped | Lost


@stages.register("filter", FilterConfig)
class Filter(Stage[FilterConfig]):
    name = "filter"
    version = 2
    function = "pipeline.imaging.worker_protocol:answer"
    function_with_boxes = "pipeline.imaging.worker_protocol:answer_with_boxes"

    @property
    def reads_upstream(self) -> bool:  # type: ignore[override]
        return not self.config.fuse

    @property
    def writes_to_stores(self) -> bool:  # type: ignore[override]
        return self.reads_upstream  # otherwise the source keeps partial downloads there

    @property
    def rechecks(self) -> bool:  # type: ignore[override]
        return bool(self.config.fuse) and self.source.rechecks

    @property
    def retries_added(self) -> bool:  # type: ignore[override]
        return bool(self.config.fuse) and self.source.retries_added

    @cached_property
    def source(self) -> Source:
        """The source that samples are read from with ``fuse=true``."""
        return get_source(self.config.source_config(), self.output, self.rank.check_stop)

    def schema(self) -> Schema:
        if not self.config.fuse:
            self.upstream.require_columns("key", "jpg", "captions")
        before = self.source.schema() if self.config.fuse else self.upstream.schema
        return {**before, "width": "int", "height": "int", "min_side": "int"}

    def watched(self) -> dict[str, str]:
        return self.source.watched() if self.config.fuse else {}

    def left_out(self) -> LeftOut:
        return self.source.left_out if self.config.fuse else LeftOut()

    def changed(self, file: Input) -> bool:
        return self.source.changed(file)

    def extra(self) -> dict[str, Any]:
        return self.source.extra() if self.config.fuse else dict(self.upstream.header["extra"])

    @cached_property
    def image_rules(self) -> transform.Rules:
        config = self.config
        try:
            return transform.Rules(
                **{f.name: getattr(config, f.name) for f in fields(transform.Rules) if hasattr(config, f.name)}
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @cached_property
    def limits(self) -> transform.Limits:
        return transform.Limits(max_pixels=self.config.max_pixels, max_frames=self.config.max_frames)

    @cached_property
    def pool(self) -> Pool:
        config, limits = self.config, WorkerLimits.of(self.config)
        return Pool(
            self.function_with_boxes if config.blur_column else self.function,
            (self.image_rules, self.limits),
            workers=worker_count(config.workers, self.rank.local_world_size),
            timeout=limits.timeout,
            memory=limits.memory,
            read=with_boxes if config.blur_column else understood,
        )

    @cached_property
    def caption_checks(self) -> list[rules.CaptionCheck]:
        config = self.config
        checks = [rules.CAPTION_CHECKS[name] for name in config.caption_checks]
        return checks + ([rules.at_least(config.min_caption_length)] if config.min_caption_length else [])

    @cached_property
    def row_checks(self) -> list[rules.RowCheck]:
        return [rules.score(text) for text in self.config.scores]

    def identity(self) -> dict[str, Any]:
        """Key lists are identified by their contents, not by their path."""
        return super().identity() | {name: key_digest(getattr(self.config, name)) for name in _KEY_LISTS}

    def _require_planned_lists(self, planned: Mapping[str, Any]) -> None:
        """Raises ConfigError if a key list has changed since planning; checked once."""
        if "key_checks" in self.__dict__ or not planned:
            return
        for name in _KEY_LISTS:
            if planned.get(name, "") != (found := key_digest(getattr(self.config, name))):
                raise ConfigError(f"{name}={getattr(self.config, name)}: changed during the run: now {found}")

    @cached_property
    def key_checks(self) -> list[rules.KeyCheck]:
        """Checks built from the key lists; raises ConfigError if a list cannot be read."""
        checks = {"keep_keys": rules.kept_by, "deny_keys": rules.denied_by}
        return [checks[name](keys) for name, keys in self.key_lists.items()]

    @cached_property
    def key_lists(self) -> dict[str, KeyList]:
        column = self.config.key_column or "key"
        return {name: KeyList(path, column) for name in _KEY_LISTS if (path := getattr(self.config, name))}

    def validate(self) -> None:
        evaluate(self.image_rules, self.caption_checks, self.row_checks, self.key_checks)
        self._check_columns()

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return self.source.plan() if self.config.fuse else follow_upstream(self.upstream, since)

    def _check_columns(self) -> None:
        """Raises ConfigError if a setting names a column that none of the sampled rows has."""
        config = self.config
        wanted = [(f"scores={text}", rules.score_column(text)) for text in config.scores]
        for setting in ("key_column", "blur_column"):
            wanted += [(f"{setting}={column}", column)] if (column := getattr(config, setting)) else []
        if not wanted:
            return
        known = list(self.schema())
        if not config.fuse:
            known = [*known, *rules.columns_in(self._first_rows())]
        elif config.columns or "meta" not in known:
            known += config.columns
        else:
            return  # the source has not delivered any rows yet
        for setting, column in wanted:
            if column.lower() not in (name.lower() for name in known):
                shown = ", ".join(name for name in dict.fromkeys(known) if name not in ("jpg", "meta"))
                raise ConfigError(f"{setting}: no sample has a column or field {column}; there are {shown}")

    def _first_rows(self) -> Iterator[Row]:
        """Columns of some samples, without the images."""
        access = RandomAccess(self.upstream)
        columns = [name for name in self.upstream.schema if name != "jpg"]
        spread = range(0, len(access), max(1, len(access) // _SPREAD))
        for position in dict.fromkeys((*range(min(len(access), _LOOKED_AT)), *spread)):
            with suppress(SampleError):
                yield access.row(position, columns)

    def remarks(self, success: dict[str, Any]) -> list[str]:
        """Also report denied keys that match no sample: a mistyped key would otherwise go unnoticed."""
        said = super().remarks(success)
        if "key_lists" not in self.__dict__:
            return said  # this process has not judged any sample
        if "deny_keys" in self.key_lists:
            listed, found = len(self.key_lists["deny_keys"]), success["reasons"].get("dropped:key_denied", 0)
            if found < listed:
                said.append(f"deny_keys={self.config.deny_keys}: {listed} keys, but {found} samples have one of them")
        if "keep_keys" in self.key_lists:
            listed = len(self.key_lists["keep_keys"])
            found = success["counts"]["in"] - success["reasons"].get("dropped:key_not_kept", 0)
            if found < listed:
                said.append(f"keep_keys={self.config.keep_keys}: {listed} keys, but {found} samples have one of them")
        return said

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        self._require_planned_lists(context.planned.get("identity", {}))
        for (outcome, row), result in self.pool.map(self._images(partition, context), self.rank.check_stop):
            yield self._judged(outcome, row, result)
        if self.config.fuse:
            context.notes["noted"] = {reason: count for reason, count in self.source.noted.items() if count}

    def _images(self, partition: Partition, context: Context) -> Iterator[tuple[tuple[Outcome, Row], bytes | None]]:
        """Yield (preliminary outcome, remaining columns) and the image to judge, or None if there is none."""
        if self.config.fuse:
            self.source.noted.clear()
            arrived = (self._arrived(outcome) for outcome in self.source.samples(partition, context))
        else:
            stored = self.upstream.samples(partition.inputs[0].start)
            arrived = (self._read(sample) for sample in stored if partition.wants(sample.key))
        for outcome, row in arrived:
            if row is None or not self._described(outcome, row):
                yield (outcome, {}), None
                continue
            try:
                task = self._task(row)
            except transform.ImageError as error:
                outcome.reason, outcome.detail = error.reason, error.detail
                yield (outcome, {}), None
            else:
                yield (outcome, row), task

    def _task(self, row: Row) -> bytes:
        """The payload that a worker receives for a sample. Raises ImageError if its boxes are invalid."""
        column = self.config.blur_column
        data: bytes = row["jpg"]
        return blur.packed(blur.boxes_of(rules.column_value(row, column)), data) if column else data

    def _read(self, stored: Stored) -> tuple[Outcome, Row | None]:
        """A sample's preliminary outcome and its row; None if the row cannot be read or does not have to be."""
        outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
        if not self._listed(outcome):
            return outcome, None
        try:
            row = stored.read()
        except SampleError as error:
            outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
            return outcome, None
        outcome.source_bytes, outcome.source_hash = len(row["jpg"]), content_hash(row["jpg"])
        return outcome, row if self._listed(outcome, row) else None

    def _arrived(self, outcome: Outcome) -> tuple[Outcome, Row | None]:
        """Like :meth:`_read`, for a sample delivered by a source."""
        row, outcome.row = outcome.row, None
        if row is not None:
            outcome.status = "failed"  # until the image has been judged
            if not self._listed(outcome, row):
                return outcome, None
        return outcome, row

    def _listed(self, outcome: Outcome, row: Row | None = None) -> bool:
        """Whether the key lists accept the sample's key, or the value of its ``key_column`` if set."""
        column = self.config.key_column
        if column and row is None:
            return True  # checked again once its columns are known
        value = rules.column_value(row, column) if column and row else outcome.key
        key = "" if value is None else str(value)
        reason = next(filter(None, (check(key) for check in self.key_checks)), "")
        if reason:
            outcome.status, outcome.reason = "dropped", reason
        return not reason

    def _described(self, outcome: Outcome, row: Row) -> bool:
        """Clean the captions; returns whether captions and score columns pass, so that the image has to be judged."""
        captions = [clean_caption(caption, self.config.max_caption_length) for caption in row["captions"]]
        good, reason = rules.good_captions(captions, self.caption_checks)
        row |= caption_fields([caption for caption in good if caption])
        reason = next(filter(None, (check(row) for check in self.row_checks)), reason)
        if reason:
            outcome.status, outcome.reason = "dropped", reason
        return not reason

    def _judged(self, outcome: Outcome, row: Row, found: _Judgement | None) -> Outcome:
        match found:
            case transform.Result() as result:
                outcome.status, outcome.width, outcome.height = "kept", result.width, result.height
                outcome.source_pixels, outcome.phash = result.source_width * result.source_height, result.phash
                outcome.row = self._row(row, result)
            case transform.Dropped() as refusal:
                outcome.status, outcome.reason, outcome.detail = "dropped", refusal.reason, refusal.detail
            case transform.ImageError() as error:
                outcome.status = "dropped" if error.reason in _NOT_TAKEN else "failed"
                outcome.reason, outcome.detail = error.reason, error.detail
            case Lost() as lost:
                outcome.reason, outcome.detail, outcome.retryable = f"decoder_{lost.reason}", lost.detail, True
            case None:
                pass  # decided without judging the image
        return outcome

    def _row(self, row: Row, result: transform.Result) -> Row:
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
    release.main(Filter, config, rank, release_raw=not config.keep_raw, whole_line=False)


if __name__ == "__main__":
    main(config_for("filter"))
