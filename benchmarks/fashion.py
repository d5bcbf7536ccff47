"""Fashion-MNIST, from its publisher's files to an evaluated classifier, and a convolutional network of the same cost.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion.py [seeds=2] [folder=/usr/share/datasets/fashion-mnist] [data_dir=...] [subset=small]
                                 [settings of stage=train, as epochs=1]

download → filter → shard → train (Vision Mamba, recipe=fashion_cpu) → evaluate, each run as by a user. The seeds are
trained in parallel, dividing the CPUs among them. The baseline sees the same batches in the same training loop: two
convolutions at each of three scales, with a width that gives a forward pass as many FLOPs as the Vision Mamba's.
Figures are means over seeds; minutes are those of training, in wall-clock time and in CPU time, which depends less on
other work on the machine. With `data_dir=`, the data are kept and reused. `subset=small` uses a hundredth of the
images, as a test run.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config.cli import load
from pipeline.config.schema import TrainConfig
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.storage import Folder
from pipeline.training.checkpoint import finished_run
from pipeline.training.feed import split
from pipeline.training.images import ImageDataset
from pipeline.training.loggers import forward_flops
from pipeline.training.loop import train
from pipeline.training.tasks.classify import Classify, normalised

_JUDGED = 500  # test images per batch


class Convolutions(nn.Module):
    """Two convolutions at each of three scales, global average pooling, a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for scale in range(3):
            after = width << scale
            for _ in range(2):
                layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
            layers.append(nn.MaxPool2d(2) if scale < 2 else nn.AdaptiveAvgPool2d(1))
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # type: ignore[no-any-return]


class ClassifyByConvolutions(Classify):
    """The same task with a convolutional network whose forward pass costs about as much."""

    def __init__(self, config: TrainConfig, data: ImageDataset) -> None:
        super().__init__(config, data)
        self._example = super().example()
        self.flops = forward_flops(self.model, self._example)
        models = (Convolutions(width, self.classes) for width in range(4, 65, 2))
        self.model = min(models, key=lambda model: abs(forward_flops(model, self._example) - self.flops))  # type: ignore[assignment]

    def example(self) -> tuple[Any, ...]:
        return self._example

    def facts(self) -> dict[str, Any]:
        return {}

    def preprocessing(self) -> dict[str, Any]:
        return {}


def run(stage: str, *settings: str) -> None:
    """Run a stage as a user would; exits if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.stages.{stage}", *settings],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"stage={stage} failed:\n{done.stderr[-2000:]}")


class Place:
    """Folders of the dataset and its runs."""

    def __init__(self, data_dir: Path, subset: str) -> None:
        self.settings = ["dataset=fashion_mnist", f"data_dir={data_dir}", *([f"subset={subset}"] if subset else [])]
        self.root = data_dir / "-".join(filter(None, ("fashion_mnist", subset)))

    def shards(self, part: str) -> Path:
        return self.root / part / "shard-ipc"

    def run(self, name: str) -> Path:
        return self.root / "runs" / name


@dataclass
class Minutes:
    clock: float = 0.0
    cpu: float = 0.0


@contextmanager
def timed() -> Iterator[Minutes]:
    """Context that measures minutes of wall-clock time, and of CPU time of this process and ended child processes."""
    minutes = Minutes()
    begin, cpu = perf_counter(), _cpu_seconds()
    yield minutes
    minutes.clock, minutes.cpu = (perf_counter() - begin) / 60, (_cpu_seconds() - cpu) / 60


def _cpu_seconds() -> float:
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def prepare(at: Place, folder: Path) -> None:
    for part in ("train", "test"):
        place = (*at.settings, f"split={part}")
        run("download", *place, f"input={folder}")
        run("filter", *place)
        run("shard", *place, "format=ipc")


def config_of(at: Place, seed: int, settings: list[str]) -> TrainConfig:
    given = [*at.settings, "recipe=fashion_cpu", f"seed={seed}", *settings]
    config: TrainConfig = load("train", given)
    return config


def ours(at: Place, seed: int, settings: list[str]) -> tuple[float, Minutes]:
    """Accuracy on the test set, and minutes of training."""
    place = (*at.settings, f"name=mamba-{seed}")
    with timed() as minutes:
        run("train", *place, f"input={at.shards('train')}", "recipe=fashion_cpu", f"seed={seed}", *settings)
    run("evaluate", *place, "metric=classes", f"input={at.shards('test')}")
    found = json.loads((at.run(f"mamba-{seed}") / "evaluation.json").read_text())
    return float(found["accuracy"]), minutes


def theirs(at: Place, seed: int, settings: list[str]) -> tuple[float, Minutes]:
    """Like :func:`ours`, for the convolutional network."""
    config = config_of(at, seed, settings)
    torch.set_num_threads(config.threads)
    place = at.run(f"convolutions-{seed}")
    with timed() as minutes:
        data = images_of(at, "train", config)
        task = ClassifyByConvolutions(config, data)
        fit, valid = split(data, config.valid_fraction, config.seed)
        steps = max(1, round(config.epochs * len(fit) / config.batch_size)) if config.epochs else config.steps
        place.mkdir(parents=True, exist_ok=True)
        with Folder.open(place) as folder:
            train(task, fit, replace(config, steps=steps, epochs=0.0), Rank(), folder, valid)
    model = Convolutions(_width(task.model), task.classes)
    model.load_state_dict(finished_run(str(place), "classify").tensors["ema"])
    return accuracy(model.eval(), task, images_of(at, "test", config)), minutes


def _width(model: nn.Module) -> int:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return first.out_channels


def images_of(at: Place, part: str, config: TrainConfig) -> ImageDataset:
    return ImageDataset(RandomAccess(Dataset.open(at.shards(part))), config.resolution)


def accuracy(model: nn.Module, task: Classify, data: ImageDataset) -> float:
    right = 0
    with torch.inference_mode():
        for start in range(0, len(data), _JUDGED):
            batch = data.batch(np.arange(start, min(start + _JUDGED, len(data))))
            logits = model(normalised(batch["images"], task.mean, task.std))
            right += int((logits.argmax(1) == batch["labels"]).sum())
    return right / len(data)


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folder = Path(given.pop("folder", "/usr/share/datasets/fashion-mnist"))
    seeds, keep, subset = int(given.pop("seeds", 2)), given.pop("data_dir", ""), given.pop("subset", "")
    if not folder.is_dir():
        print(f"skipped: {folder} is not there: apt-get install dataset-fashion-mnist")
        return
    threads = max(1, len(os.sched_getaffinity(0)) // seeds)
    settings = [f"{name}={value}" for name, value in {"threads": threads, **given}.items()]
    with tempfile.TemporaryDirectory() as scratch:
        at = Place(Path(keep or scratch).absolute(), subset)
        begin = perf_counter()
        prepare(at, folder)
        print(f"download, filter, shard: {(perf_counter() - begin) / 60:.1f} min")
        print(f"{'':24}{'test accuracy':>15}{'minutes':>10}{'CPU minutes':>13}{'% per CPU minute':>18}")
        with ProcessPoolExecutor(seeds, get_context("spawn")) as side_by_side:
            for name, contestant in (("Vision Mamba", ours), ("convolutions", theirs)):
                runs = [side_by_side.submit(contestant, at, seed, settings) for seed in range(seeds)]
                results = [run.result() for run in runs]
                right = mean(score for score, _ in results)
                clock, cpu = mean(time.clock for _, time in results), mean(time.cpu for _, time in results)
                print(f"{name:24}{100 * right:14.2f}%{clock:10.1f}{cpu:13.1f}{100 * right / cpu:18.2f}", flush=True)
        print(f"in all: {(perf_counter() - begin) / 60:.1f} min")


if __name__ == "__main__":
    main()
