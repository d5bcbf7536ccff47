"""What `dedup` finds among 20,000 pieces of real photos with planted duplicates; its speed and memory on millions.

    python benchmarks/dedup.py photos=<folder> [count=20000] [hamming=20] [seed=0] [contrast=0]
    python benchmarks/dedup.py rows=2000000 [memory=1024] [seconds=60]

The first cuts the photos below the folder into tiles without overlap (nevertheless, two tiles of plain sky may look the
same, and count as mistakes). It adds 1,500 exact copies of some tiles and 1,500 near duplicates of others: cropped by
up to 2 % at each edge, resized by a factor from 0.5 to 1.5, and compressed again at a quality from 60 to 95. Recall is
the fraction of planted duplicates found as copies of their originals; precision the fraction of samples dropped as near
duplicates that were planted. Tiles with little detail are unlike photos: `contrast` skips those whose grey levels
deviate less. Any photos that are not variants of one another will do. Debian's packages gnome-backgrounds,
mate-backgrounds, ukui-wallpapers, lomiri-wallpapers-20.04 and plasma-workspace-wallpapers have many, but also some
variants (by day and by night).

The second generates random hashes, a tenth of them near duplicates, and runs units of the search for `seconds` seconds.
"""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from _photos import originals

from pipeline.curation.duplicates import ROW, Rows, decide, forest, links, members, rows, units
from pipeline.imaging.transform import Rules, process
from pipeline.samples import content_hash

PLANTED = 1500
EDGE = 256
RULES = Rules(min_image_size=0, max_image_size=EDGE)
Found = tuple[str, str]
"""Content hash and perceptual hash."""


def tiles(folder: str, count: int, contrast: float, rng: random.Random) -> Iterator[Image.Image]:
    """Tiles of all photos, about the same number from each; photos are downscaled for tiles of at most 256 pixels."""
    distinct = {content_hash(path.read_bytes()): path for path in originals(folder)}
    opened = {}
    for digest, path in distinct.items():
        with Image.open(path) as image:
            opened[digest] = (path, image.width * image.height)
    side = int((0.95 * sum(area for _, area in opened.values()) / count) ** 0.5)  # some area is lost at the borders
    places = []
    for path, _ in opened.values():
        with Image.open(path) as image:
            width, height = image.size
        places += [(path, x, y) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]
    print(f"{len(opened)} photos, {len(places)} tiles of {side} x {side} pixels")
    chosen = set(rng.sample(places, min(count, len(places))))
    for path, _ in opened.values():
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        for _, x, y in [place for place in places if place in chosen and place[0] == path]:
            tile = pixels.crop((x, y, x + side, y + side))
            if np.asarray(tile.convert("L")).std() >= contrast:
                yield tile


def jpeg(image: Image.Image, quality: int) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def reworked(image: Image.Image, rng: random.Random) -> bytes:
    width, height = image.size
    left, top, right, bottom = (rng.uniform(0, 0.02) for _ in range(4))
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    scale = rng.uniform(0.5, 1.5)
    size = (round(width * scale * rng.uniform(0.97, 1.03)), round(height * scale))
    return jpeg(image.resize(size, Image.Resampling.LANCZOS, box), rng.randint(60, 95))


def looked_at(data: bytes) -> Found:
    return content_hash(data), process(data, RULES).phash


def quality(folder: str, count: int, contrast: float, hamming: int, seed: int) -> None:
    rng = random.Random(seed)
    begin = perf_counter()
    found: list[Found] = []
    copies: list[tuple[int, Found]] = []
    planted = set(rng.sample(range(count - 2 * PLANTED), PLANTED))
    for number, tile in enumerate(tiles(folder, count - 2 * PLANTED, contrast, rng)):
        found.append(looked_at(jpeg(tile, 92)))
        if number in planted:
            copies.append((number, looked_at(reworked(tile, rng))))
    unique = len(found)
    exact = rng.sample([number for number in range(unique) if number not in planted], len(planted & set(range(unique))))
    truth = {unique + at: number for at, number in enumerate(exact)}
    truth |= {unique + len(exact) + at: number for at, (number, _) in enumerate(copies)}
    found += [found[number] for number in exact] + [look for _, look in copies]
    print(
        f"{len(found)} samples hashed in {perf_counter() - begin:.0f} s; {len(exact)} exact copies, {len(copies)} near"
    )
    pixels = np.arange(len(found))[::-1]  # so that originals are kept
    table = rows([one for one, _ in found], [other for _, other in found], pixels, np.arange(len(found)))
    begin = perf_counter()
    parts = (links([table], unit, len(table), hamming) for unit in units(len(table), hamming, 2**30))
    stars = forest(parts)
    verdicts = decide(stars, table[members(stars)], members(stars))
    took = perf_counter() - begin
    stays = dict(zip(verdicts.places.tolist(), verdicts.stays.tolist(), strict=True))
    same = set(verdicts.places[verdicts.exact].tolist())
    exact_found = sum(copy in stays for copy in truth if copy < unique + len(exact))
    near_found = sum(stays.get(copy) == original for copy, original in truth.items() if copy >= unique + len(exact))
    dropped = len(stays.keys() - same)
    recall, precision = near_found / len(copies), near_found / max(1, dropped)
    print(
        f"hamming={hamming}: {took:.1f} s; exact recall {exact_found / len(exact):.2%}, near recall {recall:.2%}, ",
        end="",
    )
    print(f"near precision {precision:.2%} ({dropped} dropped)")


def speed(count: int, memory: int, seconds: float) -> None:

    def pieces() -> Iterator[Rows]:
        """Generated again at each call, as if read from a file again."""
        rng = np.random.default_rng(0)
        for start in range(0, count, 1 << 20):
            table = np.zeros(min(1 << 20, count - start), ROW)
            table["content"] = rng.integers(0, 2**63, (len(table), 2))
            table["look"] = rng.integers(0, 2**63, (len(table), 2)) * 2
            tenth = len(table) // 10
            flips = np.uint64(1) << rng.integers(0, 64, (tenth, 4)).astype(np.uint64)
            table["look"][:tenth] = table["look"][tenth : 2 * tenth]
            table["look"][:tenth, 1] ^= np.bitwise_xor.reduce(flips, 1)
            table["known"], table["place"] = True, np.arange(start, start + len(table))
            yield table

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    for _ in pieces():
        pass
    work, before = units(count, 20, memory << 20), peak()
    done, begin = [], perf_counter()
    for unit in random.Random(0).sample(work, len(work)):
        done.append(links(pieces(), unit, count, 20))
        if perf_counter() - begin > seconds:
            break
    took = (perf_counter() - begin) / len(done)
    print(f"{count} samples, memory={memory}: {len(work)} units, {took:.2f} s each, {took * len(work):.0f} s in all")
    per_sample = (peak() - before) / count
    print(
        f"peak {(peak() - before) >> 20} MiB above the start: {per_sample:.0f} bytes per sample; {ROW.itemsize} on disk"
    )
    print(f"near duplicates found by {len(done)} units: {len(forest(done)) / (count // 10):.1%} of those planted")


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "rows" in options:
        speed(int(options["rows"]), int(options.get("memory", 1024)), float(options.get("seconds", 60)))
    elif "photos" in options:
        count, hamming = int(options.get("count", 20_000)), int(options.get("hamming", 20))
        quality(options["photos"], count, float(options.get("contrast", 0)), hamming, int(options.get("seed", 0)))
    else:
        print("photos=<folder> of real photos, or rows=<number>: see the top of this file")


if __name__ == "__main__":
    main()
