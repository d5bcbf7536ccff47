"""The search for samples with similar embeddings (from ``stage=score``), shared by ranks.

Steps: for each batch of partitions, the rows of its samples; its sample for k-means, drawn by key; the centres; for
each batch, its vectors sorted by cell; for each unit of cells, the links.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.config.dedup import DedupConfig
from pipeline.config.options import ConfigError
from pipeline.curation.duplicates import Links, Rows, batches, forest, rows
from pipeline.curation.search import ROWS_AT_ONCE, Job, Search
from pipeline.curation.semantic import (
    EMBEDDING,
    PER_CELL,
    Block,
    Places,
    Vectors,
    by_cell,
    cells_for,
    centres,
    linked,
    nearest,
)
from pipeline.formats.scores import VECTOR, ScoresReader
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.planning import last_upstream
from pipeline.partitions.stage import Stage
from pipeline.storage import Folder, HashedFile

_CENTRES = "centres"
_UNITS = 256  # number of units of the comparison
_LOOKS = ("key", "source_hash", "source_pixels", "width", "height")
_Chunk = list[tuple[int, int, int]]
"""Ranges of rows: the number of a sorted file, start and stop."""


class SemanticSearch(Search):
    """Searches by the cosine of embeddings (:mod:`pipeline.curation.semantic`)."""

    near = "semantic_duplicate"

    def __init__(self, stage: Stage[DedupConfig], ends: list[int]) -> None:
        super().__init__(stage, ends)
        self._scores = scores_of(self._upstream, stage.config.scores)
        self._width = width_of(self._scores)
        self._memory = int(stage.config.memory) << 20
        sampled = max(1, min(self._count, self._memory // (8 * self._width)))
        self._probes = int(stage.config.probes)
        self._cells = cells_for(self._count, self._probes, sampled)
        self._share = min(sampled, PER_CELL * self._cells) / max(1, self._count)

    @property
    def name(self) -> str:
        """Depends on the embeddings, too, even for the same samples."""
        states = [dataset.require_success()["content_digest"] for dataset in (self._upstream, self._scores)]
        said = f"{states} {self._probes} {self._cells} {self._stage.config.cosine!r} {self._stage.config.seed}"
        return f"semantic-{xxhash.xxh3_64_hexdigest(said)}-{self._partitions}-{len(self.batches)}"

    @property
    def rows_at_once(self) -> int:
        """Number of vectors that fit into memory together with their copies for other cells."""
        return max(1, min(ROWS_AT_ONCE, self._memory // (2 * self._width * (self._probes + 4))))

    def steps(self, folder: Folder) -> Iterator[dict[str, Job]]:
        spans = list(enumerate(self.batches))
        yield self.rows_jobs()
        yield {f"sample-{number}": self._sample_job(span) for number, span in spans}
        yield {_CENTRES: lambda file: self._find_centres(folder, file)}
        yield {f"cells-{number}": self._cells_job(folder, span) for number, span in spans}
        yield {f"links-{unit.start}": self._links_job(folder, unit) for unit in self._units(folder)}

    def found(self, folder: Folder) -> Iterator[Links]:
        for unit in self._units(folder):
            yield np.frombuffer(folder.read(f"links-{unit.start}"), np.int64).reshape(-1, 2)

    # ---- inputs

    def rows_of(self, index: int) -> Rows:
        """Source hash and pixels of samples with an embedding, from the ledger of the scored dataset."""
        ledger, kept, places = self.ledger(index, ("key",))
        keys = ledger["key"].filter(kept).to_pylist()
        known = self._vectors_of(index)
        looks = self._looks_of(index)
        mine = [number for number, key in enumerate(keys) if key in known]
        found = [looks.get(keys[number], ("", 0)) for number in mine]
        return rows([one[0] for one in found], [""] * len(mine), [one[1] for one in found], places[mine])

    def _looks_of(self, index: int) -> dict[str, tuple[str, int]]:
        scored, number = self._scored(index)
        ledger = SlotReader(scored, number).ledger(list(_LOOKS)).to_pylist()
        return {row["key"]: (row.get("source_hash") or "", _pixels(row)) for row in ledger}

    def _vectors(self, span: range) -> Iterator[tuple[list[str], Places, Vectors]]:
        """Yield keys, positions and embeddings of the samples of each partition in ``span``."""
        for index in span:
            self._stage.rank.check_stop()
            ledger, kept, places = self.ledger(index, ("key",))
            known = self._vectors_of(index)
            mine = [(key, place) for key, place in zip(ledger["key"].filter(kept).to_pylist(), places, strict=True)]
            mine = [(key, place) for key, place in mine if key in known]
            vectors = np.stack([known[key] for key, _ in mine]) if mine else np.empty((0, self._width), np.float16)
            yield [key for key, _ in mine], np.array([place for _, place in mine], np.int64), vectors

    def _vectors_of(self, index: int) -> dict[str, npt.NDArray[np.float16]]:
        """Nonzero embeddings of the samples of the upstream's partition ``index``, by key."""
        known: dict[str, npt.NDArray[np.float16]] = {}
        for number in self._scores_at[self._scored(index)[1]]:
            reader = SlotReader(self._scores, number)
            kept = [stored for stored in reader.stored(taken=True) if stored.file]
            if not kept:
                continue
            file = reader.open(kept[0].file)
            assert isinstance(file, ScoresReader)
            vectors, good = file.vectors(EMBEDDING)
            known |= {stored.key: vectors[stored.number] for stored in kept if good[stored.number]}
        return known

    @cached_property
    def _scores_at(self) -> dict[int, list[int]]:
        """Partitions of the scores, by partition of the scored dataset."""
        found: dict[int, list[int]] = defaultdict(list)
        for number in range(self._scores.partitions):
            found[self._scores.partition(number).inputs[0].start].append(number)
        return found

    def _scored(self, index: int) -> tuple[Dataset, int]:
        """The scored dataset, and its partition from which the upstream's partition ``index`` was made."""
        for dataset in self._line[:-1]:
            index = dataset.partition(index).inputs[0].start
        return self._line[-1], index

    @cached_property
    def _line(self) -> list[Dataset]:
        return line_to(self._upstream, self._scores)

    # ---- centres

    def _sample_job(self, span: range) -> Job:
        def write(file: HashedFile) -> None:
            drawn = []
            for keys, _, vectors in self._vectors(span):
                seed = self._stage.config.seed
                draws = np.array([xxhash.xxh3_64_intdigest(key, seed) for key in keys], np.uint64)
                chosen = draws <= np.uint64(self._share * (2**64 - 2**12))
                drawn.append((draws[chosen], vectors[chosen]))
            for part in zip(*drawn, strict=True):
                file.write(np.concatenate(part).tobytes())

        return write

    def _find_centres(self, folder: Folder, file: HashedFile) -> None:
        """Run k-means on the drawn vectors, sorted by draw, so that the order does not depend on partitions."""
        draws, vectors = [np.empty(0, np.uint64)], [np.empty((0, self._width), np.float16)]
        for number in range(len(self.batches)):
            data = folder.read(f"sample-{number}")
            count = len(data) // (8 + 2 * self._width)
            draws.append(np.frombuffer(data, np.uint64, count))
            vectors.append(np.frombuffer(data, np.float16, offset=8 * count).reshape(count, self._width))
        order = np.argsort(np.concatenate(draws), kind="stable")
        file.write(centres(np.concatenate(vectors)[order], self._cells).tobytes())

    def _centres(self, folder: Folder) -> Vectors:
        return np.frombuffer(folder.read(_CENTRES), np.float16).reshape(-1, self._width)

    # ---- cells

    def _cells_job(self, folder: Folder, span: range) -> Job:
        def write(file: HashedFile) -> None:
            middle = self._centres(folder)
            parts = list(self._vectors(span))
            places = np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)])
            vectors = np.concatenate([np.empty((0, self._width), np.float16), *(part[2] for part in parts)])
            chosen = nearest(vectors, middle, 1 + self._probes)
            found = by_cell(places, vectors, chosen, len(middle))
            for array in (found.starts, found.places, found.vectors):
                file.write(array.tobytes())

        return write

    def _starts(self, folder: Folder) -> npt.NDArray[np.int64]:
        """Starts of the cells in each sorted file: (files, 2 * cells + 1)."""
        size = 8 * (2 * len(self._centres(folder)) + 1)
        found = [_part(folder, f"cells-{number}", 0, size) for number in range(len(self.batches))]
        return np.stack([np.frombuffer(data, np.int64) for data in found])

    def _units(self, folder: Folder) -> list[range]:
        starts = self._starts(folder)
        sizes = np.diff(starts[:, ::2], axis=1).sum(0)
        return list(batches(sizes, max(1, int(sizes.sum()) // _UNITS)))

    # ---- links

    @property
    def _at_once(self) -> int:
        """Vectors per chunk; two chunks are held in memory, in float16 and float32."""
        return max(1, self._memory // (2 * 8 * self._width))

    def _links_job(self, folder: Folder, unit: range) -> Job:
        def write(file: HashedFile) -> None:
            starts, found = self._starts(folder), []
            for cell in unit:
                self._stage.rank.check_stop()
                found += list(self._in_cell(folder, starts, cell))
            file.write(forest(found).tobytes())

        return write

    def _in_cell(self, folder: Folder, starts: npt.NDArray[np.int64], cell: int) -> Iterator[Links]:
        """Yield links among the cell's own samples and between these and its visitors, chunk by chunk."""
        cosine = self._stage.config.cosine
        own, visitors = (self._chunks(starts[:, 2 * cell + part], starts[:, 2 * cell + part + 1]) for part in (0, 1))
        for number, chunk in enumerate(own):
            left = self._block(folder, starts, chunk)
            yield linked(left, left, cosine)
            for other in (*own[number + 1 :], *visitors):
                yield linked(left, self._block(folder, starts, other), cosine)

    def _chunks(self, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> list[_Chunk]:
        """Divide the rows [first, last) of each file into chunks that fit into memory."""
        chunks: list[_Chunk] = []
        room = 0
        for number, (start, stop) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            while start < stop:
                if not room:
                    chunks.append([])
                    room = self._at_once
                end = min(stop, start + room)
                chunks[-1].append((number, start, end))
                room -= end - start
                start = end
        return chunks

    def _block(self, folder: Folder, starts: npt.NDArray[np.int64], chunk: _Chunk) -> Block:
        head = 8 * starts.shape[1]
        places, vectors = [], []
        for number, start, stop in chunk:
            name, behind, row = f"cells-{number}", head + 8 * int(starts[number, -1]), 2 * self._width
            places.append(np.frombuffer(_part(folder, name, head + 8 * start, 8 * (stop - start)), np.int64))
            data = _part(folder, name, behind + row * start, row * (stop - start))
            vectors.append(np.frombuffer(data, np.float16).reshape(-1, self._width))
        return Block.of(np.concatenate(places), np.concatenate(vectors))


def _part(folder: Folder, name: str, start: int, size: int) -> bytes:
    fd = folder.open_file(name)
    try:
        parts = []
        while size:
            part = os.pread(fd, min(size, 1 << 30), start)
            if not part:
                raise OSError(5, f"{folder.path / name} is too short")
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def _pixels(row: dict[str, Any]) -> int:
    return int(row.get("source_pixels") or 0) or int(row.get("width") or 0) * int(row.get("height") or 0)


# ---- finding the scores


def scores_of(upstream: Dataset, given: str) -> Dataset:
    """Return the scores with the embeddings of the samples of ``upstream``: in the folder ``given``, or, if empty, the
    first scores among ``upstream`` and its ancestors.

    Raises:
        ConfigError: there are none, they have no embeddings, or they belong to other samples.
    """
    if given:
        scores = Dataset.open(given)
        if scores.format.name != "scores":
            raise ConfigError(f"scores={given}: is not a folder written by stage=score")
    else:
        found = next((dataset for dataset in _ancestry(upstream) if dataset.format.name == "scores"), None)
        if found is None:
            raise ConfigError(
                f"method=semantic needs embeddings: {upstream.root.path} was made without stage=score; name the folder "
                "of the scores of its samples with scores="
            )
        scores = found
    if EMBEDDING not in scores.schema:
        raise ConfigError(
            f"{scores.root.path} has no column {EMBEDDING}: add embedding:<model> to scorers= of stage=score"
        )
    scores.require_success()
    line_to(upstream, scores)
    return scores


def line_to(upstream: Dataset, scores: Dataset) -> list[Dataset]:
    """``upstream`` and its ancestors up to the dataset that was scored.

    Raises:
        ConfigError: it is not among them, or has changed since.
    """
    about = last_upstream(scores)
    assert about is not None
    line = []
    for dataset in _ancestry(upstream):
        line.append(dataset)
        if os.path.realpath(dataset.root.path) == os.path.realpath(about["path"]):
            if dataset.require_success()["content_digest"] != about["content_digest"]:
                raise ConfigError(
                    f"{dataset.root.path} has changed since {scores.root.path} was made: run stage=score again"
                )
            return line
    raise ConfigError(
        f"scores={scores.root.path}: are about {about['path']}, which {upstream.root.path} was not made from"
    )


_FOLLOWING = ("dedup", "score", "select", "recaption")
"""Stages whose partitions correspond to those of their upstream."""


def _ancestry(dataset: Dataset) -> Iterator[Dataset]:
    """Yield ``dataset`` and its ancestors, as long as each partition is made from one partition."""
    yield dataset
    while dataset.stage in _FOLLOWING and (upstream := last_upstream(dataset)) is not None:
        dataset = Dataset.open(upstream["path"])
        yield dataset


def fingerprint_of(scores: Dataset) -> str:
    """What the embeddings depend on besides the samples; embeddings with equal fingerprints are comparable."""
    found: dict[str, str] = scores.header["extra"]["scorers"]
    return next(said for name, said in found.items() if name.partition(":")[0] == EMBEDDING)


def width_of(scores: Dataset) -> int:
    """Dimension of the embeddings."""
    return int(scores.schema[EMBEDDING].removeprefix(VECTOR))
