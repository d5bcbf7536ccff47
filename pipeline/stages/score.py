"""stage=score: compute scores of each sample from its pixels, its caption or a model; images are not copied.

The result has a row of scores for each readable sample, in the partitions of the upstream. Scores that exist in another
result for the same samples are copied from it (``reuse=true``), so that adding a scorer costs only that scorer. The
bytes of the result are the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, ScoreConfig
from pipeline.curation.scorers import Scorer, get_scorers
from pipeline.curation.scorers.worker import Scored, understood
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import model_files
from pipeline.encoders.model_scores import EMBEDDING, ModelScorer, fingerprint, model_of, model_scorers
from pipeline.imaging.headers import ImageError, Limits
from pipeline.imaging.worker_pool import Answer, Lost, Pool, worker_count
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, SlotReader, Stored, find_datasets
from pipeline.partitions.plan import Partition
from pipeline.partitions.planning import last_upstream
from pipeline.partitions.stage import Context, Stage, follow_upstream
from pipeline.registry import stages
from pipeline.samples import Outcome, Row, SampleError, Schema, content_hash


@dataclass
class Job:
    """A sample in progress: its outcome and scores so far, and its caption."""

    outcome: Outcome
    scores: Row
    caption: str
    crops: dict[str, npt.NDArray[Any]]


@dataclass
class Known:
    """What an earlier result has for a sample: scores (none if it failed) and ledger columns."""

    scores: Row
    ledger: dict[str, Any]


_NOTHING = Known({}, {})


@stages.register("score", ScoreConfig)
class Score(Stage[ScoreConfig]):
    name = "score"
    version = 1
    function = "pipeline.curation.scorers.worker:answer"

    @property
    def format(self) -> str:
        return "scores"

    @cached_property
    def scorers(self) -> dict[str, Any]:
        """Scorers by name: functions, and classes of scorers with a model."""
        return get_scorers(self.config.scorers)

    @cached_property
    def models(self) -> dict[str, ModelScorer]:
        """Scorers with models, in the order in which they run."""
        named = {name: scorer for name, scorer in self.scorers.items() if not isinstance(scorer, Scorer)}
        if not named:
            return {}
        on_gpu = self.rank.device.type == "cuda"
        return model_scorers(named, str(self.rank.device), self.config.model_dtype if on_gpu else "float32")

    def columns_of(self, name: str) -> Schema:
        """Columns that the scorer ``name`` fills, with their types."""
        return self.models[name].columns if name in self.models else {name: self.scorers[name].type}

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg", "captions")
        return {"key": "str"} | {
            column: kind for name in self.scorers for column, kind in self.columns_of(name).items()
        }

    def extra(self) -> dict[str, Any]:
        """Fingerprints of the scorers by name, covering all that their values depend on."""
        return {"scorers": self._fingerprints, "looks": self._looks}

    def model_files(self) -> dict[str, str]:
        return model_files(spec for name in self.models for spec in (name, model_of(name)))

    @cached_property
    def _looks(self) -> bool:
        """Whether any scorer, reused or not, needs the image: then samples that cannot be decoded have no scores."""
        return any(scorer.kind == "pixels" for scorer in self.scorers.values() if isinstance(scorer, Scorer)) or any(
            model.crop is not None for model in self.models.values()
        )

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        return {
            name: scorer.describe()
            if isinstance(scorer, Scorer)
            else fingerprint(self.models[name].describe() | {"batch_size": self.config.batch_size})
            for name, scorer in self.scorers.items()
        }

    def plan(self, since: int = 0) -> Iterator[Partition]:
        if self.upstream.format.name == "scores":
            raise ConfigError(f"{self.upstream.root.path} holds scores, not images: give input= the folder of images")
        return follow_upstream(self.upstream, since)

    @cached_property
    def pool(self) -> Pool:
        config = self.config
        return Pool(
            self.function,
            (tuple(self._from_pixels), tuple(self._crops.values()), Limits()),
            workers=worker_count(config.workers, self.rank.local_world_size),
            timeout=config.decode_timeout,
            memory=config.worker_memory * 2**20,
        )

    def close(self) -> None:
        if "pool" in self.__dict__:
            self.pool.close()

    @property
    def _functions(self) -> list[Scorer]:
        """Scorers without a model whose values have to be computed."""
        return [
            scorer for name, scorer in self.scorers.items() if isinstance(scorer, Scorer) and name not in self._reused
        ]

    @cached_property
    def _from_pixels(self) -> list[str]:
        return [scorer.name for scorer in self._functions if scorer.kind == "pixels"]

    @cached_property
    def _from_captions(self) -> list[Scorer]:
        return [scorer for scorer in self._functions if scorer.kind == "caption"]

    @cached_property
    def _asked(self) -> dict[str, ModelScorer]:
        return {name: model for name, model in self.models.items() if name not in self._reused}

    @cached_property
    def _crops(self) -> dict[str, Any]:
        """The distinct crops that the models need."""
        return {repr(model.crop): model.crop for model in self._asked.values() if model.crop is not None}

    # ---- reused scores

    @cached_property
    def _reused(self) -> dict[str, Dataset]:
        """For each scorer whose values another result for the same samples has, that result."""
        if not self.config.reuse:
            return {}
        found: dict[str, Dataset] = {}
        for dataset in self._others():
            known = dataset.header["extra"].get("scorers", {})
            for name, value in self._fingerprints.items():
                if known.get(name) == value and name not in found:
                    found[name] = dataset
        if found:
            self.rank.log.info("%s: %s taken from earlier results", self.output, ", ".join(found))
        return found

    def _others(self) -> Iterator[Dataset]:
        """Other results for the same upstream content, computed under equal conditions and without transient errors."""
        content = self.upstream.require_success()["content_digest"]
        for dataset in find_datasets(self.output.parent):
            if dataset.root.path == self.output or dataset.stage != self.name or dataset.released:
                continue
            success, upstream = dataset.success, last_upstream(dataset)
            if success is None or upstream is None or upstream["content_digest"] != content:
                continue
            unsure = success["counts"].get("retryable") or success["reasons"].get("failed:not_finite")
            stricter = dataset.header["extra"]["looks"] and not self._looks
            if not unsure and not stricter and dataset.header["stage_version"] == self.version:
                yield dataset

    def _known(self, index: int) -> dict[str, Known]:
        """Reused scores of the samples in partition ``index`` of the upstream, by key."""
        known: dict[str, Known] = {}
        for path in dict.fromkeys(str(dataset.root.path) for dataset in self._reused.values()):
            mine = [name for name in self.scorers if (found := self._reused.get(name)) and str(found.root.path) == path]
            dataset = self._reused[mine[0]]
            columns = [column for name in mine for column in self.columns_of(name)]
            for number in range(dataset.partitions):
                if dataset.partition(number).inputs[0].start == index:
                    self._read_known(SlotReader(dataset, number), columns, known)
        return known

    def _read_known(self, reader: SlotReader, columns: list[str], known: dict[str, Known]) -> None:
        kept = {stored.key: stored for stored in reader.stored()}
        names = ["key", "reason", "detail", "source_bytes", "source_hash", "width", "height"]
        for row in reader.ledger(names).to_pylist():
            found = known.setdefault(row.pop("key"), Known({}, {}))
            found.ledger = row if row["source_hash"] else found.ledger or row
        for key, stored in kept.items():
            known[key].scores |= stored.read(columns)

    # ---- work

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (span,) = partition.inputs
        known = self._known(span.start) if self._reused else {}
        stored = (sample for sample in self.upstream.samples(span.start) if partition.wants(sample.key))
        tasks = self._tasks(stored, known)
        jobs = (self._scored(job, said) for job, said in self.pool.map(tasks, self.rank.check_stop))
        if not self._asked:
            yield from (self._finished(job) for job in jobs)
            return
        while batch := list(islice(jobs, self.config.batch_size)):
            self._ask(batch)
            yield from map(self._finished, batch)

    def _tasks(self, samples: Iterator[Stored], known: dict[str, Known]) -> Iterator[tuple[Job, bytes | None]]:
        """Jobs, with the image if a scorer needs it."""
        looks = bool(self._from_pixels or self._crops)
        columns = [name for name in self.upstream.schema if name in ("key", "captions", *(("jpg",) if looks else ()))]
        for stored in samples:
            outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
            earlier = known.get(stored.key, _NOTHING)
            job = Job(outcome, dict(earlier.scores), "", {})
            for name, value in earlier.ledger.items():
                setattr(outcome, name, value)
            if outcome.reason:
                yield job, None  # failed in the earlier result, and would fail again
                continue
            try:
                row = stored.read(columns)
            except SampleError as error:
                outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
                yield job, None
                continue
            job.caption = next(iter(row["captions"]), "")
            for scorer in self._from_captions:
                job.scores[scorer.name] = scorer.function(job.caption)
            if looks:
                outcome.source_bytes, outcome.source_hash = len(row["jpg"]), content_hash(row["jpg"])
                yield job, row["jpg"]
            else:
                outcome.status = "kept"
                yield job, None

    def _scored(self, job: Job, said: Answer | Lost | None) -> Job:
        if said is None:
            return job
        outcome = job.outcome
        match self._understood(said):
            case Scored() as found:
                outcome.status, outcome.width, outcome.height = "kept", found.width, found.height
                for name, value in zip(self._from_pixels, found.values, strict=True):
                    job.scores[name] = value if math.isfinite(value) else None
                job.crops = dict(zip(self._crops, found.crops, strict=True))
            case ImageError() as error:
                outcome.reason, outcome.detail = error.reason, error.detail
            case Lost() as lost:
                outcome.reason, outcome.detail, outcome.retryable = f"decoder_{lost.reason}", lost.detail, True
        return job

    def _understood(self, said: Answer | Lost) -> Scored | ImageError | Lost:
        if isinstance(said, Lost):
            return said
        try:
            return understood(said, len(self._from_pixels), list(self._crops.values()))
        except ValueError as error:
            return Lost("crash", f"the worker gave {error}")

    def _ask(self, batch: list[Job]) -> None:
        """Score a batch with the models, skipping samples that could not be read."""
        good = [job for job in batch if job.outcome.status == "kept"]
        if not good:
            return
        captions = [job.caption for job in good]
        for model in self._asked.values():
            vectors = np.stack([job.scores[EMBEDDING] for job in good]) if model.wants_embedding else None
            crops = [job.crops[repr(model.crop)] for job in good] if model.crop is not None else []
            for column, values in zip(model.columns, model.score(crops, captions, vectors), strict=True):
                for job, value in zip(good, values, strict=True):
                    job.scores[column] = value
        for job in good:
            job.crops = {}

    def _finished(self, job: Job) -> Outcome:
        outcome = job.outcome
        if outcome.status == "kept":
            if any(not _is_finite(value) for value in job.scores.values()):
                outcome.status, outcome.reason = "failed", "not_finite"
                outcome.detail = "a model gave NaN or infinity: model_dtype=float32 may help"
                return outcome
            outcome.row = {"key": outcome.key} | job.scores
        return outcome


def _is_finite(value: Any) -> bool:
    return bool(np.isfinite(value).all()) if isinstance(value, float | np.ndarray) else True


@distributed
def main(rank: Rank, config: ScoreConfig) -> None:
    engine.main(Score, config, rank)


if __name__ == "__main__":
    main(config_for("score"))
