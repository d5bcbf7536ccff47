"""Time and memory of `stage=select` for a million samples, also when repeated with other thresholds.

    python benchmarks/select_rows.py [rows=1000000] [partition=10000] [folder=<where to work>]

The samples are generated: rows of captions without an image, and random scores. Selections then run one after the
other, each in its own process with one rank, to the same output with overwrite=true. Seconds are wall-clock time, from
the opened input to `_SUCCESS`, with the CPU time of the process next to it; memory is its peak resident size, less its
size before.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.schema import DownloadConfig, ScoreConfig, SelectConfig
from pipeline.distributed import Place, Rank
from pipeline.partitions import engine
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context, Stage, follow_upstream
from pipeline.samples import IMAGE_COLUMNS, Outcome, Schema
from pipeline.stages.select import Select

WORDS = [f"word{number}" for number in range(20_000)]
SELECTIONS: dict[str, dict[str, Any]] = {
    "conditions": {"where": "sharpness > q10 and top(clip_similarity, 0.3) and language == 'en'"},
    "other thresholds": {"where": "sharpness > q20 and top(clip_similarity, 0.4) and language == 'en'"},
    "numbers alone": {"where": "sharpness > 100 and clip_similarity > 0.28"},
    "cap and sample": {"where": "sharpness > q10", "cap": ("theme:500",), "sample": 100_000},
    "10,000 concepts": {"concepts": "concepts.json", "per_concept": 100},
}


class Captioned(Stage):
    """Samples with a caption of ten words and almost no image."""

    name = "download"
    reads_upstream = False

    def schema(self) -> Schema:
        return dict(IMAGE_COLUMNS)

    def plan(self, since: int = 0) -> Iterator[Partition]:
        config = self.config
        for start in range(0, config.count, config.partition_size):
            stop = min(config.count, start + config.partition_size)
            yield Partition((Input("made", start, stop),), stop - start)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (span,) = partition.inputs
        random = np.random.default_rng(span.start)
        chosen = (len(WORDS) * random.random((span.stop - span.start, 10)) ** 3).astype(int)  # some words are common
        for number, words in enumerate(chosen.tolist(), span.start):
            key = f"sample{number:09d}-jpg"
            caption = " ".join(WORDS[word] for word in words)
            row = {"key": key, "jpg": b"\xff\xd8", "format": "jpeg", "caption": caption, "captions": [caption]}
            yield Outcome(key, "kept", source="made", offset=number, row=row)


class Scored(Stage):
    """Random scores of these samples."""

    name = "score"

    @property
    def format(self) -> str:
        return "scores"

    def schema(self) -> Schema:
        return {"key": "str", "sharpness": "float", "clip_similarity": "float", "language": "str", "theme": "int"}

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (span,) = partition.inputs
        random = np.random.default_rng(span.start)
        for stored in self.upstream.samples(span.start):
            row: dict[str, Any] = {"key": stored.key, "sharpness": float(random.lognormal(5, 1))}
            row |= {"clip_similarity": float(random.normal(0.28, 0.05)), "theme": int(random.integers(1000))}
            row["language"] = "en" if random.random() < 0.8 else "de"
            yield Outcome(stored.key, "kept", source=stored.source, offset=stored.offset, row=row)


def make(folder: str, rows: int, partition: int, rank: int, world: int) -> None:
    place = Rank(Place(rank=rank, world_size=world))
    engine.run(Captioned(DownloadConfig(output=f"{folder}/images", count=rows, partition_size=partition), place))
    engine.run(Scored(ScoreConfig(input=f"{folder}/images", output=f"{folder}/score", wait=600.0), place))


def memory(name: str) -> float:
    """A value of ``/proc/self/status`` in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def selected(folder: str, settings: dict[str, Any]) -> tuple[float, float, float, int]:
    """Seconds, CPU seconds, MiB, and the number of samples selected."""
    config = SelectConfig(input=f"{folder}/score", output=f"{folder}/select", overwrite=True, **settings)
    before, begin, busy = memory("VmRSS"), perf_counter(), process_time()
    success = engine.run(Select(config, Rank()))
    return perf_counter() - begin, process_time() - busy, memory("VmHWM") - before, success["counts"]["kept"]


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    rows, partition = int(given.get("rows", 1_000_000)), int(given.get("partition", 10_000))
    world = len(os.sched_getaffinity(0))
    with TemporaryDirectory(dir=given.get("folder")) as folder:
        context = get_context("spawn")
        with context.Pool(world) as pool:
            pool.starmap(make, [(folder, rows, partition, rank, world) for rank in range(world)], 1)
        concepts = Path(folder) / "concepts.json"
        concepts.write_text(json.dumps(WORDS[::2]))
        print(f"{'':<18} {'seconds':>8} {'CPU s':>8} {'us/sample':>10} {'MiB':>6} {'kept':>9}   of {rows}")
        for name, settings in SELECTIONS.items():
            settings = settings | ({"concepts": str(concepts)} if "concepts" in settings else {})
            with context.Pool(1) as pool:
                seconds, busy, peak, kept = pool.apply(selected, (folder, settings))
            print(f"{name:<18} {seconds:8.1f} {busy:8.1f} {1e6 * busy / rows:10.1f} {peak:6.0f} {kept:9}", flush=True)


if __name__ == "__main__":
    main()
