"""Duplicates are found, others are left alone, and which one stays does not depend on their order."""

from __future__ import annotations

import random
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipeline.curation.duplicates import TABLES, Unit, decide, forest, links, members, rows, units
from pipeline.imaging.phash import phash
from pipeline.imaging.transform import Rules, process, resize
from pipeline.samples import content_hash

UNIQUE, EXACT, NEAR = 17_000, 1_500, 1_500


def picture(number: int) -> Image.Image:
    """One of any number of different images, whose detail falls off with its fineness as that of photos does."""
    rng = np.random.default_rng(number)
    scale = 1 / (1 + np.hypot(*np.meshgrid(np.arange(12), np.arange(12))))
    waves = np.cos(np.pi * (np.arange(48) + 0.5)[:, None] / 48 * np.arange(12))  # (48, 12)
    planes = np.stack([waves @ (rng.normal(size=(12, 12)) * scale) @ waves.T for _ in range(3)], -1)
    return Image.fromarray((128 + 40 * planes).clip(0, 255).astype(np.uint8)).resize((96, 80), Image.Resampling.BICUBIC)


def hash_of(image: Image.Image) -> str:
    return phash(resize(np.asarray(image), (32, 32)))


def reworked(image: Image.Image, rng: random.Random) -> Image.Image:
    """Cropped by up to 2 % at each edge, resized, and compressed again."""
    width, height = (4 * edge for edge in image.size)
    left, top, right, bottom = (rng.uniform(0, 0.02) for _ in range(4))
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    size = (rng.randint(60, 140), rng.randint(50, 120))
    file = BytesIO()
    image.resize((width, height)).resize(size, Image.Resampling.BICUBIC, box).save(
        file, "JPEG", quality=rng.randint(60, 95)
    )
    return Image.open(file).convert("RGB")


Sample = tuple[str, str, str, int]
"""Key, hash of the bytes, perceptual hash, pixels."""


def duplicates(samples: list[Sample], hamming: int, memory: int = 2**30) -> dict[str, tuple[str, str]]:
    """Key of each that goes → why, and the key of the one that stays."""
    keys, content, looks, pixels = map(list, zip(*samples, strict=True))
    hashes = [content_hash(text.encode()) if text else "" for text in content]
    table = rows(hashes, looks, pixels, np.arange(len(keys)))
    pieces = [table[: len(table) // 3], table[len(table) // 3 :]]
    stars = forest(links(pieces, unit, len(table), hamming) for unit in units(len(table), hamming, memory))
    chosen = members(stars)
    by_key = np.argsort(np.argsort(np.array(keys)[chosen]))
    found = decide(stars, table[chosen], by_key)
    return {
        keys[place]: ("duplicate" if exact else "near_duplicate", keys[other])
        for place, exact, other in zip(found.places, found.exact, found.stays, strict=True)
    }


@pytest.fixture(scope="module")
def planted() -> list[Sample]:
    """20,000 samples: u<number> are different, e<number> have the bytes of u<number>, n<number> look like u<number>."""
    rng = random.Random(0)
    samples = [(f"u{n:05d}", f"hash{n}", hash_of(picture(n)), 1000) for n in range(UNIQUE)]
    samples += [(f"e{n:05d}", f"hash{n}", samples[n][2], 1000) for n in range(EXACT)]
    for n in range(EXACT, EXACT + NEAR):
        samples.append((f"n{n:05d}", f"other{n}", hash_of(reworked(picture(n), rng)), 900))
    rng.shuffle(samples)
    return samples


def test_planted_duplicates_are_found_and_nothing_else(planted: list[Sample]) -> None:
    goes = duplicates(planted, hamming=20)
    exact = {key: found for key, found in goes.items() if found[0] == "duplicate"}
    near = {key: found for key, found in goes.items() if found[0] == "near_duplicate"}
    assert {key: other for key, (_, other) in exact.items()} == {f"u{n:05d}": f"e{n:05d}" for n in range(EXACT)}
    right = {key: other for key, (_, other) in near.items() if key[0] == "n" and other == "u" + key[1:]}
    assert len(right) >= 0.95 * NEAR, len(right)
    assert len(right) >= 0.99 * len(near), (len(right), len(near))


def test_the_order_of_the_samples_does_not_matter(planted: list[Sample]) -> None:
    some = [sample for sample in planted if int(sample[0][1:]) % 8 == 0]
    assert duplicates(some, 20) == duplicates(sorted(some), 20) != {}


def test_the_memory_that_may_be_taken_does_not_matter(planted: list[Sample]) -> None:
    some = [sample for sample in planted if int(sample[0][1:]) % 8 == 0]
    assert len(units(len(some), 20, 2**16)) > 3 * TABLES
    assert duplicates(some, 20, 2**16) == duplicates(some, 20)


def test_what_came_first_stays() -> None:
    table = rows(["aa" * 16] * 3, [""] * 3, [5, 9, 7], [10, 11, 12])
    stars = links([table], Unit(-1, 0, 1), 3, -1)
    found = decide(stars, table, np.arange(3), np.array([0, 1, 1]))
    assert (found.places.tolist(), found.stays.tolist()) == ([11, 12], [10, 10])


def test_only_exact_ones_on_demand(planted: list[Sample]) -> None:
    found = duplicates(planted, hamming=-1)
    assert Counter(reason for reason, _ in found.values()) == {"duplicate": EXACT}


def test_most_pixels_stay_then_the_smallest_key() -> None:
    a, b = "00" * 16, "01" * 16
    samples = [
        ("b", "x", a, 10),
        ("a", "x", a, 10),
        ("c", "y", a, 20),
        ("d", "z", b, 5),
        ("e", "w", "", 5),
        ("f", "", "", 1),
    ]
    assert duplicates(samples, 0) == {"a": ("near_duplicate", "c"), "b": ("near_duplicate", "c")}
    assert duplicates(samples, -1) == {"b": ("duplicate", "a")}


def test_chains_are_one_group() -> None:
    hashes = [(2**n - 1).to_bytes(16, "big").hex() for n in range(0, 40, 4)]
    samples = [(f"k{n}", str(n), text, n) for n, text in enumerate(hashes)]
    assert duplicates(samples, 4) == {f"k{n}": ("near_duplicate", "k9") for n in range(9)}


def test_near_duplicates_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 256, (300, 16), np.uint8)
    words[200:] = words[:100]
    for row in range(200, 300):
        for bit in rng.choice(128, row % 14 + 1, replace=False):
            words[row, bit // 8] ^= 1 << bit % 8
    table = rows([""] * 300, [word.tobytes().hex() for word in words], np.ones(300), np.arange(300))
    found = forest(links([table], unit, 300, 14) for unit in units(300, 14, 2**30))
    bits = np.unpackbits(words, axis=1).astype(int)
    apart = (bits[:, None] != bits[None]).sum(-1)
    assert found.tolist() == forest([np.argwhere(apart <= 14)]).tolist()


def test_a_hash_survives_what_the_filter_does_to_a_picture() -> None:
    image = picture(1).resize((960, 800), Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, "JPEG", quality=80)
    original = np.frombuffer(bytes.fromhex(hash_of(image)), np.uint8)
    for rules in (Rules(0, 0), Rules(0, 64), Rules(0, 64, "border"), Rules(0, 64, "center_crop"), Rules(0, 300)):
        found = np.frombuffer(bytes.fromhex(process(file.getvalue(), rules).phash), np.uint8)
        assert np.unpackbits(found ^ original).sum() <= 4
    assert not process(file.getvalue(), Rules(0, 0, validate="header")).phash


def test_a_blank_picture_is_like_no_other() -> None:
    assert hash_of(Image.new("RGB", (64, 64), "white")) == ""
