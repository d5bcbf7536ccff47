"""Captions of real pictures: a small captioner, and the caption of the training picture with the nearest mean colour.

    apt-get install tuxpaint-stamps-default
    python benchmarks/stamps.py [steps=500] [seeds=3] [threads=1] [folder=/usr/share/tuxpaint/stamps]

Categories are the stamps' folders; by seed, a quarter of them is for testing, so no category
of the test was trained on. Both are judged by CIDEr-D on the same pictures, with the stamps' one caption as reference.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import perf_counter

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import images
from pipeline.cli import build
from pipeline.config import STAGES, TrainConfig
from pipeline.distributed import Rank
from pipeline.metrics.captions import caption_scores, words
from pipeline.models.decoding import Decoding
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.randomness import uniforms
from pipeline.samples import Row
from pipeline.splits import Splits
from pipeline.stages import get_stage
from pipeline.stages.caption import load_writer
from pipeline.storage import Folder
from pipeline.training.loop import train
from pipeline.training.tasks.caption import learned

EDGE = 80
TRAINING = {"batch_size": 32, "lr": 2e-3, "dropout": 0.1, "max_length": 32, "vocab_size": 600}
AUGMENTATION = {"crop_scale": 0.7, "flip": 0.3}


def main() -> None:
    given = dict(argument.split("=") for argument in sys.argv[1:])
    stamps = Path(given.get("folder", "/usr/share/tuxpaint/stamps"))
    if not stamps.is_dir():
        print(f"skipped: there are no stamps in {stamps}: apt-get install tuxpaint-stamps-default")
        return
    torch.set_num_threads(int(given.get("threads", 1)))
    scores = []
    with tempfile.TemporaryDirectory() as place:
        shards = prepared(stamps, Path(place))
        for seed in range(int(given.get("seeds", 3))):
            ours, theirs = compared(stamps, shards, Path(place) / str(seed), seed, int(given.get("steps", 500)))
            scores.append((ours, theirs))
    ours, theirs = (mean(column) for column in zip(*scores, strict=True))
    print(f"mean of {len(scores)} splits: captioner {ours:.3f}, nearest mean colour {theirs:.3f} CIDEr-D")


def prepared(stamps: Path, place: Path) -> Path:
    """The stamps as small pictures, in shards."""
    run("download", source="image_folder", input=str(stamps), output=str(place / "download"))
    small = {"min_image_size": 32, "max_image_size": EDGE, "resize_mode": "border"}
    run("filter", input=str(place / "download"), output=str(place / "filter"), **small)
    run("shard", input=str(place / "filter"), output=str(place / "shard"))
    return place / "shard"


def batched(rows: list[Row], size: int) -> list[list[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def run(stage: str, **settings: object) -> None:
    engine.run(get_stage(stage)(build(STAGES[stage], settings), Rank()))


def compared(stamps: Path, shards: Path, place: Path, seed: int, steps: int) -> tuple[float, float]:
    """CIDEr-D of the captioner and of the baseline."""
    place.mkdir()
    splits = written_splits(stamps, place / "splits.csv", seed)
    start = perf_counter()
    settings = {"task": "caption", "encoder": "embedded", "steps": steps, "seed": seed, **TRAINING, **AUGMENTATION}
    settings |= {"input": str(shards), "split_file": str(splits)}
    config = build(TrainConfig, settings)
    task, data, valid = learned(config, Dataset.open(shards))
    with Folder.open(place / "run", create=True) as folder:
        train(task, data, replace(config, log_every=100), Rank(), folder, valid)
    took = perf_counter() - start
    known = Splits(splits)
    test = [row for row in rows_of(shards) if known.of(row["key"]) == "test"]
    references = [[words(row["caption"])] for row in test]
    writer = load_writer(place / "run" / "checkpoints" / f"step_{steps:06d}")  # the last, not that of the least loss
    how = Decoding(max_length=writer.longest - 1)
    ours = [text for some in batched(test, 64) for text in writer.write(list(map(pixels, some)), how)]
    theirs = nearest_colour(shards, known, test)
    print(f"split {seed}: {len(data)} pictures to train on, {len(test)} to test; {steps} steps in {took:.0f} s")
    found = {}
    for name, texts in (("captioner", ours), ("nearest mean colour", theirs)):
        scores = found[name] = caption_scores([words(text) for text in texts], references)
        print(f"  {name:20} " + "  ".join(f"{k} {scores[k]:.3f}" for k in ("cider", "bleu_1", "bleu_4", "rouge_l")))
    for row, text, other in list(zip(test, ours, theirs, strict=True))[:: max(1, len(test) // 6)]:
        print(f"    {row['key']}: {text!r}, nearest {other!r}, is {row['caption']!r}", flush=True)
    return found["captioner"]["cider"], found["nearest mean colour"]["cider"]


def written_splits(stamps: Path, file: Path, seed: int) -> Path:
    """Which stamps with a caption are for what: all of a folder for the same."""
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(("filename", "split"))
        for picture in sorted(stamps.rglob("*.png")):
            name = picture.relative_to(stamps)
            if picture.with_suffix(".txt").is_file():
                (draw,) = uniforms(1, seed, "category", str(name.parent))
                table.writerow((name, "test" if draw < 0.25 else "valid" if draw < 0.3 else "train"))
    return file


def nearest_colour(shards: Path, splits: Splits, wanted: list[Row]) -> list[str]:
    """Of each wanted picture the caption of the training picture whose mean colour is the nearest."""
    known = [row for row in rows_of(shards) if splits.of(row["key"]) == "train"]
    colours = np.stack([pixels(row).mean((0, 1)) for row in known])
    nearest = [((colours - pixels(row).mean((0, 1))) ** 2).sum(1).argmin() for row in wanted]
    return [known[int(place)]["caption"] for place in nearest]


def rows_of(shards: Path) -> list[Row]:
    rows = RandomAccess(Dataset.open(shards))
    return rows.rows(range(len(rows)))


def pixels(row: Row) -> np.ndarray:
    return images.decode(row["jpg"], images.probe(row["jpg"], images.Limits()))


if __name__ == "__main__":
    main()
