"""stage=verify: check dataset directories. Prints problems and exits with code 1 if there are any."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.captioning.caption_columns import fault_of
from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.schema import ConfigError, VerifyConfig, dataset_name
from pipeline.imaging.decoder import ImageDecoder
from pipeline.imaging.headers import ImageError
from pipeline.imaging.worker_pool import DEFAULT_WORKER_LIMITS, WorkerLimits, available_cpus
from pipeline.partitions.dataset import Dataset, Released, SlotReader, Stored, find_datasets
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.verify import Finding, verify, verify_partition
from pipeline.registry import stages
from pipeline.samples import Row, SampleError, content_hash
from pipeline.stages import trace
from pipeline.storage import StorageError

_ENCODED = ("precompute", "texts")  # stages whose results can be validated by encoding again
_SPAN = 8  # partitions per task of a worker


def findings_of(
    folder: str | Path, deep: bool = False, workers: int = 1, limits: WorkerLimits = DEFAULT_WORKER_LIMITS
) -> tuple[int, Iterator[Finding]]:
    """Number of partitions in the dataset directory, and an iterator over its problems.

    Raises:
        Unfinished: there is no dataset directory.
    """
    try:
        dataset = Dataset.open(folder)
    except StorageError as error:
        return 0, iter([Finding(-1, str(error))])
    return dataset.partitions, findings_in(dataset, deep, workers, limits=limits)


def findings_in(
    dataset: Dataset,
    deep: bool = False,
    workers: int = 1,
    step: Callable[[], None] = lambda: None,
    limits: WorkerLimits = DEFAULT_WORKER_LIMITS,
) -> Iterator[Finding]:
    """Problems of ``dataset``, found by ``workers`` processes (0: one per CPU).

    ``step`` is called after each partition and may raise. ``limits`` apply to processes that decode images (``deep``).
    """

    def partitions() -> Iterator[list[Finding]]:
        for findings in _partitions(dataset, deep, workers, limits):
            step()
            yield findings

    return verify(dataset, partitions())


def _partitions(dataset: Dataset, deep: bool, workers: int, limits: WorkerLimits) -> Iterator[list[Finding]]:
    """Problems of each partition, in order."""
    spans = [range(start, min(start + _SPAN, dataset.partitions)) for start in range(0, dataset.partitions, _SPAN)]
    path = str(dataset.root.path)
    workers = min(workers or available_cpus(), len(spans))
    gpus = _gpus() if deep and dataset.stage in _ENCODED else 0
    if gpus:  # one worker per GPU, as each loads the networks
        workers = min(workers, gpus)
    if workers <= 1:
        with closing(Checker(dataset, deep, limits)) as checker:
            yield from (checker.check(index) for index in range(dataset.partitions))
        return
    context = get_context("forkserver")
    begin = partial(_take_gpu, context.Value("i", 0)) if gpus else None
    with ProcessPoolExecutor(workers, context, begin) as pool:
        waiting: deque[Future[list[list[Finding]]]] = deque()
        for span in spans:
            waiting.append(pool.submit(_check, path, deep, limits, span))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _take_gpu(numbers: Any) -> None:
    """Initializer of worker processes: each takes the next GPU."""
    import torch

    with numbers.get_lock():
        torch.cuda.set_device(numbers.value % torch.cuda.device_count())
        numbers.value += 1


def _check(path: str, deep: bool, limits: WorkerLimits, span: range) -> list[list[Finding]]:
    return [_checker(path, deep, limits).check(index) for index in span]


@lru_cache(maxsize=1)
def _checker(path: str, deep: bool, limits: WorkerLimits) -> Checker:
    """A worker process serves only one dataset directory."""
    return Checker(Dataset.open(path), deep, limits)


class Checker:
    """Checks partitions of a dataset; ``deep``: also checks content that hashes do not cover."""

    def __init__(self, dataset: Dataset, deep: bool, limits: WorkerLimits = DEFAULT_WORKER_LIMITS) -> None:
        self.dataset = dataset
        self.deep = deep
        self.decoder = ImageDecoder(limits)

    def close(self) -> None:
        """Stop the decoder process."""
        self.decoder.close()

    @cached_property
    def upstream(self) -> Dataset | None:
        """The dataset that the partitions were made from, if it exists."""
        path = Path((self.dataset.header.get("upstream") or {}).get("path") or "nothing")
        return Dataset.open(path) if (path / "plan").is_dir() else None

    def check(self, index: int) -> list[Finding]:
        findings = list(verify_partition(self.dataset, index))
        if self.deep and not findings:
            findings = [replace(finding, inside=True) for finding in self._look_inside(index)]
        return findings

    def _look_inside(self, index: int) -> Iterator[Finding]:
        try:
            reader = SlotReader(self.dataset, index)
            hashes = dict(zip(*reader.ledger(["key", "source_hash"]).to_pydict().values(), strict=True))
            for sample, fault in self._faults(reader.stored() if index not in self.dataset.released else ()):
                if fault and not self._came_so(sample, hashes.get(sample.key, "")):
                    yield Finding(index, fault, sample.file, sample.key)
            yield from self._compare_keys(index)
            if self.dataset.stage == "recaption" and index not in self.dataset.released:
                yield from self._compare_captions(reader, index)
            if self.dataset.stage in _ENCODED and self.dataset.success is not None:
                from pipeline.latents.validation import validate  # imports torch

                yield from validate(self.dataset, index, self.decoder)
        except StorageError as error:
            yield Finding(index, str(error))

    def _faults(self, samples: Iterable[Stored]) -> Iterator[tuple[Stored, str]]:
        """Each sample with its fault, empty if it has none."""
        for (sample, row, fault), found in self.decoder.sizes(map(_read, samples)):
            if isinstance(found, ImageError):
                fault = f"does not decode: {found}"
            elif found is not None:
                height, width = found
                said = (row.get("width", width), row.get("height", height))
                if said != (width, height):
                    fault = f"has {width}x{height} pixels, its row says {said[0]}x{said[1]}"
            yield sample, fault

    def _came_so(self, sample: Stored, source_hash: str) -> bool:
        """Whether a broken image came that way from its source: stage=download keeps bytes unchanged."""
        if self.dataset.stage != "download":
            return False
        try:
            return content_hash(sample.read()["jpg"]) == source_hash
        except (SampleError, StorageError, KeyError):
            return False

    def _compare_keys(self, index: int) -> Iterator[Finding]:
        """Check that the ledger has exactly the samples that the plan takes from the upstream partition."""
        partition = self.dataset.partition(index)
        if self.upstream is None or [span.path for span in partition.inputs] != ["partition"]:
            return
        keys = {sample.key for sample in self.upstream.samples(partition.inputs[0].start)}
        expected = {key for key in keys if partition.wants(key)}
        table = SlotReader(self.dataset, index).ledger(["key", "container"]).to_pylist()
        found = {row["key"] for row in table if not row["container"]}
        for key in sorted(expected - found)[:3]:
            yield Finding(index, f"a sample of {self.upstream.root.path} is not accounted for", LEDGER, key)
        for key in sorted(found - expected)[:3]:
            yield Finding(index, f"{self.upstream.root.path} has no such sample", LEDGER, key)

    def _compare_captions(self, reader: SlotReader, index: int) -> Iterator[Finding]:
        """Check that samples still have their earlier captions, each with its source, and the written ones."""
        before: dict[str, Row] = {}
        if self.upstream is not None and not self.upstream.released:
            columns = [name for name in ("captions", "caption_sources") if name in self.upstream.schema]
            samples = self.upstream.samples(self.dataset.partition(index).inputs[0].start)
            before = {sample.key: sample.read(columns) for sample in samples if sample.file and columns}
        for sample in reader.stored():
            try:
                fault = fault_of(sample.read(), before.get(sample.key))
            except (SampleError, Released):
                continue  # reported already, or removed on purpose
            if fault:
                yield Finding(index, fault, sample.file, sample.key)


def _read(sample: Stored) -> tuple[tuple[Stored, Row, str], bytes | None]:
    """A sample, the size in its row, its fault so far, and the image to decode."""
    try:
        row = sample.read()
    except Released:
        return (sample, {}, ""), None  # the sample points to a dataset whose data were removed
    except SampleError as error:
        return (sample, {}, f"does not decode: {error}"), None
    size: Row = {name: row[name] for name in ("width", "height") if name in row}
    if row["key"] != sample.key:
        return (sample, size, f"holds {row['key']}"), None
    return (sample, size, ""), row.get("jpg")


# ---- command line


@stages.register("verify", VerifyConfig)
def main(config: VerifyConfig) -> int:
    with errors_as_one_line():
        places = places_of(config)
        if config.trace:
            return trace.tell(places, config.trace, config.show, config.json)
        return max([_report(place, config) for place in places])


def places_of(config: VerifyConfig) -> list[Path]:
    """The dataset directories to check, upstream first.

    Raises:
        ConfigError: the settings do not name a dataset directory, or there is none.
    """
    if bool(config.input) == bool(config.data_dir):
        raise ConfigError("give input=<a dataset directory>, or data_dir=<a folder that contains some>")
    if config.show and not config.trace:
        raise ConfigError("show= needs trace=<key>")
    if config.input:
        return [Path(config.input)]
    folder = Path(config.data_dir, dataset_name(config.dataset))
    places = [dataset.root.path for dataset in find_datasets(folder)]
    if not places:
        raise ConfigError(f"no dataset directory below {folder}")
    return places


def _report(place: Path, config: VerifyConfig) -> int:
    partitions, findings = findings_of(place, config.deep, config.workers, WorkerLimits.of(config))
    count = 0
    for finding in findings:
        count += 1
        shown = json.dumps({"input": str(place), **finding.as_dict()}) if config.json else finding
        print(shown, flush=True)
    if not config.json:
        print(f"{place}: {partitions} partitions checked: {f'{count} findings' if count else 'sound'}", flush=True)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(config_for("verify")))
