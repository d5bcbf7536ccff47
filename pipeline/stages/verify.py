"""stage=verify: do dataset directories hold what they promise? Prints what is wrong; exit code 1 if anything is."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.schema import ConfigError, VerifyConfig, dataset_name
from pipeline.imaging import transform
from pipeline.imaging.worker_pool import available_cpus
from pipeline.partitions.dataset import Dataset, Released, SlotReader, Stored, find_datasets
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.verify import Finding, verify, verify_partition
from pipeline.samples import SampleError, content_hash
from pipeline.stages import trace
from pipeline.storage import StorageError

_SPAN = 8  # partitions that a worker looks at in one go


def findings_of(folder: str | Path, deep: bool = False, workers: int = 1) -> tuple[int, Iterator[Finding]]:
    """How many partitions the dataset directory has, and what is wrong with it.

    Raises:
        Unfinished: there is no dataset directory.
    """
    try:
        dataset = Dataset.open(folder)
    except StorageError as error:
        return 0, iter([Finding(-1, str(error))])
    return dataset.partitions, findings_in(dataset, deep, workers)


def findings_in(
    dataset: Dataset, deep: bool = False, workers: int = 1, step: Callable[[], None] = lambda: None
) -> Iterator[Finding]:
    """What is wrong with ``dataset``; ``workers`` processes look at its partitions (0: one for each CPU).

    ``step`` is called after each partition, and may raise.
    """

    def partitions() -> Iterator[list[Finding]]:
        for findings in _partitions(dataset, deep, workers):
            step()
            yield findings

    return verify(dataset, partitions())


def _partitions(dataset: Dataset, deep: bool, workers: int) -> Iterator[list[Finding]]:
    """What is wrong with each partition, in order."""
    spans = [range(start, min(start + _SPAN, dataset.partitions)) for start in range(0, dataset.partitions, _SPAN)]
    path = str(dataset.root.path)
    workers = min(workers or available_cpus(), len(spans))
    gpus = _gpus() if deep and dataset.stage == "precompute" else 0
    if gpus:  # each worker loads the networks: one for each GPU
        workers = min(workers, gpus)
    if workers <= 1:
        checker = Checker(dataset, deep)
        yield from (checker.check(index) for index in range(dataset.partitions))
        return
    context = get_context("forkserver")
    begin = partial(_take_gpu, context.Value("i", 0)) if gpus else None
    with ProcessPoolExecutor(workers, context, begin) as pool:
        waiting: deque[Future[list[list[Finding]]]] = deque()
        for span in spans:
            waiting.append(pool.submit(_check, path, deep, span))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _take_gpu(numbers: Any) -> None:
    """Of a worker process, before its first task: the next GPU is its own."""
    import torch

    with numbers.get_lock():
        torch.cuda.set_device(numbers.value % torch.cuda.device_count())
        numbers.value += 1


def _check(path: str, deep: bool, span: range) -> list[list[Finding]]:
    return [_checker(path, deep).check(index) for index in span]


@lru_cache(maxsize=1)
def _checker(path: str, deep: bool) -> Checker:
    """Of a worker process, which lives for one dataset directory."""
    return Checker(Dataset.open(path), deep)


class Checker:
    """Looks at partitions of one dataset, one by one; ``deep``: also for what hashes cannot tell."""

    def __init__(self, dataset: Dataset, deep: bool) -> None:
        self.dataset = dataset
        self.deep = deep

    @cached_property
    def upstream(self) -> Dataset | None:
        """What the partitions were made from, if it is there."""
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
            for sample in reader.stored() if index not in self.dataset.released else ():
                fault = fault_of(sample)
                if fault and not self._came_so(sample, hashes.get(sample.key, "")):
                    yield Finding(index, fault, sample.file, sample.key)
            yield from self._compare_keys(index)
            if self.dataset.stage == "precompute" and self.dataset.success is not None:
                from pipeline.latents.validation import validate  # imports torch

                yield from validate(self.dataset, index)
        except StorageError as error:
            yield Finding(index, str(error))

    def _came_so(self, sample: Stored, source_hash: str) -> bool:
        """Whether a broken image is what its source gave: stage=download keeps bytes as they are."""
        if self.dataset.stage != "download":
            return False
        try:
            return content_hash(sample.read()["jpg"]) == source_hash
        except (SampleError, StorageError, KeyError):
            return False

    def _compare_keys(self, index: int) -> Iterator[Finding]:
        """Does the partition account for just the samples that its plan took from one partition of the upstream?"""
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


def fault_of(sample: Stored) -> str:
    """What is wrong with a sample that can be read; empty if nothing is."""
    try:
        row = sample.read()
        if row["key"] != sample.key:
            return f"holds {row['key']}"
        if "jpg" not in row:
            return ""
        height, width = transform.decode(row["jpg"], transform.probe(row["jpg"], transform.Limits())).shape[:2]
    except Released:
        return ""  # of a dataset that the sample refers to
    except (SampleError, transform.ImageError) as error:
        return f"does not decode: {error}"
    said = (row.get("width", width), row.get("height", height))
    return "" if said == (width, height) else f"has {width}x{height} pixels, its row says {said[0]}x{said[1]}"


# ---- the program


def main(config: VerifyConfig) -> int:
    with errors_as_one_line():
        places = places_of(config)
        if config.trace:
            return trace.tell(places, config.trace, config.show, config.json)
        return max([_report(place, config) for place in places])


def places_of(config: VerifyConfig) -> list[Path]:
    """The dataset directories that are meant, upstream first.

    Raises:
        ConfigError: none is, or there is none.
    """
    if bool(config.input) == bool(config.data_dir):
        raise ConfigError("give input=<a dataset directory>, or data_dir=<a folder with some below it>")
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
    partitions, findings = findings_of(place, config.deep, config.workers)
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
