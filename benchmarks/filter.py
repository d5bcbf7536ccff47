"""Speed of the whole filter stage relative to the bare image function, with 1 and 2 processes.

    python benchmarks/filter.py [photos=<folder>] [count=1500] [processes=1,2] [rounds=3]

Bare: the processes call `pipeline.imaging.transform.judge` on photos of 1 MP in memory, and discard the result.
Stage: the same photos as files in a folder, through one rank with as many workers: reading, hashing, ledger, tar, fsync
and commit; its rate is computed from the difference between `count` and a sixth of it, to exclude its start. Rounds
alternate; ratios are medians.
`by CPU time` compares CPU seconds per image, of rank and workers together, both with the same number of processes at
once (two on one core share its caches): this is what matters when all cores are busy, and it depends less on other
programs.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

sys.path.insert(0, str(Path(__file__).parents[1]))

from _photos import SIZES, photos

from pipeline.config.schema import DownloadConfig, FilterConfig
from pipeline.distributed import Rank
from pipeline.imaging.transform import DEFAULT_LIMITS, Rules, judge
from pipeline.partitions import engine
from pipeline.stages.download import Download
from pipeline.stages.filter import Filter


def bare(files: Sequence[bytes], count: int) -> float:
    """CPU seconds to judge ``count`` images."""
    begin = process_time()
    for number in range(count):
        judge(files[number % len(files)], Rules(), DEFAULT_LIMITS)
    return process_time() - begin


def bare_seconds(files: Sequence[bytes], count: int, processes: int) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds."""
    with ProcessPoolExecutor(processes, get_context("forkserver")) as pool:
        list(pool.map(bare, [files] * processes, [len(files)] * processes))  # waits until all have started
        begin = perf_counter()
        cpu = sum(pool.map(bare, [files] * processes, [count // processes] * processes))
        return perf_counter() - begin, cpu


def cpu_seconds() -> float:
    """CPU seconds of this process and all ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def stage_seconds(download: Path, processes: int) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds."""
    with tempfile.TemporaryDirectory(dir=download.parent) as place:
        config = FilterConfig(input=str(download), output=f"{place}/filter", workers=str(processes))
        stage = Filter(config, Rank())
        begin, cpu = perf_counter(), cpu_seconds()
        engine.run(stage)
        took = perf_counter() - begin
        stage.pool.close()
        return took, cpu_seconds() - cpu


def folder(place: Path, files: Sequence[bytes], count: int) -> Path:
    """A finished download stage of `count` files."""
    (place / f"images{count}").mkdir()
    for number in range(count):
        (place / f"images{count}" / f"{number:05d}.jpg").write_bytes(files[number % len(files)])
    config = DownloadConfig(
        source="image_folder", input=str(place / f"images{count}"), output=str(place / f"download{count}")
    )
    engine.run(Download(config, Rank()))
    return place / f"download{count}"


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    count = int(options.get("count", 1500))
    files = list(photos(options.get("photos", ""), SIZES["1 MP"], 6))
    print(f"{count} photos of 1 MP, {len(os.sched_getaffinity(0))} CPUs")
    print(f"{'processes':>10}{'bare, images/s':>16}{'stage, images/s':>17}{'stage of bare':>15}{'by CPU time':>13}")
    with tempfile.TemporaryDirectory() as text:
        small, large = (folder(Path(text), files, size) for size in (count // 6, count))
        for processes in map(int, options.get("processes", "1,2").split(",")):
            rates: list[tuple[float, float, float]] = []
            for _ in range(int(options.get("rounds", 3))):
                (longer, more), (shorter, less) = stage_seconds(large, processes), stage_seconds(small, processes)
                alone, cpu = bare_seconds(files, count, processes)
                most = count - count // 6
                rates.append((count / alone, most / (longer - shorter), cpu / count / ((more - less) / most)))
            shares = median(stage / alone for alone, stage, _ in rates)
            alone, stage, by_cpu = (median(column) for column in zip(*rates, strict=True))
            print(f"{processes:10}{alone:16.0f}{stage:17.0f}{shares:15.0%}{by_cpu:13.0%}")


if __name__ == "__main__":
    main()
