"""How much planted junk curation by pipeline/conf/recipe/curate.yaml finds, and how many good images it loses.

    apt-get install tuxpaint-stamps-default mate-backgrounds
    python benchmarks/curation.py [stamps=/usr/share/tuxpaint/stamps] [photos=/usr/share/backgrounds/mate] [seed=0]
                                  [keep=<folder>]

Good images are Tux Paint's stamps on white, with their English captions, and crops of the photos. Some of them are
turned into junk: blurred, combined into collages, or given a bad caption (a file name, repeated keywords, another
language). Pages of text and copies of good images (smaller, brighter, cropped at the edges, saved again) are added.
Then stage=filter,dedup,score,select runs, and its ledgers are compared with what was planted. With keep=, the folder is
kept: <folder>/images and <folder>/data.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.config import cli
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.stages import get_stage

EDGE = 640  # longer edge of the images
SHARE = 0.05  # fraction of the good images that becomes junk of each kind
SMALLEST = 64  # minimum shorter edge of a stamp
TILES = (3, 2)  # crops of a photo, across and down

STAMPS = """
    sharpness / contrast / contrast > 800 and seam < 0.97 and
    not (flat_share > 0.65 and sharpness > 1500 and colourfulness < 15 and contrast < 0.22 and border > 0.1) and
    caption_repetition < 0.5 and caption_nonwords <= 0.5 and (language == 'en' or language_probability < 0.8)
"""
"""Conditions for drawings and cut-out objects on white; the recipe's own are for photos."""


@dataclass
class Example:
    """An image with its caption and kind: ``good``, or a kind of junk."""

    name: str
    image: Image.Image
    caption: str
    kind: str = "good"


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    stamps = Path(given.get("stamps", "/usr/share/tuxpaint/stamps"))
    photos = Path(given.get("photos", "/usr/share/backgrounds/mate"))
    if not (stamps.is_dir() and photos.is_dir()):
        print("skipped: apt-get install tuxpaint-stamps-default mate-backgrounds")
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(given.get("keep") or scratch).absolute()
        (place / "images").mkdir(parents=True)
        where = f"select.where={' '.join(STAMPS.split())}"
        for name, found, own in (("stamps", stamps_in(stamps), [where]), ("photos", photos_in(photos), [])):
            kinds = plant(list(found), place / "images" / name, np.random.default_rng(int(given.get("seed", 0))))
            begin = perf_counter()
            said = curated(place / "images" / name, place / "data", name, own)
            tell(name, kinds, said, perf_counter() - begin)


# ---- good images


def stamps_in(folder: Path) -> Iterator[Example]:
    """Stamps with an English caption, on white, without icons."""
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if path.stem.endswith(("_mirror", "_flip")) or not text.is_file():
            continue
        caption = text.read_text(encoding="utf-8").splitlines()[0].strip()
        image = Image.open(path).convert("RGBA")
        if min(image.size) < SMALLEST:
            continue
        white = Image.new("RGBA", image.size, "white")
        yield Example(str(path.relative_to(folder))[:-4], _bounded(Image.alpha_composite(white, image)), caption)


def photos_in(folder: Path) -> Iterator[Example]:
    """Crops of photos, each photo in only one of its sizes."""
    seen = set()
    for path in sorted(folder.rglob("*.jpg")):
        title = path.stem.partition("_")[0]
        if title in seen or path.is_symlink() or path.parent.name != "nature":
            continue
        seen.add(title)
        image = Image.open(path).convert("RGB")
        width, height = image.width // TILES[0], image.height // TILES[1]
        for number in range(TILES[0] * TILES[1]):
            left, top = number % TILES[0] * width, number // TILES[0] * height
            cut = image.crop((left, top, left + width, top + height))
            yield Example(f"{path.stem}/{number}", _bounded(cut), f"Part {number + 1} of a photo: {_words(title)}")


def _words(name: str) -> str:
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def _bounded(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((EDGE, EDGE))
    return image


# ---- junk


def plant(examples: list[Example], folder: Path, random: np.random.Generator) -> dict[str, str]:
    """Write the examples with junk among them; returns key → kind."""
    order = random.permutation(len(examples))
    count = max(3, round(SHARE * len(examples)))
    spent = iter(order)
    made: list[Example] = []
    for kind, change in JUNK.items():
        made += [change(examples[next(spent)], random, kind) for _ in range(count)]
    for number in range(count):
        made.append(_collage([examples[next(spent)] for _ in range(4 if number % 2 else 2)], number))
    good = [examples[number] for number in spent]
    made += [_page(number, random, [example.caption for example in examples]) for number in range(count)]
    for number in range(count):
        made.append(_copy(good[number], number))
    kinds = {}
    for number, example in enumerate([*good, *made]):
        path = folder / f"{number:05d}.{'png' if example.kind == 'page' else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        example.image.save(path, **({} if path.suffix == ".png" else {"quality": 92}))
        path.with_suffix(".txt").write_text(example.caption, encoding="utf-8")
        kinds[path.name.replace(".", "-")] = example.kind
    return kinds


def _blurred(example: Example, random: np.random.Generator, kind: str) -> Example:
    radius = max(3.0, max(example.image.size) * random.uniform(0.012, 0.03))
    return Example(example.name, example.image.filter(ImageFilter.GaussianBlur(radius)), example.caption, kind)


def _file_name(example: Example, random: np.random.Generator, kind: str) -> Example:
    return Example(example.name, example.image, f"IMG_{random.integers(1000, 9999)}.JPG", kind)


def _keywords(example: Example, random: np.random.Generator, kind: str) -> Example:
    phrase = str(random.choice(["best free wallpaper hd", "buy cheap clip art online", "download image now"]))
    return Example(example.name, example.image, " ".join([phrase] * random.integers(4, 9)), kind)


def _foreign(example: Example, random: np.random.Generator, kind: str) -> Example:
    texts = ["Ein Bild, das wir auf unserer Reise im letzten Sommer aufgenommen haben.",
             "Une photo que nous avons prise pendant notre voyage de l'été dernier.",
             "Фотография, которую мы сделали прошлым летом во время поездки.",
             "Una foto che abbiamo fatto durante il nostro viaggio l'estate scorsa."]  # fmt: skip
    return Example(example.name, example.image, str(random.choice(texts)), kind)


JUNK: dict[str, Callable[[Example, np.random.Generator, str], Example]] = {
    "blurred": _blurred,
    "file name as caption": _file_name,
    "keywords as caption": _keywords,
    "caption of another language": _foreign,
}


def _collage(parts: list[Example], number: int) -> Example:
    """Two images side by side, or four in a square, with lines in between: on white always, else every third time."""
    white = all(part.image.getpixel((0, 0)) == (255, 255, 255) for part in parts)
    across, down, line = 2, len(parts) // 2, 6 * (white or number % 3 == 0)
    edge = EDGE // 2
    canvas = Image.new("RGB", (across * edge, down * edge), "#333333" if number % 2 else "black")
    for place, part in enumerate(parts):
        cell = part.image.resize((edge - line, edge - line))
        canvas.paste(cell, (place % across * edge + line // 2, place // across * edge + line // 2))
    return Example("collage", canvas, parts[0].caption, "collage")


def _page(number: int, random: np.random.Generator, captions: list[str]) -> Example:
    """A screenshot of text, light or dark, in one or two columns."""
    paper, ink = [("white", "black"), ("#1e1e1e", "#d4d4d4"), ("#fdf6e3", "#586e75"), ("#f5f5f5", "#222266")][
        number % 4
    ]
    page = Image.new("RGB", (EDGE, int(EDGE * random.uniform(0.6, 1.4))), paper)
    draw, size = ImageDraw.Draw(page), int(random.integers(12, 22))
    font, columns = ImageFont.load_default(size), 1 + number % 2
    text = " ".join(captions[i] for i in random.permutation(len(captions))[:80])
    lines = iter(textwrap.wrap(text, int(EDGE / columns / size * 1.7)))
    for column in range(columns):
        for top in range(size, page.height - size, int(size * 1.4)):
            draw.text((size + column * EDGE // columns, top), next(lines, ""), ink, font)
    return Example("page", page, captions[int(random.integers(len(captions)))], "page of text")


def _copy(example: Example, number: int) -> Example:
    """Another copy of an image: smaller, brighter, cropped at the edges, or saved again."""
    image = example.image
    if number % 4 == 0:
        image = image.resize((max(32, image.width * 2 // 3), max(32, image.height * 2 // 3)))
    elif number % 4 == 1:
        image = ImageEnhance.Brightness(image).enhance(1.1)
    elif number % 4 == 2:
        image = image.crop((2, 2, image.width - 2, image.height - 2))
    return Example(example.name, image, example.caption, "copy")


# ---- curation


def curated(images: Path, data: Path, name: str, conditions: list[str]) -> dict[str, str]:
    """The outcome of each file: key → ``kept``, or the reason."""
    recipe = "curate"
    common = [f"data_dir={data}", "dataset=image_folder", f"variant={name}"]
    settings = {
        "download": [f"input={images}", "captions=txt"],
        "filter": [f"input={data}/image_folder/train/download-{name}", "min_image_size=24"],
        "dedup": [f"input={data}/image_folder/train/filter-{name}", f"curation={recipe}"],
        "score": [f"input={data}/image_folder/train/dedup-{name}", f"curation={recipe}"],
        "select": [f"input={data}/image_folder/train/score-{name}", f"curation={recipe}", *conditions],
    }
    said: dict[str, str] = {}
    for stage, own in settings.items():
        made = get_stage(stage)(cli.load(stage, [*common, *own]), Rank())
        engine.run(made)
        dataset = Dataset.open(made.output)
        for index in range(dataset.partitions):
            for row in SlotReader(dataset, index).ledger(["key", "outcome", "reason"]).to_pylist():
                said[row["key"]] = "kept" if row["outcome"] == "kept" else row["reason"]
    return said


def tell(name: str, kinds: dict[str, str], said: dict[str, str], seconds: float) -> None:
    """Print the fractions of junk that was found and of good images that were lost, with the reasons."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    copies = {key for key, kind in kinds.items() if kind == "copy"}
    lost_for_copy = sum(kinds[key] == "good" and "duplicate" in what for key, what in said.items())
    for key, kind in kinds.items():
        reasons[kind][said[key]] += 1
    writer = csv.writer(sys.stdout)
    print(f"{name}: {len(kinds)} images in {seconds:.1f} s")
    writer.writerow(["kind", "images", "left out", "share", "reasons"])
    for kind, counts in reasons.items():
        total, out = counts.total(), counts.total() - counts["kept"]
        if kind == "copy":  # of two copies, either may be kept
            out = min(total, out + lost_for_copy)
        if kind == "good":
            out -= min(lost_for_copy, len(copies))
        told = ", ".join(f"{why} {n}" for why, n in counts.most_common() if why != "kept")
        writer.writerow([kind, total, out, f"{out / total:.3f}", told])
    junk = [kind for kind in reasons if kind not in ("good", "copy")]
    total = sum(reasons[kind].total() for kind in junk) + len(copies)
    found = total - sum(reasons[kind]["kept"] for kind in junk) - max(0, reasons["copy"]["kept"] - lost_for_copy)
    good = reasons["good"]
    lost = good.total() - good["kept"] - min(lost_for_copy, len(copies))
    print(f"{name}: planted junk found {found / total:.1%}, good images lost {lost / good.total():.1%}")


if __name__ == "__main__":
    main()
