"""Storage formats side by side: how fast they are written and read, against libraries that do the same, in one run.

    python benchmarks/formats.py [samples=2000] [kilobytes=133] [rounds=5] [folder=<where to work>] [plot=formats.png]

Rivals that are not installed are left out: pip install litdata datasets. All get the same JPEG files. Contestants take
turns; a ratio is the median of the ratios of single rounds, so that a change of the machine's speed hits both sides.

Reading is of whole epochs by a DataLoader with batches of 64 on data in the page cache, of raw bytes or decoded pixels
(simplejpeg, the same call for all). Batches are consumed where they are made: they become their number of bytes and a
byte of each sample, so that reading is compared, not the pipe between processes; `handed over` has the bytes themselves
brought to the main process. Limits: `page cache` reads the same bytes by pread from one file, `decode` decodes them
from memory.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import simplejpeg

from pipeline import formats
from pipeline.formats import Reader
from pipeline.loading import Permutation

OURS = ("ipc", "parquet", "mds", "tar")
WRITERS = {
    "ipc": formats.IpcConverter,
    "parquet": formats.ParquetConverter,
    "mds": formats.MDSConverter,
    "tar": formats.TarConverter,
}
BATCH = 64


# ---- samples


def jpegs(count: int, kilobytes: int) -> Iterator[bytes]:
    """JPEGs of about this size: pieces of scikit-learn's photos with noise, so that they do not compress alike."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    sources = load_sample_images().images
    edge = int((kilobytes * 1000 / 0.45) ** 0.5)
    chosen = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(sources[number % 2]).resize((edge + 64, edge + 64))
        x, y = chosen.integers(0, 64, 2)
        pixels = np.asarray(image)[y : y + edge, x : x + edge].astype(np.int16)
        noisy = (pixels + chosen.integers(-9, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
        yield simplejpeg.encode_jpeg(np.ascontiguousarray(noisy), 90, "RGB", "420")


class Files:
    """The image folder as a Dataset of (bytes, label): what torchvision's ImageFolder does, without decoding."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(str(path) for path in root.glob("*/*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with open(self.files[index], "rb") as file:
            return file.read(), index % 10


class Mapped:
    """A map-style dataset of another library, with the bytes taken out of its samples."""

    def __init__(self, dataset: Any, take: Callable[[Any], bytes]) -> None:
        self.dataset = dataset
        self.take = take

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self.take(self.dataset[index]), 0


# ---- what is done with a batch


def consume(batch: Sequence[tuple[bytes, Any]]) -> tuple[int, int]:
    return sum(len(data) for data, _ in batch), sum(data[len(data) // 2] for data, _ in batch)


def decode(batch: Sequence[tuple[bytes, Any]]) -> tuple[int, int]:
    return len(batch), sum(int(simplejpeg.decode_jpeg(data, "RGB")[0, 0, 0]) for data, _ in batch)


WORK: dict[str, Callable[..., Any]] = {"raw": consume, "decoded": decode, "handed over": list}


def epoch(dataset: Any, order: Sequence[int] | None, workers: int, work: str) -> float:
    """Seconds of one epoch. Workers are started before; what they do first is opening."""
    from torch.utils.data import DataLoader

    options: dict[str, Any] = {"num_workers": workers, "collate_fn": WORK[work], "batch_size": BATCH}
    if workers:
        options |= {"multiprocessing_context": "fork", "prefetch_factor": 4}
    if order is not None:
        options["sampler"] = order
    loader = DataLoader(dataset, **options)
    begin = perf_counter()
    batches = sum(1 for _ in loader)
    seconds = perf_counter() - begin
    assert batches
    return seconds


# ---- writing


def write_mds(files: Files, output: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(output), columns={"jpg": "bytes", "label": "int"}) as writer:
        for number in range(len(files)):
            data, label = files[number]
            writer.write({"jpg": data, "label": label})


def write_tar(files: Files, output: Path) -> None:
    import webdataset

    output.mkdir()
    with webdataset.ShardWriter(str(output / "%05d.tar"), maxsize=2**26, verbose=0) as writer:
        for number in range(len(files)):
            data, label = files[number]
            writer.write({"__key__": f"{number:08d}", "jpg": data, "cls": str(label)})


def _litdata_item(path: str) -> dict[str, Any]:
    return {"jpg": Path(path).read_bytes(), "label": 0}


def write_litdata(files: Files, output: Path) -> None:
    from litdata import optimize

    optimize(fn=_litdata_item, inputs=files.files, output_dir=str(output), chunk_bytes="64MB", num_workers=2)


def write_datasets(files: Files, output: Path) -> None:
    import datasets

    rows = [files[number] for number in range(len(files))]
    table = datasets.Dataset.from_dict({"jpg": [row[0] for row in rows], "label": [row[1] for row in rows]})
    output.mkdir()
    table.to_parquet(str(output / "data.parquet"))


def ours(format: str, processes: int) -> Callable[[Path, Path], object]:
    return lambda source, output: WRITERS[format](source, output, num_workers=processes).convert()


def rivals() -> dict[str, Callable[[Files, Path], None]]:
    found = {"StreamingDataset": ("streaming", write_mds), "webdataset": ("webdataset", write_tar)}
    found |= {"litdata": ("litdata", write_litdata), "datasets": ("datasets", write_datasets)}
    return {name: write for name, (module, write) in found.items() if _installed(module)}


@cache
def _installed(module: str) -> bool:
    try:
        with quiet():
            importlib.import_module(module)
    except ImportError:
        return False
    return True


# ---- reading


def opened(name: str, root: Path, files: Files) -> Any:
    """The map-style dataset of a contestant."""
    if name in OURS:
        return Reader(root / f"{name}-2", output=os.environ.get("OUT","view"))
    if name == "ImageFolder":
        return files
    if name == "StreamingDataset":
        from streaming import StreamingDataset

        return Mapped(StreamingDataset(local=str(root / name), shuffle=False, batch_size=1), lambda s: s["jpg"])
    if name == "litdata":
        from litdata import StreamingDataset as Litdata

        return Mapped(Litdata(str(root / name)), lambda s: s["jpg"])
    import datasets

    table = datasets.load_dataset("parquet", data_files=str(root / name / "*.parquet"), cache_dir=str(root / "hf"))
    return Mapped(table["train"], lambda s: s["jpg"])


def webdataset_epoch(root: Path, shuffled: bool, workers: int, work: str) -> float:
    """Its samples come from a stream: shuffled by shard and by a buffer of 1,000, as its documentation has it."""
    import webdataset
    from torch.utils.data import DataLoader

    shards = sorted(map(str, (root / "webdataset").glob("*.tar")))
    stream = webdataset.WebDataset(
        shards, shardshuffle=len(shards) if shuffled else False, nodesplitter=None, empty_check=False
    )
    stream = (stream.shuffle(1000) if shuffled else stream).map(lambda sample: (sample["jpg"], sample["cls"]))
    options: dict[str, Any] = {"num_workers": workers, "collate_fn": WORK[work], "batch_size": BATCH}
    if workers:
        options |= {"multiprocessing_context": "fork", "prefetch_factor": 4}
    loader = DataLoader(stream, **options)
    begin = perf_counter()
    for _ in loader:
        pass
    return perf_counter() - begin


def page_cache(path: Path, sizes: Sequence[int]) -> float:
    """Seconds to read pieces of these sizes out of one file that is in memory."""
    fd = os.open(path, os.O_RDONLY)
    begin, at = perf_counter(), 0
    for size in sizes:
        os.pread(fd, size, at)
        at += size
    seconds = perf_counter() - begin
    os.close(fd)
    return seconds


# ---- the run


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    count, rounds = int(options.get("samples", 2000)), int(options.get("rounds", 5))
    with tempfile.TemporaryDirectory(dir=options.get("folder")) as folder:
        root = Path(folder)
        run(root, count, int(options.get("kilobytes", 133)), rounds, options.get("plot", ""))


def run(root: Path, count: int, kilobytes: int, rounds: int, plot: str) -> None:
    for number, data in enumerate(jpegs(count, kilobytes)):
        place = root / "images" / f"{number * 10 // count}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(data)
    files = Files(root / "images")
    sizes = [os.path.getsize(path) for path in files.files]
    total = sum(sizes)
    print(f"{count} JPEGs of {total / count / 1000:.0f} kB in the mean, {rounds} rounds, {os.cpu_count()} CPUs")
    written = compare_writing(root, files, rounds)
    show(
        "Writing, MB/s", {name: [total / 1e6 / s for s in times] for name, times in written.items()}, "StreamingDataset"
    )
    tables = {}
    for work, shuffled, workers in (
        ("raw", True, 0),
        ("raw", True, 2),
        ("raw", False, 0),
        ("raw", False, 2),
        ("decoded", True, 0),
        ("decoded", True, 2),
        ("handed over", True, 2),
    ):
        times = compare_reading(root, files, sizes, rounds, work, shuffled, workers)
        title = f"Reading, samples/s: {work}, {'shuffled' if shuffled else 'sequential'}, {workers} workers"
        tables[title] = {name: [count / s for s in seconds] for name, seconds in times.items()}
        show(title, tables[title], "StreamingDataset")
    if plot:
        draw(tables, Path(plot))


def compare_writing(root: Path, files: Files, rounds: int) -> dict[str, list[float]]:
    """Seconds; of the last round the output stays, to be read."""
    source = root / "images"
    contestants: dict[str, Callable[[Path], object]] = {}
    for format in OURS:
        for processes in (1, 2):
            convert = ours(format, processes)
            contestants[f"{format}, {processes} processes"] = lambda output, convert=convert: convert(source, output)
    for name, write in rivals().items():
        contestants[name] = lambda output, write=write: write(files, output)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, write in contestants.items():
            output = root / name.replace(", ", "-").replace(" processes", "")
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            with quiet():
                begin = perf_counter()
                write(output)
                times[name].append(perf_counter() - begin)
    return times


def compare_reading(
    root: Path, files: Files, sizes: Sequence[int], rounds: int, work: str, shuffled: bool, workers: int
) -> dict[str, list[float]]:
    contestants: dict[str, Callable[[Sequence[int] | None], float]] = {}
    available = rivals()
    for name in (*OURS, "ImageFolder", "StreamingDataset", "litdata", "datasets"):
        if name in OURS or name == "ImageFolder" or name in available:
            with quiet():
                dataset = opened(name, root, files)
            contestants[name] = lambda order, dataset=dataset: epoch(dataset, order, workers, work)
    if "webdataset" in available:
        contestants["webdataset"] = lambda order: webdataset_epoch(root, order is not None, workers, work)
    if not workers:
        if work == "raw":
            joined = root / "joined"
            joined.write_bytes(b"".join(Path(path).read_bytes() for path in files.files))
            contestants["limit: page cache"] = lambda order: page_cache(joined, sizes)
        if work == "decoded":
            held = [files[number] for number in range(len(files))]

            def decode_only(order: Sequence[int] | None) -> float:
                begin = perf_counter()
                decode(held)
                return perf_counter() - begin

            contestants["limit: decode"] = decode_only
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        order = list(Permutation(len(files), turn)) if shuffled else None
        for name, read in contestants.items():
            with quiet():
                seconds = read(order)
            if turn:  # the first warms up
                times[name].append(seconds)
    return times


class quiet:  # noqa: N801 - used like a function
    """Context: what libraries print is left out."""

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


def show(title: str, rates: dict[str, list[float]], rival: str) -> None:
    print(f"\n{title}")
    print(f"{'':22}{'median':>10}{'best':>10}{f'x {rival}':>20}")
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, rates.get(rival, values), strict=True)]
        print(f"{name:22}{median(values):10.0f}{max(values):10.0f}{median(ratios):20.2f}", flush=True)


def draw(tables: dict[str, dict[str, list[float]]], path: Path) -> None:
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
        axis.set_xlabel("samples/s", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:] or "png", dpi=110)
    path.write_bytes(file.getvalue())
    print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
