"""stage=dedup: of images that are the same, or nearly so, one stays. Optional, between filter and shard.

It reads the ledgers of ``filter`` and writes ledgers and pointers: the images stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cli import config_for
from pipeline.config import ConfigError, DedupConfig
from pipeline.distributed import Rank, distributed
from pipeline.duplicates import SCHEMA, duplicates
from pipeline.partitions import engine
from pipeline.partitions.dataset import SlotReader
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Stage, follow_upstream
from pipeline.samples import TAKEN, Outcome, Schema


class Dedup(Stage):
    name = "dedup"

    @property
    def format(self) -> str:
        return "pointer"

    def schema(self) -> Schema:
        return dict(self.upstream.schema)

    def extra(self) -> dict[str, Any]:
        return dict(self.upstream.header["extra"])

    def origin(self) -> str:
        return self.input

    def plan(self, since: int = 0) -> Iterator[Partition]:
        if since:
            raise ConfigError(
                f"{self.output}: its input has gained samples, which may be duplicates of old ones: run stage=dedup "
                "with overwrite=true, and the stages after it"
            )
        if self.upstream.stage != "filter":
            raise ConfigError(f"stage dedup reads what filter made; {self.upstream.root.path} is of another stage")
        return follow_upstream(self.upstream, since)

    @cached_property
    def verdicts(self) -> dict[str, tuple[str, str]]:
        """What goes, and why; every rank finds the same."""
        tables = [self._ledger(index) for index in range(self.upstream.partitions)]
        return duplicates(pa.concat_tables(tables), self.config.hamming)

    def _ledger(self, index: int) -> pa.Table:
        table = SlotReader(self.upstream, index).ledger()
        kept = table.filter(pc.and_(pc.equal(table["outcome"], "kept"), pc.invert(table["container"])))
        if "phash" in kept.column_names:
            return kept.select(SCHEMA.names)
        if len(kept):
            raise ConfigError(f"{self.upstream.root.path} was filtered by an older version: run stage=filter anew")
        return SCHEMA.empty_table()

    def process(self, partition: Partition) -> Iterator[Outcome]:
        (span,) = partition.inputs
        first = int(self.upstream.places[span.start])
        for stored in self.upstream.samples(span.start):
            outcome = Outcome(stored.key, "kept", source=stored.source, offset=stored.offset)
            reason, other = self.verdicts.get(stored.key, ("", ""))
            if not stored.file:
                outcome.status, outcome.reason = "failed", TAKEN
            elif reason:
                outcome.status, outcome.reason, outcome.detail = "dropped", reason, f"of {other}"
            else:
                outcome.row = {"key": stored.key, "place": first + stored.offset}
            if partition.wants(stored.key):
                yield outcome


@distributed
def main(rank: Rank, config: DedupConfig) -> None:
    engine.main(Dedup, config, rank)


if __name__ == "__main__":
    main(config_for("dedup"))
