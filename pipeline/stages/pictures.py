"""What stages have in common that look at pictures, a batch at a time, and write something about each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from pipeline import images
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Stage, follow_upstream
from pipeline.samples import Outcome, Row, SampleError, content_hash

Seen = tuple[Outcome, Row, np.ndarray]


class PictureStage(Stage):
    """Batches never reach over partitions, so that the result does not depend on who does which of them."""

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return follow_upstream(self.upstream, since)

    @abstractmethod
    def describe_batch(self, rows: Sequence[Row], pictures: Sequence[np.ndarray]) -> list[Row]:
        """The rows to write for ``rows`` and their pictures, uint8 (h, w, 3)."""

    def process(self, partition: Partition) -> Iterator[Outcome]:
        import torch

        torch.set_num_threads(self.config.threads)
        samples = self._decoded(partition)
        while batch := list(islice(samples, self.config.batch_size)):
            good = [sample for sample in batch if not isinstance(sample, Outcome)]
            made = self.describe_batch([row for _, row, _ in good], [p for _, _, p in good]) if good else []
            rows = iter(made)
            for sample in batch:
                if isinstance(sample, Outcome):
                    yield sample
                    continue
                sample[0].row = next(rows)
                yield sample[0]

    def _decoded(self, partition: Partition) -> Iterator[Seen | Outcome]:
        for stored in self.upstream.samples(partition.inputs[0].start):
            if not partition.wants(stored.key):
                continue
            outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
            try:
                row = stored.read()
                outcome.source_bytes, outcome.source_hash = len(row["jpg"]), content_hash(row["jpg"])
                picture = images.decode(row["jpg"], images.probe(row["jpg"], images.Limits()))
            except (SampleError, images.ImageError) as error:
                outcome.reason, outcome.detail = error.reason, error.detail
                outcome.retryable = getattr(error, "retryable", False)
                yield outcome
                continue
            outcome.status = "kept"
            outcome.height, outcome.width = picture.shape[:2]
            yield outcome, row, picture
