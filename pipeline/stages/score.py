"""stage=score: compute scores of each sample from its pixels, its caption or a model; images are not copied.

The result has a row of scores for each readable sample, in the partitions of the upstream. Scores that exist in another
result for the same samples are copied from it (``reuse=true``), so that adding a scorer costs only that scorer. The
bytes of the result are the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, ScoreConfig
from pipeline.curation.scorers import Scorer, get_scorers
from pipeline.curation.scorers.layout import ScoreLayout
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import model_files
from pipeline.encoders.model_scores import EMBEDDING, ModelScorer, fingerprint, model_of, model_scorers
from pipeline.imaging.worker_pool import worker_count
from pipeline.latents.encoder_stage import EncodingStage, Job, Lap, Work, read
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, SlotReader, Stored, find_datasets
from pipeline.partitions.plan import Partition
from pipeline.partitions.planning import last_upstream
from pipeline.partitions.stage import evaluate
from pipeline.registry import stages
from pipeline.samples import Outcome, Row, Schema

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.latents.transfers import Transfers, Transit

_BATCH, _PER_PROCESS = 32, 8
"""Images per batch if no model runs: minimum, and number for each decoding process."""


@dataclass(slots=True)
class ScoreJob(Job):
    """A sample in progress, with its scores so far and its caption."""

    scores: Row = field(default_factory=dict)
    caption: str = ""

    @property
    def good(self) -> bool:
        """Whether the sample could be read and decoded."""
        return not self.outcome.reason


@dataclass
class Scored:
    """Scores of a batch.

    Attributes:
        pixels: values of the scorers from pixels, float64 (n, scorers).
        encoded: results of each model; valid after waiting for ``transit``.
    """

    pixels: npt.NDArray[np.float64]
    encoded: Sequence[Sequence[Tensor]] = ()
    transit: Transit | None = None

    @property
    def seconds(self) -> float:
        return 0.0 if self.transit is None else self.transit.seconds


@dataclass
class Known:
    """What an earlier result has for a sample: scores (none if it failed) and ledger columns."""

    scores: Row
    ledger: dict[str, Any]


_NOTHING = Known({}, {})


@stages.register("score", ScoreConfig)
class Score(EncodingStage[ScoreConfig]):
    name = "score"
    version = 1
    writes_to_stores = False

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
        return super().plan(since)

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

    @cached_property
    def slot(self) -> ScoreLayout:
        return ScoreLayout(tuple(self._from_pixels), tuple(self._crops.values()))

    @cached_property
    def batch_size(self) -> int:
        """As configured if a model runs; otherwise enough to keep all decoding processes busy."""
        return self.config.batch_size if self._asked else max(_BATCH, _PER_PROCESS * self.decoding_processes())

    @property
    def on_gpu(self) -> bool:
        return bool(self._asked) and super().on_gpu

    def decoding_processes(self) -> int:
        return worker_count(self.config.workers, self.rank.local_world_size)

    @cached_property
    def transfers(self) -> Transfers:
        from pipeline.latents.transfers import Transfers

        return Transfers(self.rank.device)

    def prepare(self) -> None:
        evaluate(self._from_captions, self.slot, self.batch_size)
        if self._asked:
            evaluate(self.transfers)

    def rows(self, partition: Partition) -> Iterator[Job]:
        (span,) = partition.inputs
        known = self._known(span.start) if self._reused else {}
        looks = bool(self.slot.names or self.slot.crops)
        columns = [name for name in self.upstream.schema if name in ("key", "captions", *(("jpg",) if looks else ()))]
        for stored in self.samples(span.start):
            if partition.wants(stored.key):
                yield self._job(stored, known.get(stored.key, _NOTHING), columns)

    def _job(self, stored: Stored, known: Known, columns: Sequence[str]) -> Job:
        if known.ledger.get("reason"):  # failed in the earlier result, and would fail again
            job = ScoreJob(Outcome(stored.key, "failed", source=stored.source, offset=stored.offset), {})
        else:
            found = read(stored, columns)
            job = ScoreJob(found.outcome, found.row, scores=dict(known.scores))
        for name, value in known.ledger.items():
            if not getattr(job.outcome, name):
                setattr(job.outcome, name, value)
        if job.row:
            job.caption = next(iter(job.row["captions"]), "")
            for scorer in self._from_captions:
                job.scores[scorer.name] = scorer.function(job.caption)
        return job

    def encode(self, work: Work, slots: npt.NDArray[Any]) -> Scored:
        for job in work.jobs:
            job.row = {}  # its image is decoded
        scored = Scored(self.slot.scores(slots[: len(work.jobs)]))
        if self._asked and any(job.good for job in work.jobs):
            self._ask(work, slots, scored)
        else:
            work.copied()
        return scored

    def _ask(self, work: Work, slots: npt.NDArray[Any], scored: Scored) -> None:
        """Run the models on a batch, without the samples that could not be read unless batches are padded."""
        import torch

        transfers, places = self.transfers, self._places(work)
        jobs: list[Any] = work.jobs
        captions = [job.caption if job.good else "" for job in jobs]
        captions += [""] * (len(slots) - len(captions))
        with torch.inference_mode():
            (there,) = transfers.upload([torch.from_numpy(slots)], work.copied)
            transfers.begin()
            if not self.pads and len(places) < len(jobs):
                there, captions = there[places], [captions[place] for place in places]
            images = {
                name: there[:, start : start + crop.bytes].unflatten(1, (crop.edge, crop.edge, 3))
                for (name, crop), start in zip(self._crops.items(), self.slot.starts[1:], strict=False)
            }
            scored.encoded = [
                [transfers.download(tensor) for tensor in model.encode(images.get(repr(model.crop)), captions)]
                for model in self._asked.values()
            ]
            scored.transit = transfers.end()
        if not self.on_gpu:
            work.copied()

    @staticmethod
    def _places(work: Work) -> list[int]:
        """Positions in the batch of the samples that could be read."""
        return [place for place, job in enumerate(work.jobs) if job.good]

    def finish(self, work: Work, encoded: Scored) -> Iterator[Outcome]:
        if encoded.transit is not None:
            encoded.transit.wait()
        places = self._places(work)
        jobs: list[Any] = [work.jobs[place] for place in places]
        for job, numbers in zip(jobs, encoded.pixels[places].tolist(), strict=True):
            for name, value in zip(self.slot.names, numbers, strict=True):
                job.scores[name] = value if math.isfinite(value) else None
        captions = [job.caption for job in jobs]
        for model, tensors in zip(self._asked.values(), encoded.encoded, strict=False):
            arrays = [tensor.numpy()[places] if self.pads else tensor.numpy() for tensor in tensors]
            vectors = np.stack([job.scores[EMBEDDING] for job in jobs]) if model.wants_embedding else None
            for column, values in zip(model.columns, model.values(arrays, captions, vectors), strict=True):
                for job, value in zip(jobs, values, strict=True):
                    job.scores[column] = value
        for job in jobs:
            outcome = job.outcome
            if all(map(_is_finite, job.scores.values())):
                outcome.status, outcome.row = "kept", {"key": outcome.key} | job.scores
            else:
                outcome.reason = "not_finite"
                outcome.detail = "a model gave NaN or infinity: model_dtype=float32 may help"
        for job in work.jobs:
            yield job.outcome

    def lap_done(self, lap: Lap, busy: float, images: int, notes: dict[str, Any]) -> None:
        if self._asked:
            super().lap_done(lap, busy, images, notes)


def _is_finite(value: Any) -> bool:
    return bool(np.isfinite(value).all()) if isinstance(value, float | np.ndarray) else True


@distributed
def main(rank: Rank, config: ScoreConfig) -> None:
    engine.main(Score, config, rank)


if __name__ == "__main__":
    main(config_for("score"))
