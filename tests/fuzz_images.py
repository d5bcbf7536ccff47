"""Feed the image path with files that were damaged at random, for a while: make fuzz, or

    python tests/fuzz_images.py [seconds=180] [seed=1] [workers=2]

It fails on a file that kills or stops a worker, or makes it outgrow its memory, and keeps that file in fuzz/.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import psutil
from image_files import SAMPLES, hostile

from pipeline.imaging.transform import Limits, Result, Rules
from pipeline.imaging.worker_pool import Lost, Pool
from pipeline.imaging.worker_protocol import understood
from pipeline.samples import content_hash

MEMORY = 2**29


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of `seeds` with a few bytes flipped, overwritten, cut out, repeated, or taken from another one."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(len(data), 300))
        length = rng.choice((1, 2, 4, 8, 64))
        other = rng.choice(seeds)
        start = rng.randrange(len(other))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = other[start : start + length]
            case 5:
                data[at : at + 4] = rng.choice((0, 1, 0xFFFF, 0x7FFFFFFF, len(data))).to_bytes(
                    4, rng.choice(("big", "little"))
                )
        data = data or bytearray(b"\0")
    return bytes(data)


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    seconds, seed = float(options.get("seconds", 180)), int(options.get("seed", 1))
    rng = random.Random(seed)
    seeds = list(dict.fromkeys([*SAMPLES.values(), *(data for _, data in hostile(0) if 0 < len(data) < 20_000)]))
    end = time.monotonic() + seconds

    def files() -> Iterator[tuple[bytes, bytes]]:
        while time.monotonic() < end:
            data = mutated(rng, seeds)
            yield data, data

    arguments = (Rules(min_image_size=8, max_image_size=32), Limits(max_pixels=4_000_000))
    workers = int(options.get("workers", 2))
    pool = Pool("pipeline.imaging.worker_protocol:answer", arguments, workers=workers, timeout=20, memory=MEMORY)
    outcomes: Counter[str] = Counter()
    most = 0
    for number, (data, said) in enumerate(pool.map(files())):
        result = understood(said, data) if isinstance(said, (bytes, bytearray)) else said
        outcomes["kept" if isinstance(result, Result) else result.reason] += 1
        if isinstance(result, Lost):
            Path("fuzz").mkdir(exist_ok=True)
            Path("fuzz", content_hash(data)).write_bytes(data)
        if number % 200 == 0:
            most = max([most, *(psutil.Process(pid).memory_info().rss for pid in pool.pids)])
    pool.close()
    total = sum(outcomes.values())
    print(
        f"{total} files in {seconds:g} s (seed {seed}): {dict(outcomes.most_common())}; largest worker {most >> 20} MiB"
    )
    if outcomes["crash"] or outcomes["timeout"] or most > MEMORY:
        sys.exit("some files killed or stopped a worker: they are in fuzz/")


if __name__ == "__main__":
    main()
