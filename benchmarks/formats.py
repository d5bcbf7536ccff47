"""Speed of writing and reading storage formats, against other libraries, in one run.

    python benchmarks/formats.py [parts=prepare,write,many,raw,read,decoded,report] [samples=3000] [many=12000]
                                 [kilobytes=133] [rounds=5] [folder=<where to work; stays>] [workers=0,2]
                                 [plot=formats.png]

With ``folder=``, parts can be run one by one, and repeated for more rounds, until ``prepare`` starts again; ``report``
prints all results and draws the plot. Libraries that are not installed are skipped: pip install litdata datasets. All
get the same JPEG files. Contestants take turns, and a ratio is the median of the ratios of single rounds, so that a
change in the machine's speed affects both sides.

Writing (``write``: of ``samples``; ``many``: of ``many`` samples) uses a fresh process for each contestant and round:
``call`` is the time of the call that writes, ``process`` includes imports and the start of Python. The files are in the
page cache. Ours and litdata use two processes.

Reading is of whole epochs by a DataLoader, in batches of 64 that reach the main process, from data in the page cache;
streams are shuffled as in their documentation. Workers persist, and the first epoch is not counted: it starts them,
opens files and, for ours only, checks hashes. ``raw`` reads one byte of each sample, ``read`` all of them; ``decoded``
has the worker decode (simplejpeg for all) and return one byte. Ours return views of the page cache (``output="view"``);
``ipc as bytes`` copies. Limits: ``page cache`` reads the same bytes by pread from one file, ``decode`` decodes them
from memory, ``disk`` writes the bytes to one file and calls fsync, which only ours do: on a slow disk, this limits only
ours (``folder=/dev/shm/...`` excludes the disk).
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import _writers as writers
import numpy as np
import simplejpeg
import xxhash
from _writers import Files, Sample

from pipeline.formats import Reader
from pipeline.loading import Permutation

FORMATS = ("ipc", "parquet", "mds", "tar")
COPIED, BY_INDEX = "ipc as bytes", "StreamingDataset[i]"
OURS = (*FORMATS, COPIED)
QUICK = (*FORMATS, "StreamingDataset", "webdataset", "limit: disk")
"""Contestants that write many samples."""
PEERS = ("StreamingDataset", "litdata", "webdataset")
PARTS = ("prepare", "write", "many", "raw", "read", "decoded", "report")
BATCH = 64
Times = dict[str, list[float]]
"""Contestant → a value for each round."""


# ---- samples


def jpegs(count: int, kilobytes: int) -> Iterator[bytes]:
    """JPEGs of about this size: pieces of scikit-learn's photos with noise, so that they compress differently."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    sources = load_sample_images().images
    edge = int((kilobytes * 1000 / 0.318) ** 0.5)
    images = [np.asarray(Image.fromarray(source).resize((edge + 64, edge + 64))) for source in sources]
    chosen = np.random.default_rng(0)
    noises = chosen.integers(-9, 10, (8, edge, edge, 3), np.int16)
    for number in range(count):
        x, y = chosen.integers(0, 64, 2)
        pixels = images[number % 2][y : y + edge, x : x + edge] + noises[chosen.integers(8)]
        yield simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), 90, "RGB", "420")


class Mapped:
    """A map-style dataset of another library, as one of (bytes, label)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        return sample["jpg"], sample["label"]


# ---- processing of a batch


def as_pairs(batch: Sequence[Any]) -> list[Sample]:
    return [(sample["jpg"], sample["label"]) if isinstance(sample, dict) else sample for sample in batch]


def decoded(batch: Sequence[Any]) -> list[int]:
    return [int(simplejpeg.decode_jpeg(data, "RGB")[0, 0, 0]) for data, _ in as_pairs(batch)]


def consume(work: str, batch: list[Any]) -> int:
    """Processing of a batch in the main process."""
    if work == "raw":
        return sum(int(data[len(data) // 2]) for data, _ in batch)
    return sum(xxhash.xxh3_64_intdigest(data) for data, _ in batch) if work == "read" else len(batch)


# ---- writing


def compare_writing(root: Path, source: Path, names: Sequence[str], stays: bool) -> tuple[Times, Times]:
    """Seconds of the call and of the whole process in one round; with ``stays``, the output is kept for reading."""
    call: Times = {}
    process: Times = {}
    for name in names:
        output = root / name.replace(": ", "-")
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        for path in Files(source).files:  # some systems return page cache to their host
            Path(path).read_bytes()
        begin = perf_counter()
        done = subprocess.run([sys.executable, writers.__file__, name, source, output], capture_output=True, text=True)
        process[name] = [perf_counter() - begin]
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        call[name] = [float(done.stdout.split()[-1])]
        if not stays:
            shutil.rmtree(output)
    return call, process


# ---- reading


class Order:
    """A sampler: a new permutation in each epoch, or none."""

    def __init__(self, count: int, shuffled: bool) -> None:
        self.count, self.shuffled, self.epoch = count, shuffled, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(Permutation(self.count, self.epoch) if self.shuffled else range(self.count))


def loader(name: str, root: Path, files: Files, shuffled: bool, workers: int, work: str) -> Any:
    """The DataLoader of a contestant."""
    from torch.utils.data import DataLoader

    options: dict[str, Any] = {"num_workers": workers, "batch_size": BATCH}
    options["collate_fn"] = decoded if work == "decoded" else as_pairs
    if workers:
        options |= {"multiprocessing_context": "fork", "prefetch_factor": 4, "persistent_workers": True}
    if name == "litdata":
        from litdata import StreamingDataLoader
        from litdata import StreamingDataset as Litdata

        return StreamingDataLoader(Litdata(str(root / name), shuffle=shuffled), **options)
    if name in ("StreamingDataset", "webdataset"):
        return DataLoader(stream(name, root, shuffled), **options)
    return DataLoader(indexed(name, root, files), sampler=Order(len(files), shuffled), **options)  # type: ignore[arg-type]


def stream(name: str, root: Path, shuffled: bool) -> Any:
    if name == "StreamingDataset":
        from streaming import StreamingDataset

        return StreamingDataset(local=str(root / name), shuffle=shuffled, batch_size=BATCH)
    import webdataset

    shards = sorted(map(str, (root / name).glob("*.tar")))
    found = webdataset.WebDataset(
        shards, shardshuffle=len(shards) if shuffled else False, nodesplitter=None, empty_check=False
    )
    return (found.shuffle(1000) if shuffled else found).map(lambda sample: (sample["jpg"], int(sample["cls"])))


def indexed(name: str, root: Path, files: Files) -> Any:
    """The map-style dataset of a contestant."""
    if name in OURS:
        return Reader(root / name.partition(" ")[0], output="bytes" if name == COPIED else "view")
    if name == "ImageFolder":
        return files
    if name == BY_INDEX:
        from streaming import StreamingDataset

        copy = root / "by-index"  # the library refuses to read a folder twice
        if not copy.exists():
            shutil.copytree(root / "StreamingDataset", copy, copy_function=os.link)
        return Mapped(StreamingDataset(local=str(copy), shuffle=False, batch_size=1))
    import datasets

    table = datasets.load_dataset("parquet", data_files=str(root / name / "*.parquet"), cache_dir=str(root / "hf"))
    return Mapped(table["train"])


def epoch(batches: Any, work: str) -> float:
    """Seconds of one epoch."""
    begin = perf_counter()
    for batch in batches:
        consume(work, batch)
    return perf_counter() - begin


def limit(root: Path, files: Files, work: str) -> tuple[str, Callable[[], float]]:
    """The limit of reading, in one process."""
    if work == "decoded":
        held = [files[number] for number in range(len(files))]
        return "limit: decode", partial(timed, lambda: decoded(held))
    sizes = [os.path.getsize(path) for path in files.files]
    places = np.cumsum([0, *sizes])
    joined = root / "joined"
    with joined.open("wb") as file:
        for path in files.files:
            file.write(Path(path).read_bytes())
    order = Order(len(files), True)

    def read() -> None:
        fd = os.open(joined, os.O_RDONLY)
        for index in order:
            data = os.pread(fd, sizes[index], places[index])
            consume(work, [(data, 0)])
        os.close(fd)

    return "limit: page cache", partial(timed, read)


def timed(do: Callable[[], object]) -> float:
    begin = perf_counter()
    do()
    return perf_counter() - begin


def compare_reading(root: Path, files: Files, rounds: int, work: str, shuffled: bool, workers: int) -> Times:
    """Seconds of each round."""
    rivals = [name for name in writers.available() if name not in FORMATS and not name.startswith("limit")]
    names = [*OURS, "ImageFolder", *rivals]
    if "StreamingDataset" in names and work == "raw":
        names.append(BY_INDEX)
    contestants: dict[str, Callable[[], float]] = {}
    with quiet():
        for name in names:
            contestants[name] = partial(epoch, loader(name, root, files, shuffled, workers, work), work)
    if not workers and shuffled:
        name, contestants[name] = limit(root, files, work)
    times: Times = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, read in contestants.items():
            with quiet():
                seconds = read()
            if turn:
                times[name].append(seconds)
    return times


# ---- main


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    parts = options.get("parts", ",".join(PARTS)).split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"parts={','.join(unknown)}: expected some of {','.join(PARTS)}")
    if "folder" in options:
        run(Path(options["folder"]), parts, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), parts, options)


def run(root: Path, parts: Sequence[str], options: dict[str, str]) -> None:
    rounds = int(options.get("rounds", 5))
    if "prepare" in parts:
        (root / "results.json").unlink(missing_ok=True)
        for folder, count in ("images", options.get("samples", 3000)), ("many", options.get("many", 12000)):
            prepare(root / folder, int(count), int(options.get("kilobytes", 133)))
    files = Files(root / "images")
    megabytes = sum(os.path.getsize(path) for path in files.files) / 1e6
    mean = megabytes * 1000 / len(files)
    print(f"{len(files)} JPEGs of {mean:.0f} kB in the mean, {rounds} rounds, {os.cpu_count()} CPUs", flush=True)
    if "write" in parts:
        measure_writing(root, "images", writers.available(), rounds)
    if "many" in parts:
        names = [name for name in writers.available() if name in QUICK]
        measure_writing(root, "many", names, rounds)
    for work, cases in (("raw", (True, False)), ("read", (True,)), ("decoded", (True,))):
        for shuffled in cases if work in parts else ():
            for workers in map(int, options.get("workers", "0,2").split(",")):
                times = compare_reading(root, files, rounds, work, shuffled, workers)
                title = f"{work}, {'shuffled' if shuffled else 'sequential'}, {workers} workers"
                rates = {name: [len(files) / s for s in seconds] for name, seconds in times.items()}
                keep(root, f"Reading, samples/s: {title}", rates)
    tables = _kept(root)
    if "report" in parts:
        for title, table in tables.items():
            show(title, table)
        if options.get("plot"):
            draw(tables, Path(options["plot"]))


def measure_writing(root: Path, folder: str, names: Sequence[str], rounds: int) -> None:
    stays = folder == "images"
    output = root if stays else root / "written"
    output.mkdir(exist_ok=True)
    files = Files(root / folder).files
    megabytes = sum(map(os.path.getsize, files)) / 1e6
    for _ in range(rounds):
        names = random.sample(names, len(names))  # the disk may still be slow from the previous contestant
        for what, times in zip(("call", "process"), compare_writing(output, root / folder, names, stays), strict=True):
            rates = {name: [megabytes / s for s in seconds] for name, seconds in times.items()}
            keep(root, f"Writing, MB/s of the {what}: {len(files)} samples, {megabytes:.0f} MB", rates)
    if not stays:
        output.rmdir()


def prepare(folder: Path, count: int, kilobytes: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for number, data in enumerate(jpegs(count, kilobytes)):
        place = folder / f"{number * 10 // count}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(data)


def _kept(root: Path) -> dict[str, Times]:
    path = root / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


def keep(root: Path, title: str, rates: Times) -> None:
    """Add rounds to the results stored in this folder."""
    kept = _kept(root)
    before = kept.get(title, {})
    kept[title] = {name: [*before.get(name, ()), *values] for name, values in rates.items()}
    (root / "results.json").write_text(json.dumps(kept))
    print(f"{title}: done", flush=True)


class quiet:  # noqa: N801 - used like a function
    """Context that suppresses the output of libraries."""

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._saved = os.dup(1), os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        sys.stdout.flush()
        for number, saved in enumerate(self._saved, 1):
            os.dup2(saved, number)
            os.close(saved)


def show(title: str, rates: Times) -> None:
    """Print medians, and the median ratio to each peer."""
    peers = [peer for peer in PEERS if peer in rates]
    print(f"\n{title}")
    print(f"{'':20}{'median':>9}{'best':>9}" + "".join(f"{f'x {peer}':>20}" for peer in peers))
    for name, values in rates.items():
        ratios = [median(value / other for value, other in zip(values, rates[peer], strict=True)) for peer in peers]
        print(f"{name:20}{median(values):9.0f}{max(values):9.0f}" + "".join(f"{ratio:20.2f}" for ratio in ratios))


def draw(tables: dict[str, Times], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    rows = -(-len(tables) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(15, 3.2 * rows), constrained_layout=True)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    for axis, (title, rates) in zip(axes.flat, tables.items(), strict=False):
        names = list(rates)[::-1]
        colours = ["#3566a8" if n in OURS else "#999999" if n.startswith("limit") else "#d08c2f" for n in names]
        axis.barh(names, [median(rates[name]) for name in names], color=colours)
        axis.set_title(title.removeprefix("Reading, samples/s: "), fontsize=10)
        axis.set_xlabel("MB/s" if title.startswith("Writing") else "samples/s", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:] or "png", dpi=110)
    path.write_bytes(file.getvalue())
    print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
