"""CPU seconds of each stage per sample and per megabyte of its input: the table launch/rates.yaml.

    python benchmarks/rates.py [photos=<folder>] [count=120] > rates.yaml

Small drawings and photos of 1, 4 and 12 MP go through the main stages, with one rank and one worker. Each stage ends
with an event that records the CPU seconds of all its processes; a quarter of the samples is run first, and the
difference excludes the start. The cost is fitted as `sample + megabyte * (MB of its input)`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from _photos import SIZES, photos

from pipeline.partitions.dataset import Dataset
from pipeline.telemetry.events import last_events

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("download", "filter", "dedup", "shard", "precompute")
SETTINGS = {
    "download": ["copy=true", "captions=none", "source=image_folder"],
    "filter": ["min_image_size=16", "workers=1"],
    "dedup": ["hamming=-1"],
    "shard": ["format=mds"],
    "precompute": ["vae=embedded", "text_encoder=embedded", "image_resolutions=[256]", "workers=0"],
}


def cost(folder: Path, images: Path) -> dict[str, tuple[int, float, float]]:
    """Stage → samples, bytes of its input, seconds of CPU."""
    found = {}
    source = images
    for stage in STAGES:
        output = folder / stage
        command = [sys.executable, "-m", f"pipeline.stages.{stage}", f"input={source}", f"output={output}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *SETTINGS[stage]], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{stage} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        (last,) = last_events(output)
        if stage == "download":
            size = sum(path.stat().st_size for path in images.rglob("*.jpg"))
        else:
            size = Dataset.open(source).require_success()["counts"]["bytes"]
        found[stage] = (last["totals"]["in"], size, last["cpu"])
        source = output if stage != "dedup" else folder / "filter"
    return found


def measure(folder: Path, photo_folder: str, count: int) -> dict[str, list[tuple[float, float]]]:
    """Stage → for each size of image: megabytes and CPU seconds per sample."""
    points: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}
    for name, size in {"small": (160, 120), **{name: SIZES[name] for name in ("1 MP", "4 MP", "12 MP")}}.items():
        some = list(photos(photo_folder, size, 8))
        runs = []
        for number in (max(4, count // 4), count):
            images = folder / f"{name} {number}" / "images/all"
            images.mkdir(parents=True)
            for place in range(number):  # with different bytes, so that none is a duplicate
                (images / f"{place:05d}.jpg").write_bytes(some[place % len(some)] + place.to_bytes(4, "big"))
            runs.append(cost(images.parents[1], images.parent))
        for stage in STAGES:
            (few, small, less), (many, large, more) = runs[0][stage], runs[1][stage]
            points[stage].append(((large - small) / (many - few) / 1e6, (more - less) / (many - few)))
        print(f"{name}: measured", file=sys.stderr)
    return points


def fitted(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Best non-negative ``sample`` and ``megabyte``; ``sample`` is at least 0.1 ms, about the measurement error."""
    from scipy.optimize import nnls

    sizes, seconds = np.array(points).T
    found, _ = nnls(np.stack([np.ones(len(points)), sizes], 1), seconds)
    return max(float(found[0]), 1e-4), float(found[1])


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="latentmill-rates-") as folder:
        points = measure(Path(folder), options.get("photos", ""), int(options.get("count", 120)))
    for stage, measured in points.items():
        sample, megabyte = fitted(measured)
        said = ", ".join(f"{size:.3g} MB: {1000 * seconds:.3g} ms" for size, seconds in measured)
        print(f"{stage}: {{sample: {sample:.2g}, megabyte: {megabyte:.2g}}}  # {said}")


if __name__ == "__main__":
    main()
