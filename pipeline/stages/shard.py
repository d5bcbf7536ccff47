"""stage=shard: all kept samples, shuffled if asked, in even partitions of a storage format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.cli import config_for
from pipeline.config import ConfigError, ShardConfig
from pipeline.distributed import Rank, distributed
from pipeline.loading import Permutation
from pipeline.partitions import engine
from pipeline.partitions.dataset import RandomAccess, Stored
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Stage
from pipeline.randomness import keyed_seed
from pipeline.samples import Outcome, SampleError, Schema, content_hash

_PARTITION_BYTES = 512 << 20


class Shard(Stage):
    name = "shard"

    @property
    def format(self) -> str:
        return str(self.config.format)

    def schema(self) -> Schema:
        return dict(self.upstream.schema)

    def extra(self) -> dict[str, Any]:
        return dict(self.upstream.header["extra"])

    def plan(self, since: int = 0) -> Iterator[Partition]:
        """Even cuts of the upstream's positions; what it gained later is cut and shuffled by itself."""
        starts = self.upstream.places
        first, total = int(starts[since]), int(starts[-1] - starts[since])
        count = -(-total // self._partition_size())
        for number in range(count):
            start, stop = total * number // count, total * (number + 1) // count
            yield Partition((Input("upstream", first, first + total), Input("positions", start, stop)), stop - start)

    def _partition_size(self) -> int:
        size = int(self.config.partition_size)
        if size < 0:
            raise ConfigError(f"partition_size={size}: must be at least 1, or 0 for about 512 MiB")
        counts = self.upstream.require_success()["counts"]
        return size or max(1, int(_PARTITION_BYTES * counts["kept"] / max(counts["bytes"], 1)))

    def process(self, partition: Partition) -> Iterator[Outcome]:
        whole, span = partition.inputs
        positions = np.arange(span.start, span.stop)
        if self.config.shuffle:
            seed = keyed_seed(self.config.seed, "shard", whole.start)
            positions = Permutation(whole.stop - whole.start, seed)[positions]
        upstream = RandomAccess(self.upstream, taken=True)
        for position in positions:
            yield _copy(upstream.stored(whole.start + int(position)))


def _copy(stored: Stored) -> Outcome:
    outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
    try:
        row = stored.read()
    except SampleError as error:
        outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
        return outcome
    outcome.status, outcome.row = "kept", row
    outcome.width, outcome.height = row.get("width", 0), row.get("height", 0)
    outcome.source_bytes, outcome.source_hash = len(row["jpg"]), content_hash(row["jpg"])
    return outcome


@distributed
def main(rank: Rank, config: ShardConfig) -> None:
    engine.main(Shard, config, rank)


if __name__ == "__main__":
    main(config_for("shard"))
