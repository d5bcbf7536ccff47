"""The search for duplicates, shared by ranks: each piece of work is a file in ``partial/``.

The last of these files holds the verdicts: which samples are dropped, and in favour of which others. Once it exists,
all other files are deleted.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.dedup import DedupConfig
from pipeline.config.options import ConfigError
from pipeline.curation.duplicates import ROW, Links, Rows, Unit, batches, decide, forest, links, members, rows, units
from pipeline.partitions.claims import Claims
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.gc import PARTIAL
from pipeline.partitions.stage import Stage
from pipeline.samples import TAKEN
from pipeline.storage import GONE, Folder, HashedFile

ROWS_AT_ONCE = 1 << 20
_GROUP = 1 << 16  # verdicts per row group
_POLL = 0.2
_VERDICTS = "verdicts.parquet"
_LOOKS = ("source_hash", "phash", "source_pixels")
Job = Callable[[HashedFile], None]
"""Writes a file of the search."""


class Search(ABC):
    """A search in the first ``ends[-1]`` partitions of a stage's upstream; ``ends`` are the ends of its generations.

    Attributes:
        near: reason of a dropped sample whose bytes differ from those of the copy that is kept.
    """

    near: str

    def __init__(self, stage: Stage[DedupConfig], ends: list[int]) -> None:
        self._stage = stage
        self._upstream: Dataset = stage.upstream
        self._ends = ends
        self._partitions = ends[-1]
        self._places = self._upstream.places
        self._count = int(self._places[self._partitions])

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of its folder, which differs between searches with different results."""

    @property
    @abstractmethod
    def rows_at_once(self) -> int:
        """Maximum samples that a rank holds in memory."""

    @abstractmethod
    def steps(self, folder: Folder) -> Iterator[dict[str, Job]]:
        """Yield the files to be written in each step; a step needs all files of the previous steps."""

    @abstractmethod
    def found(self, folder: Folder) -> Iterator[Links]:
        """Yield the links found by all steps, in pieces."""

    @abstractmethod
    def rows_of(self, index: int) -> Rows:
        """Rows of the participating samples of the upstream's partition ``index``."""

    def verdicts(self, first: int, stop: int) -> dict[int, tuple[str, str]]:
        """Reason, and key of the kept copy, of each dropped sample at the positions [first, stop), by position."""
        with self._folder() as folder:
            if not folder.exists(_VERDICTS):
                self._work(folder)
            with os.fdopen(folder.open_file(_VERDICTS), "rb") as opened, pq.ParquetFile(opened) as file:
                found: dict[int, tuple[str, str]] = {}
                for group in range(file.metadata.num_row_groups):
                    known = file.metadata.row_group(group).column(0).statistics
                    if known is not None and known.max >= first and known.min < stop:  # None: no rows
                        table = file.read_row_group(group, use_threads=False)
                        mine = table.filter(pc.and_(pc.greater_equal(table[0], first), pc.less(table[0], stop)))
                        for place, exact, other in zip(*(column.to_pylist() for column in mine.columns), strict=True):
                            found[place] = ("duplicate" if exact else self.near, other)
                return found

    def _folder(self) -> Folder:
        with Folder.open(self._stage.output) as root:
            root.mkdir(PARTIAL, exist_ok=True)
            root.mkdir(f"{PARTIAL}/{self.name}", exist_ok=True)
            return root.folder(f"{PARTIAL}/{self.name}")

    def _work(self, folder: Folder) -> None:
        """Do the remaining work, and wait for that of other ranks, until the verdicts exist."""
        self._stage.rank.log.info("%s: searching %d samples for duplicates", self._stage.output, self._count)
        claims = Claims(folder, self._stage.config.lease)
        try:
            try:
                for jobs in self.steps(folder):
                    self._all(folder, claims, jobs)
            except OSError as error:
                if error.errno not in GONE or not folder.exists(_VERDICTS):
                    raise  # otherwise, other ranks have finished and deleted files of a step
            self._all(folder, claims, {_VERDICTS: lambda file: self._judge(folder, file)})
        finally:
            claims.close()
        for name in folder.listdir():
            if name not in (_VERDICTS, "claims") and not name.startswith("."):
                folder.unlink(name, missing_ok=True)

    def _all(self, folder: Folder, claims: Claims, jobs: dict[str, Job]) -> None:
        """Ensure that this or another rank writes all files of ``jobs``; none is needed once the verdicts exist."""
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
                            raise  # otherwise, others have finished and deleted its inputs
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

    @cached_property
    def batches(self) -> list[range]:
        """Ranges of partitions, one per job."""
        return list(batches(np.diff(self._places[: self._partitions + 1]), self.rows_at_once))

    def rows_jobs(self) -> dict[str, Job]:
        return {f"rows-{number}": self._rows_job(span) for number, span in enumerate(self.batches)}

    def _rows_job(self, span: range) -> Job:
        def write(file: HashedFile) -> None:
            for index in span:
                self._stage.rank.check_stop()
                file.write(self.rows_of(index).tobytes())

        return write

    def ledger(
        self, index: int, columns: tuple[str, ...]
    ) -> tuple[pa.Table, npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """The ledger of a partition, the mask of its kept samples, and their positions."""
        ledger = SlotReader(self._upstream, index).ledger(["container", "outcome", "reason", *columns])
        sample = pc.invert(ledger["container"])
        kept = pc.and_(pc.equal(ledger["outcome"], "kept"), sample)
        taken = pc.and_(pc.and_(pc.equal(ledger["outcome"], "dropped"), pc.equal(ledger["reason"], TAKEN)), sample)
        is_kept, was_kept = (np.asarray(mask.combine_chunks()) for mask in (kept, pc.or_(kept, taken)))
        places = self._places[index] + np.cumsum(was_kept) - 1
        return ledger, is_kept, places[is_kept]

    def rows(self, folder: Folder) -> Iterator[Rows]:
        for number in range(len(self.batches)):
            self._stage.rank.check_stop()
            yield np.frombuffer(folder.read(f"rows-{number}"), ROW)

    # ---- verdicts

    def _judge(self, folder: Folder, file: HashedFile) -> None:
        stars: Links = forest([])
        for some in self.found(folder):
            self._stage.rank.check_stop()
            stars = forest([stars, some])
        places = members(stars)
        mine = [chunk[np.isin(chunk["place"], places, assume_unique=True)] for chunk in self.rows(folder)]
        samples = np.concatenate([np.empty(0, ROW), *mine])
        samples = samples[np.argsort(samples["place"])]
        keys = self._keys(places)
        by_key = np.empty(len(places), np.int64)
        by_key[pc.sort_indices(keys).to_numpy()] = np.arange(len(places))
        came = np.searchsorted(self._places[self._ends], places, side="right")
        found = decide(stars, samples, by_key, came)
        others = keys.take(pa.array(np.searchsorted(places, found.stays)))
        table = pa.table({"place": found.places, "exact": found.exact, "other": others})
        pq.write_table(table, file, row_group_size=_GROUP)

    def _keys(self, places: npt.NDArray[np.int64]) -> pa.Array:
        """The keys of the samples at the sorted positions ``places``."""
        parts = [pa.array([], pa.string())]
        for index in np.unique(np.searchsorted(self._places, places, side="right") - 1).tolist():
            self._stage.rank.check_stop()
            ledger, kept, here = self.ledger(index, ("key",))
            parts.append(ledger["key"].filter(pa.array(kept)).filter(pa.array(np.isin(here, places))).combine_chunks())
        return pa.concat_arrays(parts)


class HashSearch(Search):
    """Searches the output of ``filter`` by source bytes and perceptual hashes (:mod:`pipeline.curation.duplicates`)."""

    near = "near_duplicate"
    rows_at_once = ROWS_AT_ONCE

    @cached_property
    def _units(self) -> list[Unit]:
        return units(self._count, self._stage.config.hamming, self._stage.config.memory << 20)

    @property
    def name(self) -> str:
        content = self._upstream.require_success()["content_digest"][:16]
        return f"dedup-{content}-{self._partitions}-{self._units[0].buckets}"

    def steps(self, folder: Folder) -> Iterator[dict[str, Job]]:
        yield self.rows_jobs()
        yield {_unit_name(unit): self._links_job(folder, unit) for unit in self._units}

    def found(self, folder: Folder) -> Iterator[Links]:
        for unit in self._units:
            yield np.frombuffer(folder.read(_unit_name(unit)), np.int64).reshape(-1, 2)

    def rows_of(self, index: int) -> Rows:
        ledger, kept, places = self.ledger(index, _LOOKS)
        if "phash" not in ledger.column_names:
            if kept.any():
                raise ConfigError(
                    f"{self._upstream.root.path} was filtered by an older version: run stage=filter again"
                )
            return np.empty(0, ROW)
        found = ledger.filter(pa.array(kept))
        content, look, pixels = (found[name] for name in _LOOKS)
        return rows(content.to_pylist(), look.to_pylist(), pixels.to_numpy(), places)

    def _links_job(self, folder: Folder, unit: Unit) -> Job:
        def write(file: HashedFile) -> None:
            found = links(self.rows(folder), unit, self._count, self._stage.config.hamming)
            file.write(found.tobytes())

        return write


def _unit_name(unit: Unit) -> str:
    return f"links-{unit.table}-{unit.bucket}"
