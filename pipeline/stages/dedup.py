"""stage=dedup: of images that are the same, or nearly so, one stays. Optional, between filter and shard.

It reads the ledgers of ``filter`` and writes ledgers and pointers: the images stay where they are. The ranks share the
search (:mod:`pipeline.curation.duplicates`): each piece of it is a file below ``partial/``, made by the first to come.
"""

from __future__ import annotations

import bisect
import os
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, DedupConfig
from pipeline.curation.duplicates import ROW, Links, Rows, Unit, batches, decide, forest, links, members, rows, units
from pipeline.distributed import Rank, distributed
from pipeline.partitions import engine
from pipeline.partitions.claims import Claims
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.gc import PARTIAL
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Stage, follow_upstream
from pipeline.samples import TAKEN, Outcome, Schema
from pipeline.storage import GONE, Folder, HashedFile

_ROWS_AT_ONCE = 1 << 20
_GROUP = 1 << 16  # verdicts that are read at once
_POLL = 0.2
_VERDICTS = "verdicts.parquet"
_LOOKS = ("source_hash", "phash", "source_pixels")


class Dedup(Stage):
    name = "dedup"
    version = 2

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
        if self.upstream.stage != "filter":
            raise ConfigError(f"stage dedup reads what filter made; {self.upstream.root.path} is of another stage")
        if self.config.memory < 1:
            raise ConfigError(f"memory={self.config.memory}: give MiB, at least 1")
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition) -> Iterator[Outcome]:
        (span,) = partition.inputs
        first = int(self.upstream.places[span.start])
        verdicts = self._search(span.start).verdicts(first, int(self.upstream.places[span.stop]))
        for stored in self.upstream.samples(span.start):
            outcome = Outcome(stored.key, "kept", source=stored.source, offset=stored.offset)
            place = first + stored.offset
            reason, other = verdicts.get(place, ("", ""))
            if not stored.file:
                outcome.status, outcome.reason = "failed", TAKEN
            elif reason:
                outcome.status, outcome.reason, outcome.detail = "dropped", reason, f"of {other}"
            else:
                outcome.row = {"key": stored.key, "place": place}
            if partition.wants(stored.key):
                yield outcome

    def _search(self, index: int) -> Search:
        """The search that decides on partition ``index`` of the upstream: among all that was there when it came."""
        ends = self._ends
        generation = bisect.bisect_right(ends, index)
        if generation not in self._searches:
            self._searches[generation] = Search(self, ends[: generation + 1])
        return self._searches[generation]

    @cached_property
    def _searches(self) -> dict[int, Search]:
        return {}

    @property
    def _ends(self) -> list[int]:
        """How many partitions the upstream had at each generation that brought samples."""
        plans = Dataset.open(self.output).plans
        return sorted({plan.header["upstream"]["partitions"] for plan in plans if plan.header.get("upstream")})


class Search:
    """The search among the first ``ends[-1]`` partitions of a stage's upstream, which came in generations up to
    ``ends``; done by all ranks together."""

    def __init__(self, stage: Dedup, ends: list[int]) -> None:
        self._stage = stage
        self._upstream = stage.upstream
        self._ends = ends
        self._partitions = ends[-1]
        self._places = self._upstream.places
        self._count = int(self._places[self._partitions])
        self._batches = list(batches(np.diff(self._places[: self._partitions + 1]), _ROWS_AT_ONCE))
        memory = stage.config.memory << 20
        self._units = units(self._count, stage.config.hamming, memory)
        content = self._upstream.require_success()["content_digest"][:16]
        self._name = f"dedup-{content}-{self._partitions}-{self._units[0].buckets}"

    def verdicts(self, first: int, stop: int) -> dict[int, tuple[str, str]]:
        """Place → (reason, key of the one that stays), of what goes among the places ``first … stop - 1``."""
        with self._folder() as folder:
            if not folder.exists(_VERDICTS):
                self._work(folder)
            with os.fdopen(folder.open_file(_VERDICTS), "rb") as opened, pq.ParquetFile(opened) as file:
                found: dict[int, tuple[str, str]] = {}
                for group in range(file.metadata.num_row_groups):
                    known = file.metadata.row_group(group).column(0).statistics
                    if known is not None and known.max >= first and known.min < stop:  # None: of no rows
                        table = file.read_row_group(group, use_threads=False)
                        mine = table.filter(pc.and_(pc.greater_equal(table[0], first), pc.less(table[0], stop)))
                        for place, exact, other in zip(*(column.to_pylist() for column in mine.columns), strict=True):
                            found[place] = ("duplicate" if exact else "near_duplicate", other)
                return found

    def _folder(self) -> Folder:
        with Folder.open(self._stage.output) as root:
            root.mkdir(PARTIAL, exist_ok=True)
            root.mkdir(f"{PARTIAL}/{self._name}", exist_ok=True)
            return root.folder(f"{PARTIAL}/{self._name}")

    def _work(self, folder: Folder) -> None:
        """Do what is open, and wait for what others are at, until the verdicts are there."""
        self._stage.rank.log.info("%s: searching %d samples for duplicates", self._stage.output, self._count)
        claims = Claims(folder, self._stage.config.lease)
        try:
            self._all(folder, claims, {f"rows-{n}": self._rows_job(span) for n, span in enumerate(self._batches)})
            self._all(folder, claims, {_unit_name(unit): self._links_job(folder, unit) for unit in self._units})
            self._all(folder, claims, {_VERDICTS: lambda file: self._judge(folder, file)})
        finally:
            claims.close()
        for name in folder.listdir():
            if name.startswith(("rows-", "links-")):
                folder.unlink(name, missing_ok=True)

    def _all(self, folder: Folder, claims: Claims, jobs: dict[str, Callable[[HashedFile], None]]) -> None:
        """Have all files made that ``jobs`` make, by whomever; the verdicts make up for all others."""
        order = list(jobs)
        start = len(order) * self._stage.rank.rank // self._stage.rank.world_size
        open_jobs = order[start:] + order[:start]
        while open_jobs := self._still_open(folder, open_jobs):
            progress = False
            for name in open_jobs:
                self._stage.rank.check_stop()
                if not folder.exists(name) and not folder.exists(_VERDICTS) and claims.take(name):
                    try:
                        folder.write_stream_by(name, jobs[name])
                    except OSError as error:
                        if error.errno not in GONE or not folder.exists(_VERDICTS):
                            raise  # else others were done with it all, and have deleted what it is made of
                    finally:
                        claims.release(name)
                    progress = True
            if not progress:
                with self._stage.rank.waiting():
                    time.sleep(_POLL)

    def _still_open(self, folder: Folder, names: list[str]) -> list[str]:
        there = set(folder.listdir())
        return [] if _VERDICTS in there else [name for name in names if name not in there]

    # ---- rows

    def _rows_job(self, span: range) -> Callable[[HashedFile], None]:
        def write(file: HashedFile) -> None:
            for index in span:
                file.write(self._rows_of(index).tobytes())

        return write

    def _rows_of(self, index: int) -> Rows:
        ledger, kept, places = self._ledger(index, _LOOKS)
        if "phash" not in ledger.column_names:
            if kept.any():
                raise ConfigError(f"{self._upstream.root.path} was filtered by an older version: run stage=filter anew")
            return np.empty(0, ROW)
        found = ledger.filter(pa.array(kept))
        content, look, pixels = (found[name] for name in _LOOKS)
        return rows(content.to_pylist(), look.to_pylist(), pixels.to_numpy(), places)

    def _ledger(self, index: int, columns: tuple[str, ...]) -> tuple[pa.Table, np.ndarray, np.ndarray]:
        """The ledger of a partition, which of its rows are kept samples, and the places of these."""
        ledger = SlotReader(self._upstream, index).ledger(["container", "outcome", "reason", *columns])
        sample = pc.invert(ledger["container"])
        kept = pc.and_(pc.equal(ledger["outcome"], "kept"), sample)
        taken = pc.and_(pc.and_(pc.equal(ledger["outcome"], "dropped"), pc.equal(ledger["reason"], TAKEN)), sample)
        is_kept, was_kept = (np.asarray(mask.combine_chunks()) for mask in (kept, pc.or_(kept, taken)))
        places = self._places[index] + np.cumsum(was_kept) - 1
        return ledger, is_kept, places[is_kept]

    def _rows(self, folder: Folder) -> Iterator[Rows]:
        for number in range(len(self._batches)):
            self._stage.rank.check_stop()
            yield np.frombuffer(folder.read(f"rows-{number}"), ROW)

    # ---- links

    def _links_job(self, folder: Folder, unit: Unit) -> Callable[[HashedFile], None]:
        def write(file: HashedFile) -> None:
            found = links(self._rows(folder), unit, self._count, self._stage.config.hamming)
            file.write(found.tobytes())

        return write

    # ---- verdicts

    def _judge(self, folder: Folder, file: HashedFile) -> None:
        stars: Links = forest([])
        for unit in self._units:
            self._stage.rank.check_stop()
            stars = forest([stars, np.frombuffer(folder.read(_unit_name(unit)), np.int64).reshape(-1, 2)])
        places = members(stars)
        some = [chunk[np.isin(chunk["place"], places, assume_unique=True)] for chunk in self._rows(folder)]
        samples = np.concatenate([np.empty(0, ROW), *some])
        samples = samples[np.argsort(samples["place"])]
        keys = self._keys(places)
        by_key = np.empty(len(places), np.int64)
        by_key[pc.sort_indices(keys).to_numpy()] = np.arange(len(places))
        came = np.searchsorted(self._places[self._ends], places, side="right")
        found = decide(stars, samples, by_key, came)
        others = keys.take(pa.array(np.searchsorted(places, found.stays)))
        table = pa.table({"place": found.places, "exact": found.exact, "other": others})
        pq.write_table(table, file, row_group_size=_GROUP)

    def _keys(self, places: np.ndarray) -> pa.Array:
        """The keys of the samples at ``places``, which are in order."""
        parts = [pa.array([], pa.string())]
        for index in np.unique(np.searchsorted(self._places, places, side="right") - 1).tolist():
            self._stage.rank.check_stop()
            ledger, kept, here = self._ledger(index, ("key",))
            parts.append(ledger["key"].filter(pa.array(kept)).filter(pa.array(np.isin(here, places))).combine_chunks())
        return pa.concat_arrays(parts)


def _unit_name(unit: Unit) -> str:
    return f"links-{unit.table}-{unit.bucket}"


@distributed
def main(rank: Rank, config: DedupConfig) -> None:
    engine.main(Dedup, config, rank)


if __name__ == "__main__":
    main(config_for("dedup"))
