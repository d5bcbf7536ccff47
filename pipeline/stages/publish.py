"""stage=publish: copy a finished dataset directory to an object store, completely or not at all.

Ranks share the work. If interrupted, the same command resumes without sending finished files again.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.config.cli import config_for
from pipeline.config.schema import PublishConfig
from pipeline.distributed import Rank, distributed
from pipeline.partitions.claims import Claims
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.publish import Publication
from pipeline.registry import stages
from pipeline.stores import Store


def publish(config: PublishConfig, rank: Rank) -> str:
    """Publish ``config.input`` at ``config.to``; returns a summary line.

    Raises:
        ConfigError: the dataset is not finished, or the target holds something else.
        StorageError: the store rejects a request or fails, or a file is damaged.
    """
    dataset = Dataset.open(Path(config.input).absolute())
    if config.to.startswith("hf://"):
        return _to_hub(config, dataset, rank)
    publication = Publication(dataset, Store(config.to), config.connections, rank.check_stop)
    if config.count_only:
        return _estimated(publication.estimate(), config)
    publication.claim_target(config.overwrite, rank.is_main)
    claims = Claims(dataset.root, config.lease)
    try:
        publication.run(claims, rank.rank, rank.world_size)
    finally:
        claims.close()
    unnamed = publication.unnamed(config.delete) if rank.is_main else []
    publication.store.delete(unnamed)
    return _told(publication.store.url, publication.sent, publication.there, len(unnamed))


def _to_hub(config: PublishConfig, dataset: Dataset, rank: Rank) -> str:
    """The Hub takes one commit at a time, so rank 0 does all the work."""
    from pipeline.partitions.publish_hub import HubPublication

    publication = HubPublication(dataset, config.to, rank.check_stop)
    if config.count_only:
        return _estimated(publication.estimate(), config)
    if not rank.is_main:
        return f"rank 0 publishes at {config.to}"
    deleted = publication.run(config.overwrite, config.delete)
    return _told(config.to, publication.sent, publication.there, deleted)


def _estimated(counts: Counter[str], config: PublishConfig) -> str:
    costs = []
    if config.request_price:
        costs.append(f"the requests cost about {counts['requests'] * config.request_price / 1000:,.2f}")
    if config.storage_price:
        costs.append(f"storing what is sent costs about {counts['bytes'] / 1e9 * config.storage_price:,.2f} a month")
    return (
        f"{counts['files']} files with {counts['bytes'] / 1e9:,.3f} GB are to be sent in about {counts['requests']} "
        f"requests; {counts['there']} are there already" + "".join(f"; {cost}" for cost in costs)
    )


def _told(place: str, sent: Counter[str], there: Counter[str], deleted: int) -> str:
    more = f", {deleted} objects were deleted" if deleted else ""
    return (
        f"published at {place}: this rank sent {sent['files']} files with {sent['bytes'] / 1e9:,.3f} GB, "
        f"{there['files']} were there already{more}"
    )


@stages.register("publish", PublishConfig)
@distributed
def main(rank: Rank, config: PublishConfig) -> None:
    print(f"{config.input}: {publish(config, rank)}", flush=True)


if __name__ == "__main__":
    main(config_for("publish"))
