"""What `dedup method=semantic` finds of planted duplicates, against perceptual hashes; and the cost of the search.

    python benchmarks/semantic_duplicates.py photos=<folder> [model=embedded] [count=2000] [cosines=0.9,0.95,0.98]
    python benchmarks/semantic_duplicates.py rows=100000,1000000 [width=512] [probes=2] [seconds=60]

The first cuts photos into tiles (see dedup.py) and plants copies of a tenth of them in each of four ways: cropped by
10 to 25 % of each edge, mirrored, recoloured (saturation, brightness and contrast, or grey), and rendered again (small
and enlarged, few colours, low quality). Recall is the fraction of planted copies that are in the group of their
original; precision the fraction of samples to be dropped that were planted.

The second generates random vectors, a tenth of them near duplicates of others, and measures the CPU time of the parts
of the search, with one thread: finding centres, sorting all vectors into cells, and comparing some of the cells,
extrapolated to all. n vectors are sorted into sqrt(probes * n) cells, so all parts but the first grow as n^1.5 at last;
the last line extrapolates to 10^9 by that. If faiss is installed, its range_search is timed on the largest cell. On the
first number of rows, the search is compared with SemDeDup (Abbas et al., arXiv:2303.09540) as published: k-means with
as many clusters, all cosines within a cluster, and a sample is dropped if a sample of its cluster that is further from
the centre is too similar.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from time import process_time

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # before NumPy is imported

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

from dedup import jpeg, looked_at, tiles

from pipeline.curation.duplicates import Links, decide, forest, links, members, rows, units
from pipeline.curation.semantic import (
    ITERATIONS,
    PER_CELL,
    Block,
    Vectors,
    by_cell,
    cells_for,
    centres,
    linked,
    nearest,
)

REPEATS = 5
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
    for start, stop, tenth in parts(count):
        part = themes[rng.integers(0, 200, stop - start)]
        part += rng.standard_normal((stop - start, width), np.float32)
        noise = rng.standard_normal((tenth, width), np.float32)
        part[:tenth] = part[tenth : 2 * tenth] + 0.3 * noise
        found[start:stop] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return found


def planted(count: int) -> np.ndarray:
    """The near duplicates in :func:`simulated`, pairs (n, 2)."""
    first = np.concatenate([np.arange(start, start + tenth) for start, _, tenth in parts(count)])
    return np.stack([first, first + np.concatenate([np.full(tenth, tenth) for *_, tenth in parts(count)])], 1)


def parts(count: int) -> list[tuple[int, int, int]]:
    """Where each begins and ends, and how many near duplicates are in it."""
    starts = range(0, count, 1 << 16)
    return [(start, stop, (stop - start) // 10) for start in starts for stop in [min(count, start + (1 << 16))]]


def cost(count: int, width: int, probes: int, seconds: float) -> float:
    """CPU seconds of the whole search, of which the comparisons are measured for ``seconds``."""
    vectors, cosine = simulated(count, width), 0.95
    cells = cells_for(count, probes, count)
    begin = process_time()
    middle = centres(vectors[: PER_CELL * cells], cells)
    trained = process_time() - begin
    begin = process_time()
    ordered = by_cell(np.arange(count), vectors, nearest(vectors, middle, 1 + probes), len(middle))
    sorting = process_time() - begin
    done = 0
    begin = process_time()
    for cell in np.random.default_rng(0).permutation(len(middle)).tolist():
        own, visitors = blocks(ordered, cell)
        linked(own, own, cosine)
        linked(own, visitors, cosine)
        done += 1
        if process_time() - begin > seconds:
            break
    comparing = (process_time() - begin) / done * len(middle)
    total = trained + sorting + comparing
    print(
        f"{count:>10} vectors, {len(middle):>6} cells: centres {trained:.1f} s, sorting {sorting:.1f} s, comparing "
        f"{comparing:.1f} s ({done} cells measured), together {total:.0f} s",
        flush=True,
    )
    beside_faiss(blocks(ordered, int((ordered.starts[1::2] - ordered.starts[:-1:2]).argmax()))[0], cosine)
    return total


def beside_semdedup(count: int, width: int, probes: int) -> None:
    """Which of the planted duplicates this search and SemDeDup find, and what each takes in all."""
    vectors, cosine = simulated(count, width), 0.95
    pairs = planted(count)
    begin = process_time()
    stars = search(vectors, cosine, probes)
    ours = process_time() - begin
    group = np.arange(count)
    group[stars[:, 1]] = stars[:, 0]
    begin = process_time()
    goes = semdedup(vectors, cosine, cells_for(count, probes, count))
    theirs = process_time() - begin
    found = (group[pairs[:, 0]] == group[pairs[:, 1]]).mean()
    gone = goes[pairs].any(1).mean()
    print(f"{'':>10} planted duplicates found: {found:.2%} in {ours:.1f} s, by SemDeDup {gone:.2%} in {theirs:.1f} s")
    print(f"{'':>10} samples that go: {len(stars)}, by SemDeDup {goes.sum()}")


def semdedup(vectors: Vectors, cosine: float, clusters: int) -> np.ndarray:
    """Which samples go, bool (n,), by SemDeDup with spherical k-means on all samples."""
    unit = vectors.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    middle = unit[np.random.default_rng(0).choice(len(unit), clusters, replace=False)]
    for _ in range(ITERATIONS):
        cluster = np.concatenate([(unit[at : at + 8192] @ middle.T).argmax(1) for at in range(0, len(unit), 8192)])
        for number in range(clusters):
            total = unit[cluster == number].sum(0)
            if length := np.linalg.norm(total):
                middle[number] = total / length
    goes = np.zeros(len(unit), bool)
    for number in range(clusters):
        mine = np.flatnonzero(cluster == number)
        mine = mine[np.argsort(unit[mine] @ middle[number], kind="stable")]  # the furthest from the centre stays
        similar = np.triu(unit[mine] @ unit[mine].T, 1)
        goes[mine] = similar.max(0, initial=0) >= cosine
    return goes


def beside_faiss(block: Block, cosine: float) -> None:
    try:
        import faiss
    except ImportError:
        print(f"{'':>10} without faiss, which is not installed")
        return
    faiss.omp_set_num_threads(1)
    times = {}
    for name in ("ours", "theirs"):
        begin = process_time()
        for _ in range(REPEATS):
            if name == "ours":
                linked(block, block, cosine)
            else:
                index = faiss.IndexFlatIP(block.unit.shape[1])
                index.add(block.unit)
                index.range_search(block.unit, cosine)
        times[name] = (process_time() - begin) / REPEATS
    print(
        f"{'':>10} a cell of {len(block.places)}: {times['ours']:.4f} s, range_search of faiss {times['theirs']:.4f} s",
        flush=True,
    )


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "photos" in options:
        cosines = [float(text) for text in options.get("cosines", "0.9,0.95,0.98").split(",")]
        quality(options["photos"], options.get("model", "embedded"), int(options.get("count", 2000)), cosines)
    elif "rows" in options:
        counts = [int(text) for text in options["rows"].split(",")]
        settings = int(options.get("width", 512)), int(options.get("probes", 2)), float(options.get("seconds", 60))
        took = [cost(count, *settings) for count in counts]
        beside_semdedup(counts[0], *settings[:2])
        if len(counts) > 1:
            power = np.log(took[-1] / took[-2]) / np.log(counts[-1] / counts[-2])
            hours = took[-1] * (1e9 / counts[-1]) ** 1.5 / 3600
            print(
                f"grows as n^{power:.2f} between the last two; with n^1.5 from there, 10^9 take {hours:.0f} CPU hours"
            )
    else:
        print("photos=<folder>, or rows=<numbers>: see the top of this file")


if __name__ == "__main__":
    main()
