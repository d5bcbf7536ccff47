"""stage=dedup: keep one image of each group of duplicates. Optional, between filter and shard.

Reads the ledgers of ``filter`` (``method=hash``) or the embeddings stored by ``score`` (``method=semantic``), and
writes ledgers and pointers; images are not copied. The ranks share the search
(:mod:`pipeline.curation.search`).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from pipeline.config.cli import config_for
from pipeline.config.dedup import SEMANTIC
from pipeline.config.schema import ConfigError, DedupConfig
from pipeline.curation.pointers import PointerStage
from pipeline.curation.search import HashSearch, Search
from pipeline.distributed import Rank, distributed
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context, follow_upstream
from pipeline.registry import stages
from pipeline.samples import TAKEN, Outcome


@stages.register("dedup", DedupConfig)
class Dedup(PointerStage[DedupConfig]):
    name = "dedup"
    version = 2

    def identity(self) -> dict[str, Any]:
        """Scores are identified by what their embeddings were computed with, not by their path."""
        if self.config.method != SEMANTIC:
            return super().identity()
        from pipeline.curation.semantic_search import fingerprint_of, scores_of

        return super().identity() | {"scores": fingerprint_of(scores_of(self.upstream, self.config.scores))}

    def plan(self, since: int = 0) -> Iterator[Partition]:
        if self.config.method != SEMANTIC and self.upstream.stage != "filter":
            raise ConfigError(f"stage dedup reads the output of filter; {self.upstream.root.path} is of another stage")
        if self.config.memory < 1:
            raise ConfigError(f"memory={self.config.memory}: give MiB, at least 1")
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (span,) = partition.inputs
        first = int(self.upstream.places[span.start])
        verdicts = self._search(span.start).verdicts(first, int(self.upstream.places[span.stop]))
        stored = SlotReader(self.upstream, span.start).stored(taken=True)
        for sample, place in zip(stored, self.image_places(span.start), strict=True):
            outcome = Outcome(sample.key, "kept", source=sample.source, offset=sample.offset)
            reason, other = verdicts.get(first + sample.offset, ("", ""))
            if not sample.file:
                outcome.status, outcome.reason = "failed", TAKEN
            elif reason:
                outcome.status, outcome.reason, outcome.detail = "dropped", reason, f"of {other}"
            else:
                outcome.row = {"key": sample.key, "place": place}
            if partition.wants(sample.key):
                yield outcome

    def _search(self, index: int) -> Search:
        """The search that decides partition ``index`` of the upstream, over samples up to its generation."""
        ends = self._ends
        generation = bisect.bisect_right(ends, index)
        if generation not in self._searches:
            self._searches[generation] = self._kind(self, ends[: generation + 1])
        return self._searches[generation]

    @property
    def _kind(self) -> type[Search]:
        if self.config.method != SEMANTIC:
            return HashSearch
        from pipeline.curation.semantic_search import SemanticSearch

        return SemanticSearch

    @cached_property
    def _searches(self) -> dict[int, Search]:
        return {}

    @property
    def _ends(self) -> list[int]:
        """Number of upstream partitions at each generation that added samples."""
        plans = Dataset.open(self.output).plans
        return sorted({plan.header["upstream"]["partitions"] for plan in plans if plan.header.get("upstream")})


@distributed
def main(rank: Rank, config: DedupConfig) -> None:
    engine.main(Dedup, config, rank)


if __name__ == "__main__":
    main(config_for("dedup"))
