"""Damaged captions files, lists, annotations, archives, tables and objects for every source: ``make fuzz-sources``.

Each mutation of a small dataset is planned and brought in. All that may come of it are ConfigErrors, which are one
line, and outcomes that a ledger and all storage formats can hold.

    python tests/fuzz_sources.py mutations=2000 seed=0
"""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from sources.found import LAYOUTS, Layout, Samples, photo, write
from sources.packing import tar_of, zip_of

from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.partitions.stage import Context
from pipeline.samples import Outcome
from pipeline.sources import hdf5, torchvision
from pipeline.sources.base import Source, get_source
from pipeline.sources.torch_dataset import TorchDataset

TOKENS = (
    *(b"\0", b"\n", b"\r", b'"', b'""', b"'", b",", b";", b"\t", b"\\", b"\\ud83d", b"\\u0000", b"\xff\xfe"),
    *(b"\xef\xbb\xbf", b"\xed\xa0\xbd", b"null", b"NaN", b"-1", b"1e999", b"9" * 400, b"{}", b"[]", b"true", b"%s"),
    *(b"[" * 5000, b'{"a":' * 2000, b"../../x", b"/", b"\xcc\x81" * 50, b"\xe2\x80\xae", b"\x1f\x8b", b"PK\x05\x06"),
    *(b"PAR1", b"ustar", b"http://[", b"https://h.example/0.jpg"),
)
hdf5.TIMEOUT = 1.0  # the library behind h5py hangs at some damaged files
NONSENSE: tuple[Any, ...] = (
    *(None, "", "a text", "cut \ud83d", b"\xff\xfe", 3, -1, 2**70, 1.5, float("nan"), float("inf"), True),
    *((), [], {}, ["a", None, 3], {"caption": "x"}, {"a": {"a": {}}}, object(), np.int64(7), np.float32(2)),
    *(np.zeros(3), np.zeros((2, 2)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), np.array("x")),
    *(
        np.zeros((2, 2), object),
        np.zeros((2, 2), "datetime64[s]"),
        np.zeros((4, 4, 2), np.uint8),
        np.ones((4, 4), bool),
    ),
    *(
        Image.new(mode, (4, 4))
        for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "LAB", "HSV", "YCbCr")
    ),
)
SAMPLES = [(photo(number), caption) for number, caption in enumerate(("one", 'two, "x"', "drei é", "four"))]


# ---- what no test but this one lays out


class Objects:
    """A map-style dataset; its items are made of the bytes of a file, and are mostly nonsense."""

    def __init__(self, path: Path) -> None:
        self._parts = path.read_bytes().split(b"\0\0\n")

    def __len__(self) -> int:
        return 2 * len(self._parts)

    def __getitem__(self, index: int) -> Any:
        data = self._parts[index // 2]
        if index % 2 == 0:
            return data, "a caption"
        rng = random.Random(data)
        image, *more = (rng.choice((data, *NONSENSE)) for _ in range(rng.randint(1, 4)))
        names = ("image", "label", "caption", "jpg", "cls", "text")
        match rng.randrange(6):
            case 0:
                return image
            case 1:
                return [image, *more]
            case 2:
                return dict(zip(names, (image, *more), strict=False))
            case 3:
                return {rng.choice((*names, *NONSENSE[:8])): rng.choice(NONSENSE) for _ in range(3)}
            case 4:
                raise rng.choice((ValueError, KeyError, OSError, RuntimeError, AssertionError))(rng.choice(NONSENSE))
        return image, *more


def objects(folder: Path, samples: Samples) -> dict[str, Any]:
    write(folder / "objects", b"\0\0\n".join(data for data, _ in samples))
    return {"source": "torch_dataset"}


def array_files(folder: Path, samples: Samples) -> dict[str, Any]:
    """A set in two files, of images and of labels, as MNIST is."""
    images = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4)
    write(folder / "i/images.gz", gzip.compress(struct.pack(">4I", 0x803, *images.shape) + images.tobytes()))
    write(folder / "i/labels.gz", gzip.compress(struct.pack(">2I", 0x801, 3) + bytes(range(3))))
    return {"source": "torchvision", "files": ("arrays",), "input": str(folder / "i")}


def binary_files(folder: Path, samples: Samples) -> dict[str, Any]:
    """A set of records in an archive, as CIFAR is."""
    write(folder / "i/a.tar.gz", gzip.compress(tar_of({"a/b.bin": bytes(range(49)) * 2})))
    return {"source": "torchvision", "files": ("records",), "input": str(folder / "i")}


def _in_archives(name: str, content: bytes, file: str) -> Layout:
    def layout(folder: Path, samples: Samples) -> dict[str, Any]:
        write(folder / "i/a.zip", zip_of({f"{number}.jpg": data for number, (data, _) in enumerate(samples)}))
        source = {"source": "webdataset", "input": str(folder / "i"), "annotations": name, "listed_only": False}
        return {**source, "metadata": (str(write(folder / file, content)),)}

    return layout


def _prompts() -> bytes:
    file = io.BytesIO()
    rows = {"image_name": ["0.jpg", "1.jpg"], "prompt": ["one", "two"], "image_nsfw": [0.1, 0.9], "seed": [1, 2]}
    pq.write_table(pa.table(rows), file)
    return file.getvalue()


def listed_archives(folder: Path, samples: Samples) -> dict[str, Any]:
    write(folder / "i/a.tar", tar_of({"0.jpg": samples[0][0]}))
    given = write(folder / "list.txt", "name\turl\na.tar\thttps://h.example/x/a.tar\n")
    return {"source": "http_archive", "input": str(given), "mirror": str(folder / "i")}


FUZZED: dict[str, Layout] = {
    **LAYOUTS,
    "http_archive list": listed_archives,
    "torchvision arrays": array_files,
    "torchvision records": binary_files,
    "diffusiondb": _in_archives("diffusiondb", _prompts(), "m.parquet"),
    "texts": _in_archives("texts", tar_of({"0.txt": b"one", "1.txt": b"two"}), "m.tar"),
    "import_dataset": objects,
}
_PARTS = {
    "arrays": torchvision.Part("images.gz", "", ("labels.gz", "")),
    "records": torchvision.Part("a.tar.gz", "", members=("b.bin",)),
}
SETS = {
    name: torchvision.Published("https://h.example", {"train": (part,)}, ("a", "b", "c"), 4, 1)
    for name, part in _PARTS.items()
}
"""Sets of torchvision whose hashes nobody knows."""


# ---- mutations


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to four faults."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        span = rng.choice((1, 1, 2, 4, 16, 64, 512))
        match rng.randrange(7):
            case 0:
                data = data[:at] + bytes(rng.randrange(256) for _ in range(span)) + data[at + span :]
            case 1:
                data = data[:at] + rng.choice(TOKENS) + data[at:]
            case 2:
                data = data[:at] + data[at + span :]
            case 3:
                data = data[:at]
            case 4:
                data = data[:at] + data[at : at + span] * 2 + data[at + span :]
            case 5 if data:
                at = min(at, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case _:
                data = data[:at] + rng.choice(TOKENS) + data[at + span :]
    return data


def check(outcome: Outcome, columns: set[str]) -> None:
    """Raises AssertionError for an outcome that no ledger, or no storage format, could hold."""
    assert outcome.status in ("kept", "dropped", "failed")
    assert (outcome.row is not None) == (outcome.status == "kept" and not outcome.container)
    assert outcome.status == "kept" or outcome.reason.replace("_", "").isalnum(), outcome.reason
    for text in (outcome.key, outcome.reason, outcome.detail, outcome.source, outcome.member):
        text.encode()
        assert len(text) < 5000 and " at 0x" not in text
    if outcome.row is not None:
        row = {name: value for name, value in outcome.row.items() if name != "jpg"}
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        assert columns <= set(outcome.row) and isinstance(outcome.row["jpg"], bytes)
        assert all(isinstance(text, str) and text.strip() for text in row["captions"])


def brought_in(settings: dict[str, Any], home: Path) -> Iterator[Outcome]:
    """What becomes of the data that ``settings`` lead to. Raises ConfigError."""
    source = _source(settings, home)
    partitions = list(source.plan())
    columns = set(source.schema())
    context = Context({"extra": source.extra()})
    source.watched()
    for partition in partitions:
        keys = set()
        for outcome in source.samples(partition, context):
            check(outcome, columns)
            assert (outcome.key, outcome.container) not in keys, outcome.key
            keys.add((outcome.key, outcome.container))
            yield outcome


def _source(settings: dict[str, Any], home: Path) -> Source:
    if settings["source"] == "torch_dataset":
        config = DownloadConfig(output=str(home), source="torch_dataset", labels=home.name[-1] in "13579")
        return TorchDataset(config, Objects(home.parent / "base/objects"))
    return get_source(DownloadConfig(output=str(home), **settings), home, lambda: None)


def fuzz(layout: str, mutations: int, seed: int, folder: Path) -> Counter[str]:
    """Mutate the files of a layout; how often what came of it. Raises AssertionError that names the mutation."""
    rng = random.Random(f"{layout} {seed}")
    base = folder / "base"
    base.mkdir(parents=True)
    settings = FUZZED[layout](base, SAMPLES)
    files = [path for path in sorted(base.rglob("*")) if path.is_file() and path.suffix != ".jpg"]
    found: Counter[str] = Counter()
    for number in range(mutations):
        path = rng.choice(files)
        good = path.read_bytes()
        path.write_bytes(mutated(good, rng))
        home = folder / f"home{number}"
        home.mkdir()
        try:
            with patch.dict(torchvision.SETS, SETS):
                for outcome in brought_in(settings, home):
                    found[outcome.reason or outcome.status] += 1
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000, str(error)
            found["ConfigError"] += 1
        except BaseException as error:
            keep = Path(tempfile.mkdtemp(prefix="fuzz-")) / path.name
            shutil.copy(path, keep)
            raise AssertionError(f"{layout}, seed {seed}, mutation {number} of {path.name} (kept as {keep})") from error
        finally:
            path.write_bytes(good)
            shutil.rmtree(home)
    return found


def main(mutations: int = 2000, seed: int = 0) -> None:
    for layout in FUZZED:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = fuzz(layout, mutations, seed, Path(folder))
        common = ", ".join(f"{count} {what}" for what, count in found.most_common(6))
        print(f"{layout}: {mutations} mutations in {time.perf_counter() - begin:.1f} s: {common}", flush=True)


if __name__ == "__main__":
    main(**{name: int(value) for name, _, value in (argument.partition("=") for argument in sys.argv[1:])})
