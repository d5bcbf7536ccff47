"""stage=texts: encode captions alone, as MDS, for stage=precompute to store the text states with latents.

This way, a text encoder with billions of parameters and an autoencoder need not fit on a GPU together, and latents at
several resolutions or from several autoencoders can share the states of one run. Images are not read.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pipeline.config.cli import config_for
from pipeline.config.schema import TextsConfig
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import model_files
from pipeline.latents.stored_texts import STAGE
from pipeline.latents.text_states import BACK, PER_SAMPLE, WINDOW, TextStates, news
from pipeline.loading.prefetch import Ahead
from pipeline.partitions import engine
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context, Stage, evaluate, follow_upstream
from pipeline.registry import stages
from pipeline.samples import Outcome, Row, SampleError, Schema

if TYPE_CHECKING:
    from pipeline.latents.encoding import Encoded, TextEncoding

Window = tuple[list[tuple[Outcome, Row]], list[str], "Encoded", list[str]]
"""Samples with their rows, newly encoded captions, their states, and captions that can be forgotten afterwards."""


@stages.register(STAGE, TextsConfig)
class Texts(Stage[TextsConfig]):
    name = STAGE
    version = 1
    writes_to_stores = True

    @property
    def format(self) -> str:
        return "mds"

    @cached_property
    def texts(self) -> TextStates:
        dtype = self.config.model_dtype if self._on_gpu else "float32"
        return TextStates(self.config, lambda: self.upstream, self.rank.device, dtype)

    @property
    def _on_gpu(self) -> bool:
        return bool(self.rank.device.type == "cuda")

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "caption", *(["captions"] if self.texts.several else []))
        schema: Schema = {"key": "str", "caption": "str"} | dict.fromkeys(self.texts.shapes, "bytes")
        return schema | self.texts.of_several() | ({BACK: "int"} if self.texts.shared else {})

    def extra(self) -> dict[str, Any]:
        return {"shapes": self.texts.shapes, "dtype": self.config.save_dtype, **self.texts.extra()}

    def model_files(self) -> dict[str, str]:
        return model_files([*self.config.text_encoder])

    def validate(self) -> None:
        self.texts.validate()

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return follow_upstream(self.upstream, since)

    @cached_property
    def encoding(self) -> TextEncoding:
        import torch

        from pipeline.latents.encoding import TextEncoding

        if self._on_gpu:
            torch.set_float32_matmul_precision("high")
        config = self.config
        return TextEncoding(
            device=self.rank.device,
            texts=self.texts.encoders,
            storage=config.text_storage,
            dtype=config.save_dtype,
            pooled=self.texts.pooled,
        )

    # ---- work

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        evaluate(self.encoding)  # before starting threads, as libraries cannot load models concurrently
        begin, busy, rows = perf_counter(), 0.0, self.texts.rows()
        with closing(Ahead(self._encoded(partition), 1)) as windows:
            for jobs, new, encoded, forget in windows:
                encoded.wait()
                busy += encoded.transit.seconds
                rows.learn(new, encoded)
                for outcome, row in jobs:
                    if row:
                        texts, fault = rows.of(row)
                        if fault:
                            outcome.reason, outcome.detail = "not_finite", fault
                        else:
                            outcome.row = {"key": outcome.key, "caption": row["caption"], **rows.kept(row, texts)}
                            outcome.status = "kept"
                    yield outcome
                rows.forget(forget)
        seconds = perf_counter() - begin
        context.notes["speed"] = {
            "captions_per_second": round(rows.captions / seconds, 3),
            "idle": round(max(0.0, 1 - busy / seconds), 4),
        }
        noted, self.encoding.notes = self.encoding.notes, Counter()
        if noted:
            context.notes["noted"] = dict(noted)

    def _encoded(self, partition: Partition) -> Iterator[Window]:
        """Windows of samples with the states of their captions; runs in a thread of its own, which encodes the next
        window while rows are written."""
        import torch

        torch.set_num_threads(self.config.threads)
        if self._on_gpu:
            torch.cuda.set_device(self.rank.device)
        known: OrderedDict[str, None] = OrderedDict()
        jobs = self._rows(partition)
        while window := list(islice(jobs, WINDOW // PER_SAMPLE if self.texts.several else WINDOW)):
            captions = [caption for _, row in window if row for caption in self.texts.captions_of(row)]
            new, forget = news(known, captions)
            yield window, new, self.encoding.encode_captions(new), forget

    def _rows(self, partition: Partition) -> Iterator[tuple[Outcome, Row]]:
        """Samples with their captions; for an unreadable sample, an empty row and an outcome with the reason."""
        columns = [name for name in self.texts.reads if name in self.upstream.schema]
        for stored in self.upstream.samples(partition.inputs[0].start):
            if not partition.wants(stored.key):
                continue
            outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
            try:
                row = stored.read(columns)
            except SampleError as error:
                outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
                row = {}
            yield outcome, row


@distributed
def main(rank: Rank, config: TextsConfig) -> None:
    engine.main(Texts, config, rank)


if __name__ == "__main__":
    main(config_for("texts"))
