"""Damaged captions files, lists, annotations, archives and parquet files for every source: ``make fuzz``.

Each mutation of a small data set is planned and brought in. All that may come of it are ConfigErrors, which are one
line, and outcomes that a ledger and all storage formats can hold.

    python tests/fuzz_sources.py mutations=2000 seed=0
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from sources.found import LAYOUTS, photo

from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.samples import Outcome
from pipeline.sources.base import get_source

TOKENS = (
    *(b"\0", b"\n", b"\r", b'"', b'""', b"'", b",", b";", b"\t", b"\\", b"\\ud83d", b"\\u0000", b"\xff\xfe"),
    *(b"\xef\xbb\xbf", b"\xed\xa0\xbd", b"null", b"NaN", b"-1", b"1e999", b"9" * 400, b"{}", b"[]", b"true", b"%s"),
    *(b"[" * 5000, b'{"a":' * 2000, b"../../x", b"/", b"\xcc\x81" * 50, b"\xe2\x80\xae", b"\x1f\x8b", b"PK\x05\x06"),
    *(b"PAR1", b"ustar", b"http://[", b"https://h.example/0.jpg"),
)
SAMPLES = [(photo(number), caption) for number, caption in enumerate(("one", 'two, "x"', "drei é", "four"))]


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
    config = DownloadConfig(output=str(home), **settings)
    source = get_source(config, home, lambda: None)
    partitions = list(source.plan())
    columns = set(source.schema())
    source.planned = source.extra()
    source.watched()
    for partition in partitions:
        keys = set()
        for outcome in source.samples(partition):
            check(outcome, columns)
            assert (outcome.key, outcome.container) not in keys, outcome.key
            keys.add((outcome.key, outcome.container))
            yield outcome


def fuzz(layout: str, mutations: int, seed: int, folder: Path) -> Counter[str]:
    """Mutate the files of a layout; how often what came of it. Raises AssertionError that names the mutation."""
    rng = random.Random(f"{layout} {seed}")
    base = folder / "base"
    base.mkdir(parents=True)
    settings = LAYOUTS[layout](base, SAMPLES)
    files = [path for path in sorted(base.rglob("*")) if path.is_file() and path.suffix != ".jpg"]
    found: Counter[str] = Counter()
    for number in range(mutations):
        path = rng.choice(files)
        good = path.read_bytes()
        path.write_bytes(mutated(good, rng))
        home = folder / f"home{number}"
        home.mkdir()
        try:
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
    for layout in LAYOUTS:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = fuzz(layout, mutations, seed, Path(folder))
        common = ", ".join(f"{count} {what}" for what, count in found.most_common(6))
        print(f"{layout}: {mutations} mutations in {time.perf_counter() - begin:.1f} s: {common}", flush=True)


if __name__ == "__main__":
    main(**{name: int(value) for name, _, value in (argument.partition("=") for argument in sys.argv[1:])})
