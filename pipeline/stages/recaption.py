"""stage=recaption: write additional captions with a vision-language model; images are not copied.

The result has a pointer to each upstream sample and four columns that replace its captions: ``captions`` (all of
them), ``caption`` (the first), ``caption_sources`` (where each is from), and ``recaptions`` (the new ones, with model
and prompt).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy.typing as npt

from pipeline.captioning import prompts
from pipeline.captioning.answers import REASONS
from pipeline.captioning.base import Captioner, Question, Written, captioner
from pipeline.captioning.caption_columns import WRITTEN, joined
from pipeline.captioning.journal import Journal
from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, RecaptionConfig
from pipeline.distributed import Rank, distributed
from pipeline.imaging.decoder import ImageDecoder
from pipeline.imaging.headers import ImageError
from pipeline.imaging.resize import resize
from pipeline.imaging.worker_pool import WorkerLimits
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, Stored
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context, Stage, follow_upstream
from pipeline.registry import stages
from pipeline.samples import Outcome, Row, SampleError, Schema, content_hash
from pipeline.samples.captions import ORIGINAL, SOURCES

DEFAULT_PROMPT = "Describe this image in one or two sentences."


@dataclass
class Job:
    """A sample in progress, with its prompts and the captions written so far."""

    outcome: Outcome
    row: Row
    place: int
    questions: list[Question] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)


@stages.register("recaption", RecaptionConfig)
class Recaption(Stage[RecaptionConfig]):
    name = "recaption"
    version = 1

    @property
    def format(self) -> str:
        return "pointer"

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg")
        for prompt in self.prompts:
            prompts.check(prompt, [name for name in self.upstream.schema if name != "jpg"])
        self._check_source()
        return {**self.upstream.schema, "caption": "str", "captions": "json", SOURCES: "json", WRITTEN: "json"}

    def _check_source(self) -> None:
        """Raises ConfigError if the name for the new captions is empty or already used."""
        name, known = self.config.caption_source, self.upstream.header["extra"].get("caption_sources", [ORIGINAL])
        if not name or name in known:
            raise ConfigError(
                f"caption_source={name}: {self.upstream.root.path} has captions of this name: choose another"
                if name
                else "caption_source=: the new captions need a name"
            )

    def origin(self) -> str:
        return self.input

    def identity(self) -> dict[str, Any]:
        """A server is identified by its model, not by its address."""
        kind = self.config.captioner.partition(":")[0]
        return super().identity() | ({"captioner": kind} if kind == "openai" else {})

    def extra(self) -> dict[str, Any]:
        inherited = dict(self.upstream.header["extra"])
        sources = [*inherited.get("caption_sources", [ORIGINAL]), self.config.caption_source]
        return {**inherited, "caption_sources": sources, "captioner": self.captioner.describe()}

    def model_files(self) -> dict[str, str]:
        if self.config.captioner.startswith("openai:"):
            return {}
        from pipeline.encoders.base import model_files

        return model_files([self.config.captioner])

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return follow_upstream(self.upstream, since)

    # ---- captioner and prompts

    @cached_property
    def captioner(self) -> Captioner:
        return captioner(self.config, self.rank)

    @cached_property
    def prompts(self) -> list[str]:
        """A prompt template for each caption of a sample."""
        given = self.config.caption_prompt or (DEFAULT_PROMPT,)
        return [
            prompt
            for prompt in (given if self.captioner.chats else [""])
            for _ in range(self.config.captions_per_prompt)
        ]

    @cached_property
    def decoder(self) -> ImageDecoder:
        return ImageDecoder(WorkerLimits.of(self.config), workers=self.config.workers)

    @cached_property
    def own(self) -> Dataset:
        """The output dataset, as it was when work began."""
        return Dataset.open(self.output)

    def close(self) -> None:
        self._forget_journal()
        for name in ("decoder", "captioner", "own"):
            made = self.__dict__.pop(name, None)
            if hasattr(made, "close"):
                made.close()

    # ---- paid responses

    _journal: tuple[int, Journal] | None = None

    @cached_property
    def _spent(self) -> dict[int, int]:
        """Tokens spent on each committed partition."""
        return {}

    def _open_journal(self, index: int) -> Journal | None:
        """A journal of the server's responses, which cost money; local models have none, as they can compute again."""
        if not self.config.captioner.startswith("openai:"):
            return None
        self._forget_journal()
        self._journal = index, Journal(self.own.root, index)
        return self._journal[1]

    def _forget_journal(self) -> None:
        """Discard the last partition's journal if the partition is committed."""
        if self._journal is not None:
            index, journal = self._journal
            if self.own.root.in_place() and self.own.root.exists(self.own.path_of(index)):
                journal.discard()
            self._journal = None

    def _count_budget(self) -> None:
        """Report to the captioner the tokens spent on all committed partitions."""
        if not self.config.token_budget:
            return
        for index in range(self.own.partitions):
            if index not in self._spent and (record := self.own.record(index)) is not None:
                notes = record["notes"].get("captioning", {})
                self._spent[index] = notes.get("prompt_tokens", 0) + notes.get("answer_tokens", 0)
        self.captioner.spent(sum(self._spent.values()))

    # ---- work

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        journal = self._open_journal(partition.index)
        self._count_budget()
        begin, waiting = time.monotonic(), deque[Job]()
        total = Written()

        def questions() -> Iterator[Question]:
            for job in self._jobs(partition):
                waiting.append(job)
                yield from job.questions

        def ready() -> Iterator[Outcome]:
            while waiting and len(waiting[0].written) == len(waiting[0].questions):
                yield self._finished(waiting.popleft())

        captions = 0
        for written in self.captioner.write(questions(), journal, self.rank.check_stop):
            yield from ready()  # samples without questions
            waiting[0].written.append(written)
            captions += not written.reason
            _add(total, written)
            yield from ready()
        yield from ready()
        self._note(context.notes, total, captions, time.monotonic() - begin)

    def _jobs(self, partition: Partition) -> Iterator[Job]:
        (span,) = partition.inputs
        first = int(self.upstream.places[span.start])
        stored = (sample for sample in self.upstream.samples(span.start) if partition.wants(sample.key))
        read = (self._read(sample, first) for sample in stored)
        for job, found in self.decoder.pixels(read, self.rank.check_stop):
            if isinstance(found, ImageError):
                job.outcome.reason, job.outcome.detail = found.reason, found.detail
            elif found is not None:
                job.outcome.height, job.outcome.width = found.shape[:2]
                try:
                    job.questions = self._questions(job, found)
                except SampleError as error:
                    job.outcome.reason, job.outcome.detail = error.reason, error.detail
            yield job

    def _read(self, stored: Stored, first: int) -> tuple[Job, bytes | None]:
        outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
        job = Job(outcome, {}, first + stored.offset)
        try:
            job.row = stored.read()
        except SampleError as error:
            outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
            return job, None
        data: bytes = job.row.pop("jpg")
        outcome.source_bytes, outcome.source_hash = len(data), content_hash(data)
        return job, data

    def _questions(self, job: Job, pixels: npt.NDArray[Any]) -> list[Question]:
        height, width = pixels.shape[:2]
        edge, longer = self.config.image_edge, max(width, height)
        if longer > edge:
            scaled = [max(1, (2 * size * edge + longer) // (2 * longer)) for size in (width, height)]
            pixels = resize(pixels, (scaled[0], scaled[1]))
        return [
            Question(job.outcome.key, number, prompts.filled(prompt, job.row), pixels, job.outcome.source_hash)
            for number, prompt in enumerate(self.prompts)
        ]

    def _finished(self, job: Job) -> Outcome:
        outcome = job.outcome
        if not job.questions:
            return outcome
        unanswered = [written for written in job.written if written.reason and written.reason not in REASONS]
        missing = [written for written in job.written if written.reason]
        if unanswered or (len(missing) == len(job.written) and self.config.without_caption == "fail"):
            first = (unanswered or missing)[0]
            outcome.reason, outcome.detail, outcome.retryable = first.reason, first.detail, first.retryable
            return outcome
        texts = [
            {"caption": written.text, "prompt": question.prompt}
            for question, written in zip(job.questions, job.written, strict=True)
            if not written.reason
        ]
        columns = joined(job.row, texts, self.config.caption_source, self._model_name, self.config.first == "new")
        outcome.row = {"key": outcome.key, "place": job.place, **columns}
        outcome.status = "kept"
        return outcome

    @cached_property
    def _model_name(self) -> str:
        return str(self.config.served_model or self.config.captioner)

    def _note(self, notes: dict[str, Any], total: Written, captions: int, seconds: float) -> None:
        """Record for the events what was written, how fast and at what cost."""
        config = self.config
        told = {
            "captions": captions,
            "requests": total.requests,
            "prompt_tokens": total.prompt_tokens,
            "answer_tokens": total.completion_tokens,
            "seconds": round(seconds, 3),
            "captions_per_second": round(captions / seconds, 3) if seconds else 0.0,
        }
        cost = (total.prompt_tokens * config.prompt_price + total.completion_tokens * config.answer_price) / 1e6
        cost += seconds / 3600 * config.gpu_hour_price
        if cost:
            told["cost"] = round(cost, 6)
        notes["captioning"] = told
        if total.noted:
            notes["noted"] = dict(sorted(total.noted.items()))


def _add(total: Written, written: Written) -> None:
    total.requests += written.requests
    total.prompt_tokens += written.prompt_tokens
    total.completion_tokens += written.completion_tokens
    total.noted = Counter(total.noted) + written.noted


@distributed
def main(rank: Rank, config: RecaptionConfig) -> None:
    engine.main(Recaption, config, rank)


if __name__ == "__main__":
    main(config_for("recaption"))
