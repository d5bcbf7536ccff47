"""stage=select: keep samples by their scores; images are not copied.

Reads the output of ``stage=score`` (or any dataset directory with images, if only key lists, captions and sizes are
used), and writes a ledger with the first condition that each dropped sample fails, and pointers to the images of the
others. Values that depend on all samples (clusters, percentiles, concept counts, caps, a sample of n) are computed once
at planning and stored in the plan; samples added later are judged by the same values.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, SelectConfig
from pipeline.curation.concepts import Concepts, Matches, rarest
from pipeline.curation.expressions import Column, Condition, parse
from pipeline.curation.keylist import KeyList, key_digest
from pipeline.curation.order_statistics import order_statistics, word_statistics
from pipeline.curation.pointers import PointerStage
from pipeline.curation.rules import column_value
from pipeline.curation.semantic import EMBEDDING, PER_CELL, Vectors, centres, nearest
from pipeline.distributed import Rank, distributed
from pipeline.formats.scores import VECTOR, ScoresReader
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, SlotReader, Stored
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context, evaluate, follow_upstream
from pipeline.registry import stages
from pipeline.samples import TAKEN, Outcome, SampleError
from pipeline.storage import Folder, HashedFile

_LEDGER_COLUMNS = ("width", "height", "source_bytes")
"""Columns of the upstream's ledger that conditions may use as well."""
_KEY_LISTS = ("keep_keys", "deny_keys")
_CLUSTER = "cluster"
"""Column with the index of a sample's cluster."""
_CAP = re.compile(r"([^\W\d]\w*):(\d+)")
_UID = re.compile(r"[0-9a-f]{32}")
_LOOKED_AT = 100  # samples that are searched for a named column
_CACHED = 1 << 22
"""Up to this many samples, planning reads the columns once and keeps them in memory; beyond, it reads them per pass."""


@dataclass(frozen=True)
class Part:
    """The kept samples of an upstream partition.

    Attributes:
        keys: (n,).
        draws: random numbers keyed by seed and sample key, (n,); samples with the smallest are chosen.
        columns: values of each column, (n,).
        listed: names to look up in key lists: the keys or the values of ``key_column``, (n,).
        matches: concepts that occur in the captions.
        unreadable: errors from reading captions, by the sample's index.
    """

    keys: list[str]
    draws: npt.NDArray[np.uint64]
    columns: dict[str, Column]
    listed: list[str]
    matches: Matches | None = None
    unreadable: dict[int, SampleError] = field(default_factory=dict)


@dataclass
class Settled:
    """Values that depend on all samples.

    Attributes:
        centres: of the clusters, (clusters, d).
        thresholds: by name.
        concepts: number of samples that name a concept, for concepts that more than ``per_concept`` samples name.
        caps: column → value → largest draw that is kept, for values that more samples have than the cap allows.
        sample: the largest draw that is kept; None if all are.
    """

    centres: Vectors | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    concepts: dict[str, int] = field(default_factory=dict)
    caps: dict[str, dict[str, int]] = field(default_factory=dict)
    sample: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The values as stored in the plan."""
        said = {name: getattr(self, name) for name in ("thresholds", "concepts", "caps", "sample")}
        if self.centres is not None:
            said["centres"] = [len(self.centres), b64encode(self.centres.tobytes()).decode()]
        return said

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Settled:
        values = {name: value for name, value in said.items() if name != "centres"}
        if "centres" in said:
            count, data = said["centres"]
            values["centres"] = np.frombuffer(b64decode(data), np.float16).reshape(count, -1)
        return cls(**values)


@dataclass(frozen=True)
class Verdicts:
    """Each sample's verdict: ``numbers`` (n,) are indices into ``said``, (reason, detail) pairs; 0: still selected."""

    numbers: npt.NDArray[np.int32]
    said: list[tuple[str, str]] = field(default_factory=lambda: [("", "")])

    @property
    def going(self) -> npt.NDArray[np.bool_]:
        going: npt.NDArray[np.bool_] = self.numbers == 0
        return going

    def leave(self, where: npt.NDArray[np.bool_], reason: str, detail: str) -> None:
        """Drop those samples of ``where``, (n,), that are still selected."""
        self.numbers[where & self.going] = len(self.said)
        self.said.append((reason, detail))


Pieces = Callable[[], Iterator[Part]]


@stages.register("select", SelectConfig)
class Select(PointerStage[SelectConfig]):
    name = "select"
    version = 1

    def identity(self) -> dict[str, Any]:
        """Key and concept lists are identified by their contents, not by their paths."""
        files = {name: key_digest(getattr(self.config, name)) for name in (*_KEY_LISTS, "concepts")}
        return super().identity() | files

    def extra(self) -> dict[str, Any]:
        return super().extra() | {"selection": self._settled().to_json()}

    def validate(self) -> None:
        evaluate(self.key_lists, self.concepts)
        self._check_key_column()
        self._check_clusters()
        if not (self.conditions or self.caps or self.config.sample or self.key_lists or self.concepts):
            raise ConfigError(
                "select needs where=, cap=, sample=, concepts=, keep_keys= or deny_keys=: otherwise nothing is left out"
            )

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return follow_upstream(self.upstream, since)

    # ---- requested conditions

    @cached_property
    def conditions(self) -> list[Condition]:
        """Raises ConfigError if ``where`` is not a valid expression or does not fit the columns."""
        found = parse(self.config.where)
        for condition in found:
            for column in condition.columns:
                self._require(column, f"where={self.config.where}")
            for threshold in condition.thresholds:
                if self._types[threshold.column] == "str":
                    raise ConfigError(f"where={condition.text}: {threshold.column} is a text and has no percentiles")
            nothing = {name: np.empty(0, object if self._types[name] == "str" else float) for name in condition.columns}
            condition.holds(nothing, {threshold.name: 0.0 for threshold in condition.thresholds})
        return found

    @cached_property
    def caps(self) -> dict[str, int]:
        """Maximum number of samples per value, for each capped column."""
        found = {}
        for text in self.config.cap:
            match = _CAP.fullmatch(text)
            if match is None:
                raise ConfigError(f"cap={text}: write <column>:<number>, as class_name:1000")
            self._require(match[1], f"cap={text}")
            found[match[1]] = int(match[2])
        return found

    @cached_property
    def key_lists(self) -> dict[str, KeyList]:
        column = self.config.key_column or "key"
        return {name: KeyList(path, column) for name in _KEY_LISTS if (path := getattr(self.config, name))}

    @cached_property
    def concepts(self) -> Concepts | None:
        if not self.config.concepts:
            return None
        self.images.require_columns("captions")
        return Concepts(self.config.concepts)

    def _check_clusters(self) -> None:
        """Raises ConfigError if clusters cannot be computed or are not used."""
        if not self.config.clusters:
            return
        setting = f"clusters={self.config.clusters}"
        if EMBEDDING not in self._score_columns:
            raise ConfigError(
                f"{setting}: {self.upstream.root.path} has no column {EMBEDDING}: add embedding:<model> to scorers= of "
                "stage=score"
            )
        if _CLUSTER in self._score_columns:
            raise ConfigError(f"{setting}: {self.upstream.root.path} has a column {_CLUSTER} already")
        if _CLUSTER not in self._needed:
            raise ConfigError(f"{setting}: they are not used: add cap=[{_CLUSTER}:<number>], or {_CLUSTER} to where=")

    def _check_key_column(self) -> None:
        """Raises ConfigError if none of the first samples has the column ``key_column``."""
        column = self.config.key_column
        samples = (one for index in range(self.images.partitions) for one in self.images.samples(index))
        if column and not any(listed_names(self.images, islice(samples, _LOOKED_AT), column)):
            raise ConfigError(f"key_column={column}: none of the first samples has such a column or field")

    @cached_property
    def _types(self) -> dict[str, str]:
        """Available columns and their types."""
        clusters = {_CLUSTER: "int"} if self.config.clusters else {}
        return dict.fromkeys(_LEDGER_COLUMNS, "int") | self._scores | clusters

    @cached_property
    def _score_columns(self) -> dict[str, str]:
        return self.upstream.schema if self.upstream.format.name == "scores" else {}

    @cached_property
    def _scores(self) -> dict[str, str]:
        columns = self._score_columns
        return {name: kind for name, kind in columns.items() if not kind.startswith(VECTOR) and name != "key"}

    def _require(self, column: str, setting: str) -> None:
        if column not in self._types:
            raise ConfigError(f"{setting}: there is no column {column}; there are {', '.join(self._types)}")

    # ---- columns

    @cached_property
    def _read(self) -> dict[str, Part]:
        """Parts that this rank read at planning, by the path of the upstream partition."""
        return {}

    @cached_property
    def _needed(self) -> list[str]:
        return list(dict.fromkeys([*(name for one in self.conditions for name in one.columns), *self.caps]))

    def part(self, index: int, centres: Vectors | None) -> Part:
        """Read what is needed of partition ``index`` of the upstream."""
        reader = SlotReader(self.upstream, index)
        ledger = reader.ledger(["key", "container", "outcome", "file", *_LEDGER_COLUMNS])
        kept = pc.and_(pc.equal(ledger["outcome"], "kept"), pc.invert(ledger["container"]))
        table = ledger.filter(kept)
        keys: list[str] = table["key"].to_pylist()
        scored = [name for name in self._needed if name in self._scores]
        columns = {name: _array(table[name]) for name in self._needed if name in _LEDGER_COLUMNS and name not in scored}
        if keys and (scored or centres is not None):
            file = reader.open(table["file"][0].as_py())
            assert isinstance(file, ScoresReader)
            scores = file.table(scored)
            columns |= {name: _array(scores[name]) for name in scored}
            if centres is not None:
                columns[_CLUSTER] = _clusters(*file.vectors(EMBEDDING), centres)
        matches, unreadable = self._named(index, keys)
        return Part(keys, self._draws(keys), columns, self._listed_names(index, keys), matches, unreadable)

    def _named(self, index: int, keys: list[str]) -> tuple[Matches | None, dict[int, SampleError]]:
        """Concepts named in the captions of the samples ``keys`` of partition ``index``, and errors by sample index."""
        if self.concepts is None:
            return None, {}
        unreadable: dict[int, SampleError] = {}

        def captions() -> Iterator[list[str]]:
            for number, stored in enumerate(self._images_of(index, keys)):
                try:
                    yield stored.read(["key", "captions"])["captions"]
                except SampleError as error:
                    unreadable[number] = error
                    yield []

        return self.concepts.matches(captions()), unreadable

    def _images_of(self, index: int, keys: list[str]) -> Iterator[Stored]:
        """The stored samples with images for the samples ``keys`` of partition ``index`` of the upstream."""
        same = self.images is self.upstream
        samples = self.images.samples(index if same else self.upstream.partition(index).inputs[0].start)
        known = {stored.key: stored for stored in samples}
        return (known[key] for key in keys)

    def _listed_names(self, index: int, keys: list[str]) -> list[str]:
        """Names to look up in key lists for the samples ``keys`` of partition ``index`` of the upstream."""
        column = self.config.key_column
        if not (column and self.key_lists):
            return keys
        return list(listed_names(self.images, self._images_of(index, keys), column))

    def _draws(self, keys: list[str]) -> npt.NDArray[np.uint64]:
        seed = self.config.seed
        draws = (xxhash.xxh3_64_intdigest(key, seed) for key in keys)
        return np.fromiter(draws, np.uint64, len(keys))

    # ---- values that depend on all samples

    def _settled(self) -> Settled:
        settled = Settled(self._centres() if self.config.clusters else None)
        pieces = self._pieces(settled.centres)
        for threshold in dict.fromkeys(one for condition in self.conditions for one in condition.thresholds):
            found = order_statistics(
                lambda column=threshold.column: (part.columns[column] for part in pieces()),  # type: ignore[misc]
                lambda count, threshold=threshold: [threshold.rank(count)],  # type: ignore[misc]
            )
            settled.thresholds[threshold.name] = found[0] if found else 0.0
        if self.concepts is not None:
            settled.concepts = self._settled_concepts(self.concepts, pieces, settled)
        for column, most in self.caps.items():
            settled.caps[column] = self._settled_cap(column, most, pieces, settled)
        if self.config.sample:
            settled.sample = self._settled_sample(pieces, settled)
        return settled

    def _pieces(self, centres: Vectors | None) -> Pieces:
        """A function that iterates over all samples, and can be called once per pass."""

        def pieces() -> Iterator[Part]:
            for index in range(self.upstream.partitions):
                self.rank.check_stop()
                path = self.upstream.path_of(index)
                part = self._read.get(path) or self.part(index, centres)
                if len(self.upstream) <= _CACHED:
                    self._read[path] = part
                yield part

        return pieces

    def _centres(self) -> Vectors:
        """Cluster centres: k-means on the samples with the smallest draws."""
        width = int(self._score_columns[EMBEDDING].removeprefix(VECTOR))
        draws, vectors = np.empty(0, np.uint64), np.empty((0, width), np.float16)
        most = PER_CELL * self.config.clusters
        for index in range(self.upstream.partitions):
            self.rank.check_stop()
            reader = SlotReader(self.upstream, index)
            kept = [stored for stored in reader.stored(taken=True) if stored.file]
            if not kept:
                continue
            file = reader.open(kept[0].file)
            assert isinstance(file, ScoresReader)
            found, there = file.vectors(EMBEDDING)
            draws = np.concatenate([draws, self._draws([stored.key for stored in kept])[there]])
            vectors = np.concatenate([vectors, found[there]])
            smallest = np.argsort(draws, kind="stable")[:most]
            draws, vectors = draws[smallest], vectors[smallest]
        return centres(vectors, self.config.clusters)

    def _settled_concepts(self, concepts: Concepts, pieces: Pieces, settled: Settled) -> dict[str, int]:
        """Number of selected samples that name each concept, for concepts named more than ``per_concept`` times."""
        counts = np.zeros(len(concepts), np.int64)
        for part in pieces():
            assert part.matches is not None
            going = self._conditional(part, settled).going
            counts += np.bincount(part.matches.entries[going[part.matches.samples]], minlength=len(concepts))
        common = np.flatnonzero(counts > self.config.per_concept)
        return {concepts.names[number]: int(counts[number]) for number in common}

    def _settled_cap(self, column: str, most: int, pieces: Pieces, settled: Settled) -> dict[str, int]:
        """The largest draw that is kept, for each value that more than ``most`` samples have."""
        smallest: dict[str, npt.NDArray[np.uint64]] = {}
        full: set[str] = set()
        for part in pieces():
            if not part.keys:
                continue
            going = self._verdicts(part, settled).going
            draws, names = part.draws[going], _names(part.columns[column])[going]
            for name, mine in _grouped(names):
                found = np.concatenate([smallest.get(name, draws[:0]), draws[mine]])
                if len(found) > most:
                    full.add(name)
                    found = np.partition(found, most)[:most] if most else found[:0]
                smallest[name] = found
        return {name: int(smallest[name].max()) if most else -1 for name in sorted(full)}

    def _settled_sample(self, pieces: Pieces, settled: Settled) -> int | None:
        """The largest draw that is kept; None if all are."""
        wanted = self.config.sample
        total: list[int] = []

        def rank(count: int) -> list[int]:
            total.append(count)
            return [min(wanted, count) - 1]

        found = word_statistics(lambda: (part.draws[self._verdicts(part, settled).going] for part in pieces()), rank)
        return found[0] if found and total[0] > wanted else None

    # ---- verdicts

    def _conditional(self, part: Part, settled: Settled) -> Verdicts:
        """Verdicts from key lists and conditions alone."""
        verdicts = Verdicts(np.zeros(len(part.keys), np.int32))
        if not part.keys:
            return verdicts
        for name, keys in self.key_lists.items():
            listed = np.array([name in keys for name in part.listed], bool)
            verdicts.leave(listed if name == "deny_keys" else ~listed, *_LISTED[name])
        values = settled.thresholds
        for condition in self.conditions:
            limits = ", ".join(f"{one.name} is {values[one.name]:g}" for one in condition.thresholds)
            detail = f"{condition.text} does not hold{f' ({limits})' if limits else ''}"
            verdicts.leave(~condition.holds(part.columns, values), f"where_{'_'.join(condition.columns)}", detail)
        return verdicts

    def _verdicts(self, part: Part, settled: Settled) -> Verdicts:
        verdicts = self._conditional(part, settled)
        if not part.keys:
            return verdicts
        if part.matches is not None:
            self._balance(part, part.matches, settled, verdicts)
        for column, limits in settled.caps.items():
            names = _names(part.columns[column])
            largest = np.full(len(names), np.iinfo(np.uint64).max, np.uint64)
            over = np.zeros(len(names), bool)
            for name, mine in _grouped(names):
                if name in limits:
                    over[mine] = limits[name] < 0
                    largest[mine] = max(0, limits[name])
            verdicts.leave(
                over | (part.draws > largest),
                f"cap_{column}",
                f"more than {self.caps[column]} samples have its {column}",
            )
        if settled.sample is not None:
            over = part.draws > np.uint64(settled.sample)
            verdicts.leave(over, "not_sampled", f"not among the {self.config.sample} chosen")
        return verdicts

    def _balance(self, part: Part, matches: Matches, settled: Settled, verdicts: Verdicts) -> None:
        assert self.concepts is not None
        unnamed = np.diff(matches.starts) == 0
        verdicts.leave(unnamed, "no_concept", "its captions name none of the concepts")
        most, counts = self.config.per_concept, self.concepts.counts(settled.concepts)
        left = ~self.concepts.drawn(matches, part.draws, counts, most) & verdicts.going
        for number, mine in _grouped(rarest(matches, counts)[left]):
            where = np.zeros(len(left), bool)
            where[np.flatnonzero(left)[mine]] = True
            detail = f"{counts[number]} samples name the rarest of its concepts, {self.concepts.names[number]}"
            verdicts.leave(where, "concept_too_common", f"{detail}; per_concept={most}")

    # ---- work

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (span,) = partition.inputs
        settled = self._judge_by(context.extra["selection"])
        part = self._read.pop(self.upstream.path_of(span.start), None) or self.part(span.start, settled.centres)
        verdicts = self._verdicts(part, settled)
        said, numbers = verdicts.said, iter(enumerate(verdicts.numbers.tolist()))
        source, places = self.upstream.partition_path(span.start), self.image_places(span.start)
        for offset, (key, there, place) in enumerate(zip(*self._stored(span.start), places, strict=True)):
            outcome = Outcome(key, "kept", source=source, offset=offset)
            if not there:
                outcome.status, outcome.reason = "failed", TAKEN
            else:
                number, verdict = next(numbers)
                if error := part.unreadable.get(number):
                    outcome.status, outcome.reason, outcome.detail = "failed", error.reason, error.detail
                    outcome.retryable = error.retryable
                elif verdict:
                    outcome.status = "dropped"
                    outcome.reason, outcome.detail = said[verdict]
                else:
                    outcome.row = {"key": key, "place": place}
            if partition.wants(key):
                yield outcome

    def _stored(self, index: int) -> tuple[list[str], list[bool]]:
        """Keys of all samples ever kept in partition ``index`` of the upstream, and whether each still exists."""
        table = SlotReader(self.upstream, index).ledger(["key", "container", "outcome", "reason"])
        kept = pc.equal(table["outcome"], "kept")
        taken = pc.and_(pc.equal(table["outcome"], "dropped"), pc.equal(table["reason"], TAKEN))
        ever = pc.and_(pc.or_(kept, taken), pc.invert(table["container"]))
        return table["key"].filter(ever).to_pylist(), kept.filter(ever).to_pylist()

    def _judge_by(self, said: Mapping[str, Any]) -> Settled:
        """The plan's values, parsed once per plan."""
        if self._judged is None or self._judged[0] is not said:
            self._judged = said, Settled.from_json(said)
        return self._judged[1]

    _judged: tuple[Mapping[str, Any], Settled] | None = None


_LISTED = {"keep_keys": ("key_not_kept", "not in keep_keys"), "deny_keys": ("key_denied", "in deny_keys")}


def _array(column: pa.ChunkedArray) -> Column:
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), object)
    found: Column = column.cast(pa.float64()).to_numpy().astype(np.float64)  # nulls become NaN
    return found


def _clusters(vectors: Vectors, there: npt.NDArray[np.bool_], centres: Vectors) -> npt.NDArray[np.float64]:
    """Index of each sample's cluster, (n,); NaN for samples without an embedding."""
    found = np.full(len(vectors), np.nan)
    if len(centres) and there.any():
        found[there] = nearest(vectors[there], centres, 1)[:, 0]
    return found


def _grouped(values: npt.NDArray[Any]) -> Iterator[tuple[Any, npt.NDArray[np.int64]]]:
    """Each distinct value, with its positions (m,) in ``values`` (n,)."""
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    return zip(found.tolist(), np.split(order, starts[1:]), strict=False)


def _names(column: Column) -> npt.NDArray[np.str_]:
    """Values as strings, as they are used for keys in the plan's JSON."""
    return np.array(["" if value is None else str(value) for value in column.tolist()], str)


# ---- key lists


def listed_names(dataset: Dataset, samples: Iterable[Stored], column: str) -> Iterator[str]:
    """Values of ``samples`` in the column or field ``column``; "" for a sample that lacks it or is damaged."""
    columns = [name for name in dataset.schema if name != "jpg"]
    for stored in samples:
        try:
            value = column_value(stored.read(columns), column)
        except SampleError:
            value = None
        yield "" if value is None else str(value)


def export_keys(dataset: Dataset, path: Path, column: str = "") -> int:
    """Write the keys that ``dataset`` kept, in order: as lines, or (.npy) as sorted pairs of uint64, as DataComp does.

    Args:
        column: write the values of this column or field instead of keys.

    Returns:
        Number of keys written.

    Raises:
        ConfigError: the file is .npy and a key is not a uid, or a sample does not have the column.
    """
    parts = range(dataset.partitions)
    keys: Iterable[str]
    if column:
        names = chain.from_iterable(listed_names(dataset, dataset.samples(index), column) for index in parts)
        keys = (name or _nameless(path, column) for name in names)
    else:
        keys = chain.from_iterable(SlotReader(dataset, index).keys() for index in parts)
    count = 0

    def write(file: HashedFile) -> None:
        nonlocal count
        if path.suffix == ".npy":
            uids = np.fromiter((_uid(key, path) for key in keys), [("f0", "<u8"), ("f1", "<u8")])
            np.lib.format.write_array(file, np.sort(uids), allow_pickle=False)
            count = len(uids)
            return
        for key in keys:
            file.write(f"{key}\n".encode())
            count += 1

    with Folder.open(path.absolute().parent, create=True) as folder:
        folder.write_stream_by(path.name, write)
    return count


def _nameless(path: Path, column: str) -> str:
    raise ConfigError(f"export={path}: a sample has no {column}")


def _uid(key: str, path: Path) -> tuple[int, int]:
    if not _UID.fullmatch(key):
        raise ConfigError(
            f"export={path}: the key {key} is not a uid of 32 hexadecimal digits: use .txt, or "
            "key_column=uid where the samples have such a column"
        )
    return int(key[:16], 16), int(key[16:], 16)


@distributed
def main(rank: Rank, config: SelectConfig) -> None:
    if config.export and Path(config.export).suffix not in (".txt", ".npy"):
        raise ConfigError(f"export={config.export}: the name must end in .txt or .npy")
    engine.main(Select, config, rank)
    if config.export and rank.is_main:
        count = export_keys(Dataset.open(Select(config, rank).output), Path(config.export), config.key_column)
        rank.log.info("%s: %d keys", config.export, count)


if __name__ == "__main__":
    main(config_for("select"))
