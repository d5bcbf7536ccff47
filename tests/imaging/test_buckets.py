"""The rule of aspect-ratio buckets, against its definition."""

from __future__ import annotations

import math
from itertools import product

import pytest

from pipeline.config.schema import ConfigError
from pipeline.imaging.buckets import Buckets, Runs, covering, kept_fraction

SETTINGS = [(64, 16, 2.0), (96, 8, 1.5), (256, 64, 2.0), (512, 64, 3.0), (1024, 64, 2.0), (100, 16, 4.0)]


def allowed(resolution: int, step: int, ratio: float) -> set[tuple[int, int]]:
    edges = range(step, 5 * resolution, step)
    return {(h, w) for h, w in product(edges, edges) if h * w <= resolution**2 and max(h, w) <= ratio * min(h, w)}


@pytest.mark.parametrize("settings", SETTINGS)
def test_buckets_are_the_allowed_sizes_that_no_other_contains(settings: tuple[int, int, float]) -> None:
    found, sizes = Buckets(*settings), allowed(*settings)
    assert set(found.allowed) == sizes
    assert list(found.sizes) == sorted(
        (h, w) for h, w in sizes if not any(other != (h, w) and other[0] >= h and other[1] >= w for other in sizes)
    )
    assert {(w, h) for h, w in found.sizes} == set(found.sizes)


def test_the_buckets_of_1024_are_those_of_sdxl_between_its_ratios_of_1_and_2() -> None:
    published = {(1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1344, 768), (1408, 704)}
    assert published <= set(Buckets(1024).sizes)


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_image_goes_to_the_nearest_bucket_in_log_aspect_ratio(settings: tuple[int, int, float]) -> None:
    buckets = Buckets(*settings)
    for height, width in product((1, 37, 480, 999, 1080, 4000), (1, 64, 333, 1000, 1920)):
        h, w = buckets.size_of(height, width) or (0, 0)
        distances = {s: abs(math.log(s[1] / s[0]) - math.log(width / height)) for s in buckets.sizes}
        assert distances[(h, w)] <= min(distances.values()) + 1e-12
        if height != width:
            assert buckets.size_of(width, height) == (w, h)


def test_ties_go_to_the_larger_area_then_to_the_squarer_then_to_the_taller() -> None:
    flat = Buckets(56, 16, 2.0)  # 48 x 64 and 64 x 48, but no square that neither contains
    assert flat.sizes == ((48, 64), (64, 48)) and flat.size_of(10, 10) == (64, 48)
    assert Buckets(100, 16, 4.0).size_of(10, 30) == (64, 144)  # as near as 48 x 192, and of the same area


def test_images_that_would_be_enlarged_go_to_smaller_buckets_or_to_none() -> None:
    smaller, none = (Buckets(256, 64, 2.0, upscale=upscale) for upscale in ("smaller", "false"))
    assert Buckets(256).size_of(100, 150) == (192, 320)
    assert smaller.size_of(100, 150) == (64, 128) and smaller.size_of(63, 600) is None
    assert none.size_of(100, 150) is None and none.size_of(192, 320) == (192, 320) == smaller.size_of(192, 320)
    for height, width in product(range(1, 400, 23), range(1, 400, 23)):
        size = smaller.size_of(height, width)
        fits = [(h, w) for h, w in smaller.allowed if h <= height and w <= width]
        assert (size is None and not fits) or size in fits


def test_a_resized_image_covers_its_bucket_with_its_ratio_kept_to_within_a_pixel() -> None:
    for source, size in product(product((1, 30, 999, 4000), repeat=2), Buckets(512).sizes):
        height, width = covering(source, size)
        assert height >= size[0] and width >= size[1] and (height == size[0] or width == size[1])
        scale = max(size[0] / source[0], size[1] / source[1])
        assert 0 <= scale * source[0] - height < 1 + 1e-9 and 0 <= scale * source[1] - width < 1 + 1e-9
        part = size[0] * size[1] / (scale * source[0] * scale * source[1])
        assert kept_fraction(source, size) == pytest.approx(part)


def test_a_place_lies_within_the_image_and_random_ones_are_keyed() -> None:
    central, random = Buckets(256), Buckets(256, crop="random")
    place = central.place_of(100, 300, 0, "a")
    assert place and (place.size, place.top, place.left) == ((192, 320), 0, (576 - 320) // 2)
    places = [random.place_of(100, 300, seed, key) for seed in (0, 1) for key in "abcdefgh"]
    assert places == [random.place_of(100, 300, seed, key) for seed in (0, 1) for key in "abcdefgh"]
    lefts = {place.left for place in places if place}
    assert len(lefts) > 8 and min(lefts) >= 0 and max(lefts) <= 256 and {p.top for p in places if p} == {0}


def test_what_a_manifest_says_of_buckets_makes_them_again() -> None:
    buckets = Buckets(96, 16, 1.5, "smaller", "random")
    described = buckets.describe()
    assert Buckets.of(described) == buckets and described["sizes"] == [list(size) for size in buckets.sizes]


def test_a_resolution_without_any_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_resolutions=32: no size .* give a smaller bucket_step="):
        Buckets(32, 64)


def test_runs_tell_the_buckets_of_samples_in_order() -> None:
    runs = Runs({"latents_64": Buckets(64, 16), "latents_128": Buckets(128, 16)})
    for size in [(10, 10), (30, 30), (10, 19), (20, 38), (10, 10)]:
        runs.add(*size)
    assert runs.runs == [[[[64, 64], [128, 128]], 2], [[[48, 80], [96, 160]], 2], [[[64, 64], [128, 128]], 1]]
