"""Patches of an image encoder: whole ones, of just the part of an image that latents are made of."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.encoders.crop import BucketCrop, Crop, PatchCrop
from pipeline.imaging.buckets import Buckets
from pipeline.imaging.patches import PatchGrid, grids_in


@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("patch", [14, 16])
def test_a_patch_for_each_token_of_the_latents_fits_every_bucket(resolution: int, patch: int) -> None:
    grid = PatchGrid(resolution, resolution // 16 * patch, patch)
    for height, width in Buckets(resolution).sizes:
        assert grid.shape((height, width)) == (height // 16, width // 16)
        assert grid.pixels((height, width)) == (height // 16 * patch, width // 16 * patch)


def test_other_sizes_are_rounded_to_whole_patches() -> None:
    grid = PatchGrid(256, 224, 16)
    assert grid.count() == 14 * 14 and grid.shape((256, 256)) == (14, 14)
    assert grid.shape((192, 320)) == (11, 18), "10.5 and 17.5: halves are rounded up"
    assert PatchGrid(256, 14, 14).shape((64, 1024)) == (1, 4), "0.25: there is one at least"
    assert grids_in({"image_features": {"patches": {"image_features_256": grid.describe()}}}) == {
        "image_features_256": grid
    }
    assert grids_in({}) == {}


@pytest.mark.parametrize(
    "latents", [Crop(64), BucketCrop(Buckets(64, 16)), BucketCrop(Buckets(64, 16, crop="random"), seed=3)], ids=str
)
@pytest.mark.parametrize("source", [(90, 60), (60, 100), (64, 64), (48, 80), (131, 40)])
@pytest.mark.parametrize("edge", [32, 64, 80])
def test_patches_show_what_the_latents_show(latents: Crop | BucketCrop, source: tuple[int, int], edge: int) -> None:
    """Of an image whose red and green say where a pixel is, both crops have the same corners and the same centre."""
    down, across = np.meshgrid(*(np.linspace(20, 235, n) for n in source), indexing="ij")
    image = np.stack([down, across, np.full(source, 128.0)], -1).round().astype(np.uint8)
    crop = PatchCrop(latents, PatchGrid(64, edge, 8))
    one, two = (found.astype(float) for found in (latents.cut(image, "key"), crop.cut(image, "key")))
    assert two.nbytes / 8 <= crop.bytes and all(size % 8 == 0 for size in two.shape[:2])
    for seen in (one, two):
        seen[..., 0] *= source[0] / 215
        seen[..., 1] *= source[1] / 215
    middle = [found.mean((0, 1))[:2] for found in (one, two)]
    assert np.abs(middle[0] - middle[1]).max() < 0.5, "pixels of the source"
    spans = [np.ptp(found, (0, 1))[:2] * found.shape[:2] / (np.array(found.shape[:2]) - 1) for found in (one, two)]
    assert np.abs(spans[0] - spans[1]).max() < 2.5
