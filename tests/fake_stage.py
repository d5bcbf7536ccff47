"""Small stages without images, and what tests ask of a dataset directory that the engine has made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import StageConfig, option
from pipeline.distributed import Place, Rank
from pipeline.partitions import engine
from pipeline.partitions.compact import stale_packs
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.gc import collect
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.packs import Packs
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context, Stage, follow_upstream
from pipeline.partitions.verify import verify
from pipeline.samples import Outcome, Schema, content_hash
from pipeline.storage import Folder

SCHEMA: Schema = {"key": "str", "jpg": "jpeg", "caption": "str"}


@dataclass(frozen=True, kw_only=True)
class FakeConfig(StageConfig):
    """Settings of the fake stages."""

    count: int = option(20, "samples", identity=True)
    partition_size: int = option(4, "samples per partition", identity=True)
    colour: str = option("red", "what samples say", identity=True)
    archives: bool = option(False, "partitions are archives whose samples only reading tells", identity=True)
    max_failed_fraction: float = option(1.0, "")


class Fake(Stage):
    """Of ten samples, six are kept, one is dropped, one is broken, one fails once and one fails always."""

    name = "fake"
    reads_upstream = False
    writes_to_stores = True

    @property
    def format(self) -> str:
        return "mds"

    def schema(self) -> Schema:
        return SCHEMA

    def plan(self, since: int = 0) -> Iterator[Partition]:
        config = self.config
        for start in range(0, config.count, config.partition_size):
            stop = min(start + config.partition_size, config.count)
            yield Partition((Input("fake", start, stop),), -1 if config.archives else stop - start)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (span,) = partition.inputs
        config = self.config
        again = partition.index >= -(-config.count // config.partition_size)
        archive = Outcome(f"archive{span.start:03d}", "kept", container=True, source=f"archive{span.start:03d}")
        if config.archives and span.start == config.partition_size and not again:
            archive.status, archive.reason, archive.retryable, archive.complete = "failed", "truncated", True, False
        else:
            for number in range(span.start, span.stop):
                archive.count += 1
                yield fake_outcome(number, config.colour, again)
        if config.archives:
            yield archive


def fake_outcome(number: int, colour: str, again: bool) -> Outcome:
    """What becomes of sample ``number``; ``again``: it is a retry."""
    key = f"sample{number:05d}"
    data = f"{colour} {number} ".encode() * (1 + number % 7)
    outcome = Outcome(key, "failed", source="fake", offset=number, source_bytes=len(data))
    kind = number % 10
    if kind == 6:
        outcome.status, outcome.reason = "dropped", "small"
    elif kind == 7:
        outcome.reason, outcome.detail = "broken", "no image"
    elif kind == 9 or (kind == 8 and not again):
        outcome.reason, outcome.retryable = "busy", True
    else:
        outcome.status, outcome.source_hash = "kept", content_hash(data)
        outcome.row = {"key": key, "jpg": data, "caption": f"{colour} sample {number}"}
    return outcome


class FakeFilter(Stage):
    """Reads a dataset directory, partition by partition; keys that end in 3 fail once, those in 5 are dropped."""

    name = "fakefilter"
    writes_to_stores = True

    @property
    def format(self) -> str:
        return "mds"

    def schema(self) -> Schema:
        return dict(self.upstream.schema)

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        for stored in self.upstream.samples(partition.inputs[0].start):
            if not partition.wants(stored.key):
                continue
            outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
            if stored.key.endswith("3") and partition.only is None:
                outcome.reason, outcome.retryable = "busy", True
            elif stored.key.endswith("5"):
                outcome.status, outcome.reason = "dropped", "five"
            else:
                outcome.status, outcome.row = "kept", stored.read()
            yield outcome


STAGES: dict[str, type[Stage]] = {"fake": Fake, "fakefilter": FakeFilter}


def rank_of(number: int = 0, world_size: int = 1) -> Rank:
    return Rank(Place(rank=number, world_size=world_size))


def run(output: Path, stage: type[Stage] = Fake, rank: Rank | None = None, **settings: Any) -> dict[str, Any]:
    """Run a stage to its end on one rank; what ``_SUCCESS`` says."""
    return engine.run(make(output, stage, rank, **settings))


def run_ranks(output: Path, stage: type[Stage], world_size: int, **settings: Any) -> None:
    """Run a stage to its end on ranks that work at the same time."""
    made = [make(output, stage, rank_of(number, world_size), **settings) for number in range(world_size)]
    with ThreadPoolExecutor(world_size) as ranks:
        list(ranks.map(engine.run, made))


def make(output: Path, stage: type[Stage] = Fake, rank: Rank | None = None, **settings: Any) -> Stage:
    from pipeline.config.schema import STAGES as CONFIGS

    return stage(CONFIGS[stage.name](output=str(output), **settings), rank or rank_of())


# ---- what is there


def committed(output: Path) -> dict[str, bytes]:
    """Data files and ledgers of all slots: path below the output → bytes."""
    slots = sorted(output.glob("data/*/[0-9]*"))
    return {str(slot.relative_to(output) / name): data for slot in slots for name, data in slot_files(slot).items()}


def slot_files(slot: Path) -> dict[str, bytes]:
    """Data files and the ledger of a slot, which may be packed: name → bytes."""
    output, bucket = slot.parents[2], int(slot.parent.name)
    found = {path.name: path.read_bytes() for path in slot.iterdir() if path.name != "record.json"}
    with Folder.open(output) as root:
        ledger = Packs(root).read(bucket, slot.name, LEDGER)
    return {**found, LEDGER: ledger} if ledger is not None else found


def rows(output: Path) -> Iterator[dict[str, Any]]:
    """Ledger rows of the partitions that count, in order, with the number of the partition."""
    dataset = Dataset.open(output)
    for index in range(dataset.partitions):
        for row in SlotReader(dataset, index).ledger().to_pylist():
            yield {**row, "partition": index}


def outcomes(output: Path) -> dict[str, str]:
    """Key → ``outcome:reason`` of its newest row, of samples."""
    return {row["key"]: f"{row['outcome']}:{row['reason']}" for row in rows(output) if not row["container"]}


def kept_keys(output: Path) -> list[str]:
    """Keys of the rows that readers get, in order; of those that are released, as the ledgers say."""
    dataset = Dataset.open(output)
    return [
        stored.key if index in dataset.released else stored.read()["key"]
        for index in range(dataset.partitions)
        for stored in dataset.samples(index)
        if stored.file
    ]


def assert_sound(output: Path) -> dict[str, Any]:
    """The promises for a finished output: balance, each key once, verify finds nothing; what ``_SUCCESS`` says."""
    dataset = Dataset.open(output)
    success = dataset.require_success()
    counts = success["counts"]
    assert counts["in"] == counts["kept"] + counts["dropped"] + counts["failed"]
    newest = outcomes(output)
    assert len(newest) == counts["in"]
    by_outcome = Counter(said.partition(":")[0] for said in newest.values())
    assert {name: by_outcome[name] for name in ("kept", "dropped", "failed")} == {
        name: counts[name] for name in ("kept", "dropped", "failed")
    }
    keys = kept_keys(output)
    assert len(keys) == len(set(keys)) == counts["kept"] == len(dataset)
    assert sorted(keys) == sorted(key for key, said in newest.items() if said.startswith("kept"))
    assert list(verify(dataset)) == []
    return success


_EXPECTED = re.compile(
    r"plan(\.\d+)?|data|claims|events|packed|_SUCCESS|README\.md|manifest\.(parquet|json)|index\.json"
)


def leftovers(output: Path) -> list[str]:
    """What ``gc`` leaves behind although it counts for nothing."""
    dataset = Dataset.open(output)
    list(collect(dataset, 0.0))
    slots = {dataset.path_of(index) for index in range(dataset.partitions)}
    found = [path.name for path in output.iterdir() if not _EXPECTED.fullmatch(path.name)]
    found += [str(p.relative_to(output)) for p in output.glob("data/*/*") if str(p.relative_to(output)) not in slots]
    found += [str(path) for path in output.glob("packed/.*")] + [str(name) for name in stale_packs(dataset)]
    return found + [path.name for path in output.parent.iterdir() if path.name.startswith(".")]
