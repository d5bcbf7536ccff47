"""Cost of each scorer on a CPU, and the speed of `stage=score` relative to the bare functions.

    python benchmarks/score.py photos=<folder> [count=800] [edge=512] [processes=<CPUs>] [rounds=3] [costs=true]

The photos below the folder are cut into `count` JPEGs whose longer edge has `edge` pixels. First, each scorer runs
alone on decoded images, in one thread: CPU hours for a million images. Then all scorers of pixels and captions that
need no package run together: by `stage=score` with `processes` workers, and by as many processes that only decode and
call the functions. Both take turns; the best round counts. It takes about three minutes.
"""

from __future__ import annotations

import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from _photos import originals

from pipeline.config.schema import DownloadConfig, ScoreConfig
from pipeline.curation.scorers import Scorer, get_scorer
from pipeline.curation.scorers.pixels import View
from pipeline.distributed import Rank
from pipeline.imaging.headers import Limits, probe
from pipeline.imaging.transform import decode
from pipeline.partitions import engine
from pipeline.registry import scorers
from pipeline.stages.download import Download
from pipeline.stages.score import Score

CAPTION = "a photo of a wooden boat on a calm lake in front of snow-covered mountains, seen from the shore"
TOGETHER = [
    name
    for name, builtin in scorers.builtin.items()
    if builtin.module.endswith((".pixels", ".caption_scores")) and not get_scorer(name).package
]


def pieces(folder: str, count: int, edge: int) -> list[bytes]:
    """JPEGs of `edge` x three quarters of it, cropped from the photos at random positions and scales."""
    rng, found = random.Random(0), []
    paths = sorted(originals(folder))
    while len(found) < count:
        with Image.open(rng.choice(paths)) as opened:
            image = opened.convert("RGB")
        for _ in range(min(20, count - len(found))):
            share = rng.uniform(0.3, 0.9)
            width = int(min(image.width, image.height * 4 / 3) * share)
            height = int(width * 3 / 4)
            left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
            piece = image.resize(
                (edge, edge * 3 // 4), Image.Resampling.BILINEAR, (left, top, left + width, top + height)
            )
            file = BytesIO()
            piece.save(file, "JPEG", quality=90)
            found.append(file.getvalue())
    return found


def viewed(data: bytes) -> View:
    header = probe(data, Limits())
    return View(decode(data, header, Limits()), data, header)


def costs(images: list[bytes]) -> None:
    begin = process_time()
    for data in images:
        viewed(data)
    print(f"{'decoding':<20} {(process_time() - begin) / len(images) * 1e6 / 3600:8.2f} CPU hours per million")
    for name in scorers:
        if not isinstance(scorers.get(name), Scorer):
            continue
        scorer = get_scorer(name)
        try:
            scorer.describe()
        except ValueError as error:
            print(f"{name:<20} {error}")
            continue
        some = images if not scorer.package else images[: max(1, len(images) // 20)]
        given = (
            [viewed(data) for data in some]
            if scorer.kind == "pixels"
            else [f"{CAPTION} {at}" for at in range(len(some))]
        )
        scorer.function(given[0] if scorer.kind == "caption" else viewed(some[0]))  # loads what it needs
        begin = process_time()
        for one in given:
            scorer.function(one)
        print(f"{name:<20} {(process_time() - begin) / len(given) * 1e6 / 3600:8.2f} CPU hours per million")


def bare(paths: list[str]) -> list[list[float]]:
    functions = [get_scorer(name) for name in TOGETHER]
    found = []
    for path in paths:
        view = viewed(Path(path).read_bytes())
        found.append([one.function(view if one.kind == "pixels" else CAPTION) for one in functions])
    return found


def ratio(images: list[bytes], processes: int, rounds: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for number, data in enumerate(images):
            path = folder / "images" / f"{number:06d}.jpg"
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(CAPTION)
        engine.run(
            Download(
                DownloadConfig(
                    source="image_folder",
                    input=str(folder / "images"),
                    output=str(folder / "download"),
                    partition_size=1000,
                ),
                Rank(),
            )
        )
        paths = [str(path) for path in sorted((folder / "images").glob("*.jpg"))]
        took: dict[str, list[float]] = {"stage=score": [], "bare functions": []}
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            list(pool.map(bare, [paths[:1]] * processes))  # waits until all have started
            for number in range(rounds):
                begin = perf_counter()
                list(pool.map(bare, [paths[start : start + 25] for start in range(0, len(paths), 25)]))
                took["bare functions"].append(perf_counter() - begin)
                config = ScoreConfig(
                    input=str(folder / "download"),
                    output=str(folder / f"score{number}"),
                    scorers=tuple(TOGETHER),
                    workers=str(processes),
                    reuse=False,
                )
                begin = perf_counter()
                stage = Score(config, Rank())
                engine.run(stage)
                took["stage=score"].append(perf_counter() - begin)
                stage.close()
        best = {name: len(paths) / min(times) for name, times in took.items()}
        for name, rate in best.items():
            print(f"{name}: {rate:.0f} images/s with {processes} processes")
        print(f"ratio: {best['stage=score'] / best['bare functions']:.3f}")


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "photos" not in options:
        print("photos=<folder> of photos: see the top of this file")
        return
    processes = int(options.get("processes", len(os.sched_getaffinity(0))))
    images = pieces(options["photos"], int(options.get("count", 800)), int(options.get("edge", 512)))
    print(f"{len(images)} images of {np.mean([len(data) for data in images]) / 1024:.0f} KiB")
    if options.get("costs", "true") == "true":
        costs(images[: max(20, len(images) // 10)])
    ratio(images, processes, int(options.get("rounds", 3)))


if __name__ == "__main__":
    main()
