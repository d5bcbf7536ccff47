"""What `dedup method=semantic` finds of planted duplicates, against perceptual hashes; and the cost of the search.

    python benchmarks/semantic_duplicates.py photos=<folder> [model=embedded] [count=2000] [cosines=0.9,0.95,0.98]
    python benchmarks/semantic_duplicates.py rows=100000,1000000 [width=512] [probes=2] [seconds=60]

The first cuts photos into tiles (see dedup.py) and plants copies of a tenth of them in each of four ways: cropped by
10 to 25 % of each edge, mirrored, recoloured (saturation, brightness and contrast, or grey), and rendered again (small
and enlarged, few colours, low quality). Recall is the fraction of planted copies that are in the group of their
original; precision the fraction of samples to be dropped that were planted.

The second generates random vectors, a tenth of them near duplicates of others, and times the parts of the search:
finding centres, sorting into cells, and comparing some of the cells, extrapolated to all. The last line fits a power of
the number of samples, and extrapolates to 10^9. If faiss is installed, the comparison is also run with it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

from dedup import jpeg, looked_at, tiles

from pipeline.curation.duplicates import Links, decide, forest, links, members, rows, units
from pipeline.curation.semantic import PER_CELL, Block, Vectors, by_cell, cells_for, centres, linked, nearest

KINDS = ("cropped", "mirrored", "recoloured", "rendered again")


def changed(image: Image.Image, kind: str, rng: random.Random) -> Image.Image:
    width, height = image.size
    if kind == "cropped":
        left, top, right, bottom = (rng.uniform(0.1, 0.25) for _ in range(4))
        return image.crop((int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height)))
    if kind == "mirrored":
        return ImageOps.mirror(image)
    if kind == "recoloured":
        if rng.random() < 0.3:
            return ImageOps.grayscale(image).convert("RGB")
        for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            image = enhance(image).enhance(rng.uniform(0.6, 1.5))
        return image
    small = image.resize((max(8, width // 3), max(8, height // 3)), Image.Resampling.BILINEAR)
    return ImageOps.posterize(small.resize(image.size, Image.Resampling.BICUBIC), 4)


def search(vectors: Vectors, cosine: float, probes: int = 2) -> Links:
    """All steps of the search, on vectors in memory."""
    middle = centres(vectors, cells_for(len(vectors), probes, len(vectors)))
    ordered = by_cell(np.arange(len(vectors)), vectors, nearest(vectors, middle, 1 + probes), len(middle))
    found: list[Links] = []
    for cell in range(len(middle)):
        own, visitors = blocks(ordered, cell)
        found += [linked(own, own, cosine), linked(own, visitors, cosine)]
    return forest(found)


def blocks(ordered, cell: int) -> tuple[Block, Block]:  # type: ignore[no-untyped-def]
    first, middle, last = ordered.starts[2 * cell : 2 * cell + 3].tolist()
    cuts = slice(first, middle), slice(middle, last)
    own, visitors = (Block.of(ordered.places[cut], ordered.vectors[cut]) for cut in cuts)
    return own, visitors


def quality(folder: str, model: str, count: int, cosines: list[float]) -> None:
    from pipeline.encoders.image_text import image_tower

    rng, tower = random.Random(0), image_tower(model, f"model={model}")
    images, kinds, truth = list(tiles(folder, count, 20, rng)), [], {}
    originals = len(images)
    for number in range(originals):
        if number % 10 < 4 and number % 10 < len(KINDS):
            truth[len(images)] = number
            kinds.append(KINDS[number % 10])
            images.append(changed(images[number], kinds[-1], rng))
    files = [jpeg(image, 60 if at >= originals and kinds[at - originals] == KINDS[3] else 90)
             for at, image in enumerate(images)]  # fmt: skip
    vectors = np.concatenate(
        [
            tower.encode(tower.preprocess([np.asarray(image) for image in images[at : at + 64]])).cpu().numpy()
            for at in range(0, len(images), 64)
        ]
    ).astype(np.float16)
    looks = [looked_at(data) for data in files]
    table = rows([one for one, _ in looks], [two for _, two in looks], np.zeros(len(images)), np.arange(len(images)))
    hashed = forest(links([table], unit, len(table), 20) for unit in units(len(table), 20, 2**30))
    print(f"{originals} tiles, {len(truth)} planted copies; embeddings by {model}")
    print(f"{'':<22}" + "".join(f"{kind:>16}" for kind in KINDS) + f"{'precision':>12}")
    report("perceptual hash", hashed, truth, kinds, originals)
    for cosine in cosines:
        report(f"cosine >= {cosine}", search(vectors, cosine), truth, kinds, originals)


def report(name: str, stars: Links, truth: dict[int, int], kinds: list[str], originals: int) -> None:
    group = {int(place): int(place) for place in members(stars)} | {int(b): int(a) for a, b in stars}
    recalls = []
    for kind in KINDS:
        mine = [copy for copy in truth if kinds[copy - originals] == kind]
        hits = sum(group.get(copy, -1) == group.get(truth[copy], -2) for copy in mine)
        recalls.append(hits / max(1, len(mine)))
    table = rows([""] * len(members(stars)), [""] * len(members(stars)), -members(stars), members(stars))
    goes = decide(stars, table, members(stars)).places
    precision = sum(int(place) >= originals for place in goes) / max(1, len(goes))
    print(f"{name:<22}" + "".join(f"{recall:16.1%}" for recall in recalls) + f"{precision:12.1%}")


def simulated(count: int, width: int) -> Vectors:
    """Directions around 200 themes, a tenth of them near duplicates of others."""
    rng = np.random.default_rng(0)
    themes = rng.normal(size=(200, width)).astype(np.float32)
    found = np.empty((count, width), np.float16)
    for start in range(0, count, 1 << 16):
        stop = min(count, start + (1 << 16))
        part = themes[rng.integers(0, 200, stop - start)] + rng.normal(size=(stop - start, width)).astype(np.float32)
        tenth = (stop - start) // 10
        noise = rng.normal(size=(tenth, width)).astype(np.float32)
        part[:tenth] = part[tenth : 2 * tenth] + 0.3 * noise
        found[start:stop] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return found


def cost(count: int, width: int, probes: int, seconds: float) -> float:
    vectors, cosine = simulated(count, width), 0.95
    cells = cells_for(count, probes, count)
    begin = perf_counter()
    middle = centres(vectors[: PER_CELL * cells], cells)
    trained = perf_counter() - begin
    some = min(count, 100_000)
    begin = perf_counter()
    nearest(vectors[:some], middle, 1 + probes)
    sorting = (perf_counter() - begin) * count / some
    ordered = by_cell(np.arange(count), vectors, nearest(vectors, middle, 1 + probes), len(middle))
    done, rate, found = 0, 0.0, 0
    begin = perf_counter()
    for cell in np.random.default_rng(0).permutation(len(middle)).tolist():
        own, visitors = blocks(ordered, cell)
        found += len(linked(own, own, cosine)) + len(linked(own, visitors, cosine))
        done += 1
        if perf_counter() - begin > seconds:
            break
    rate = (perf_counter() - begin) / done
    comparing = rate * len(middle)
    total = trained + sorting + comparing
    print(
        f"{count:>10} vectors, {len(middle):>6} cells: centres {trained:.1f} s, sorting {sorting:.1f} s, comparing "
        f"{comparing:.1f} s ({done} cells measured), together {total:.0f} s"
    )
    beside_faiss(blocks(ordered, int((ordered.starts[1::2] - ordered.starts[:-1:2]).argmax()))[0], cosine)
    return total


def beside_faiss(block: Block, cosine: float) -> None:
    try:
        import faiss
    except ImportError:
        return
    begin = perf_counter()
    linked(block, block, cosine)
    ours = perf_counter() - begin
    index = faiss.IndexFlatIP(block.unit.shape[1])
    begin = perf_counter()
    index.add(block.unit)
    index.range_search(block.unit, cosine)
    theirs = perf_counter() - begin
    print(f"{'':>10} a cell of {len(block.places)}: {ours:.3f} s, range_search of faiss {theirs:.3f} s")


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "photos" in options:
        cosines = [float(text) for text in options.get("cosines", "0.9,0.95,0.98").split(",")]
        quality(options["photos"], options.get("model", "embedded"), int(options.get("count", 2000)), cosines)
    elif "rows" in options:
        counts = [int(text) for text in options["rows"].split(",")]
        settings = int(options.get("width", 512)), int(options.get("probes", 2)), float(options.get("seconds", 60))
        took = [cost(count, *settings) for count in counts]
        if len(counts) > 1:
            power, factor = np.polyfit(np.log(counts), np.log(took), 1)
            hours = np.exp(factor + power * np.log(1e9)) / 3600
            print(f"grows as n^{power:.2f}: 10^9 would take {hours:.0f} hours of this machine")
    else:
        print("photos=<folder>, or rows=<numbers>: see the top of this file")


if __name__ == "__main__":
    main()
