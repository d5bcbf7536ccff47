"""Writes a folder of images in one format, in a separate process, and prints the seconds that the call took.

    python benchmarks/_writers.py <contestant> <folder with class folders of JPEGs> <output>

The time does not include the contestant's imports before the call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

Sample = tuple[bytes, int]
Write = Callable[[Path], object]
"""Writes into the folder that it is given, which does not exist yet."""


class Files:
    """The image folder as a Dataset of (bytes, label), like torchvision's ImageFolder but without decoding."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(str(path) for path in root.glob("*/*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        with open(self.files[index], "rb") as file:
            return file.read(), index % 10


def ours(name: str, source: Path) -> Write:
    from pipeline import formats

    converter = getattr(formats, name)
    return lambda output: converter(source, output, num_workers=2).convert()


def mds(source: Path) -> Write:
    from streaming import MDSWriter

    def write(output: Path) -> None:
        files = Files(source)
        with MDSWriter(out=str(output), columns={"jpg": "bytes", "label": "int"}) as writer:
            for number in range(len(files)):
                data, label = files[number]
                writer.write({"jpg": data, "label": label})

    return write


def tar(source: Path) -> Write:
    import webdataset

    def write(output: Path) -> None:
        files = Files(source)
        output.mkdir()
        with webdataset.ShardWriter(str(output / "%05d.tar"), maxsize=2**26, verbose=0) as writer:
            for number in range(len(files)):
                data, label = files[number]
                writer.write({"__key__": f"{number:08d}", "jpg": data, "cls": str(label)})

    return write


def _litdata_item(path: str) -> dict[str, Any]:
    return {"jpg": Path(path).read_bytes(), "label": 0}


def litdata(source: Path) -> Write:
    from litdata import optimize

    def write(output: Path) -> None:
        files = Files(source).files
        optimize(fn=_litdata_item, inputs=files, output_dir=str(output), chunk_bytes="64MB", num_workers=2)

    return write


def datasets(source: Path) -> Write:
    from datasets import Dataset

    def write(output: Path) -> None:
        files = Files(source)
        rows = [files[number] for number in range(len(files))]
        table = Dataset.from_dict({"jpg": [row[0] for row in rows], "label": [row[1] for row in rows]})
        output.mkdir()
        table.to_parquet(str(output / "data.parquet"))

    return write


def disk(source: Path) -> Write:
    """The limit: the same bytes written from memory to one file, with fsync."""
    data = b"".join(Path(path).read_bytes() for path in Files(source).files)

    def write(output: Path) -> None:
        output.mkdir()
        with (output / "data").open("wb", buffering=0) as file:
            for start in range(0, len(data), 8 << 20):
                file.write(memoryview(data)[start : start + (8 << 20)])
            os.fsync(file.fileno())

    return write


CONTESTANTS: dict[str, tuple[str, Callable[[Path], Write]]] = {
    "ipc": ("pipeline", partial(ours, "IpcConverter")),
    "parquet": ("pipeline", partial(ours, "ParquetConverter")),
    "mds": ("pipeline", partial(ours, "MDSConverter")),
    "tar": ("pipeline", partial(ours, "TarConverter")),
    "StreamingDataset": ("streaming", mds),
    "webdataset": ("webdataset", tar),
    "litdata": ("litdata", litdata),
    "datasets": ("datasets", datasets),
    "limit: disk": ("os", disk),
}
"""Name → (module that must be installed, function that imports it and returns a writer of a folder's images)."""


def available() -> list[str]:
    return [name for name, (module, _) in CONTESTANTS.items() if find_spec(module)]


def main() -> None:
    name, source, output = sys.argv[1:]
    write = CONTESTANTS[name][1](Path(source))
    begin = perf_counter()
    write(Path(output))
    print(f"\n{perf_counter() - begin}", flush=True)


if __name__ == "__main__":
    main()
