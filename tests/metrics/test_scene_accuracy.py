"""The judge of drawn scenes: right on real images, unmoved by anything that is not one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.encoders.base import autoencoder, to_pixels
from pipeline.metrics.scene_accuracy import judge, matches, score
from pipeline.sources.shapes_scene import BACKGROUND, COLOURS, caption, render, sample_scene

EDGE = 64
Picture = np.ndarray
Points = list[tuple[float, float]]


@cache
def real(count: int, objects: int = 1) -> tuple[list[Picture], list[str]]:
    drawn = [sample_scene(77, index, objects, holdout=False) for index in range(count)]
    return [render(scene, EDGE) for scene in drawn], [caption(scene) for scene in drawn]


def decoded(pictures: list[Picture]) -> list[Picture]:
    """Through the autoencoder that the demo trains on, with the precision that latents are stored in."""
    vae = autoencoder("embedded16")
    return list(to_pixels(vae.decode(vae.encode(vae.preprocess(pictures, EDGE)).half())))


def right(pictures: list[Picture], captions: list[str], size: bool = False) -> int:
    return sum(matches(picture, text, size) for picture, text in zip(pictures, captions, strict=True))


def test_real_pictures_are_recognised() -> None:
    pictures, captions = real(500)
    assert right(pictures, captions, size=True) >= 495


def test_real_pictures_of_two_objects_are_recognised() -> None:
    pictures, captions = real(100, objects=2)
    assert right(pictures, captions) >= 99


@pytest.mark.parametrize("edge", [32, 128, 200])
def test_pictures_of_other_sizes_are_recognised(edge: int) -> None:
    drawn = [sample_scene(5, index) for index in range(20)]
    assert right([render(scene, edge) for scene in drawn], [caption(scene) for scene in drawn], size=True) >= 19


@pytest.mark.parametrize(("objects", "count"), [(1, 96), (2, 64)])
def test_decoded_latents_of_real_pictures_are_recognised(objects: int, count: int) -> None:
    pictures, captions = real(count, objects)
    assert right(decoded(pictures), captions, size=objects == 1) >= count * 31 / 32


def test_places_and_the_order_of_two_objects_are_reported() -> None:
    scene = sample_scene(3, 11, objects=2)
    verdict = judge(render(scene, EDGE))
    assert verdict.accepted and verdict.relation == scene.relation
    for found, thing in zip(verdict.objects, scene.things, strict=True):
        assert found[:3] == (thing.shape, thing.colour, "")
        assert found[3:] == pytest.approx((thing.cx, thing.cy), abs=0.01)


def test_pictures_of_other_prompts_match_by_chance_alone() -> None:
    """18 pairs of colour and shape: 13 of 240 by chance (standard deviation 3.5)."""
    pictures, captions = real(240)
    rolled = captions[1:] + captions[:1]
    expected = sum(a.split()[2:] == b.split()[2:] for a, b in zip(captions, rolled, strict=True))
    assert 3 < expected < 24
    assert right(pictures, rolled) == expected


def test_a_caption_of_another_relation_order_or_size_does_not_match() -> None:
    picture = render(sample_scene(0, 0), EDGE)
    text = caption(sample_scene(0, 0))
    other = text.replace("small", "large") if "small" in text else text.replace("large", "small")
    assert matches(picture, text, size=True) and matches(picture, other) and not matches(picture, other, size=True)
    scene = sample_scene(3, 11, objects=2)
    first, second = (f"a {thing.colour} {thing.shape}" for thing in scene.things)
    others = [
        f"{second} {scene.relation} {first}",
        f"{first} {'above' if scene.relation != 'above' else 'left of'} {second}",
    ]
    assert not any(matches(render(scene, EDGE), text) for text in others)
    with pytest.raises(ValueError, match="is not a caption of a shapes scene"):
        matches(picture, "an image of a cat")


# ---- what is not a scene


def polygon(points: Points, colour: tuple[int, int, int]) -> Picture:
    """Points are fractions of the edge."""
    fine = 8 * EDGE
    image = Image.new("RGB", (fine, fine), BACKGROUND)
    ImageDraw.Draw(image).polygon([(x * fine, y * fine) for x, y in points], fill=colour)
    return np.asarray(image.resize((EDGE, EDGE), Image.Resampling.BOX))


def regular(corners: int, turn: float = 0.0, stretch: float = 1.0, radius: float = 0.22) -> Points:
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    x, y = radius * np.cos(angles) * stretch**0.5, radius * np.sin(angles) / stretch**0.5
    return [(0.5 + float(a), 0.5 + float(b)) for a, b in zip(x, y, strict=True)]


def blob(random: np.random.Generator) -> Points:
    """A circle whose radius varies by tens of percents."""
    angles = np.linspace(0, 2 * np.pi, 80)
    waves = random.uniform(0.1, 0.2, 3) * np.cos(np.outer(angles, [2, 3, 4]) + random.uniform(0, 6.3, 3))
    radius = 0.2 * (1 + waves.sum(1))
    return [(0.5 + float(r * np.cos(a)), 0.5 + float(r * np.sin(a))) for r, a in zip(radius, angles, strict=True)]


FIGURES: dict[str, Callable[[np.random.Generator], Points]] = {
    "diamond": lambda random: regular(4),
    "tilted square": lambda random: regular(4, turn=np.pi / 4 + random.uniform(0.3, 0.5)),
    "triangle upside down": lambda random: regular(3, turn=np.pi / 2),
    "triangle on its side": lambda random: regular(3),
    "pentagon": lambda random: regular(5, turn=-np.pi / 2),
    "ellipse": lambda random: regular(60, stretch=random.uniform(1.35, 2)),
    "rectangle": lambda random: regular(4, turn=np.pi / 4, stretch=random.uniform(1.3, 2)),
    "star": lambda random: [
        p for a, b in zip(regular(5), regular(5, np.pi / 5, radius=0.1), strict=True) for p in (a, b)
    ],
    "half circle": lambda random: [(x, min(y, 0.5)) for x, y in regular(60)],
    "blob": blob,
    "bar": lambda random: regular(4, turn=np.pi / 4, stretch=8),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_other_figures_are_not_accepted(figure: str) -> None:
    random = np.random.default_rng(0)
    pictures = [polygon(FIGURES[figure](random), rgb) for rgb in COLOURS.values() for _ in range(3)]
    assert sum(judge(picture).accepted for picture in pictures) == 0


@pytest.mark.parametrize("rgb", [(0, 0, 0), (128, 128, 128), (120, 200, 220), (255, 120, 200), (90, 60, 30)])
def test_other_colours_are_not_accepted(rgb: tuple[int, int, int]) -> None:
    verdict = judge(polygon(regular(60), rgb))
    assert not verdict.accepted and verdict.reason == "colour"


def garbage() -> Iterator[tuple[str, Picture]]:
    random = np.random.default_rng(1)
    for grey in (0, 128, 244, 255):
        yield "blank", np.full((EDGE, EDGE, 3), grey, np.uint8)
    y, x = np.indices((EDGE, EDGE)) / EDGE - 0.5
    for rgb in COLOURS.values():
        yield "other background", np.where((np.hypot(x, y) < 0.2)[..., None], rgb, (30, 30, 40)).astype(np.uint8)
        for width in (0.08, 0.14, 0.2):
            fog = np.exp(-(x * x + y * y) / (2 * width**2))[..., None]
            yield "fog", (np.array(BACKGROUND) + fog * (np.array(rgb) - BACKGROUND)).astype(np.uint8)
        disc = polygon(regular(60, radius=0.25), rgb)
        yield "ring", np.where((np.hypot(x, y) < 0.12)[..., None], np.uint8(BACKGROUND), disc).astype(np.uint8)
        yield "touching", np.minimum(disc, np.roll(disc, 16, axis=1))
        yield "noisy", np.clip(disc + random.normal(0, 60, disc.shape), 0, 255).astype(np.uint8)
        yield "tiny", polygon(regular(60, radius=0.05), rgb)
        yield "huge", polygon(regular(60, radius=0.4), rgb)
        yield (
            "three",
            np.minimum.reduce(
                [polygon([(a + dx, b) for a, b in regular(60, radius=0.1)], rgb) for dx in (-0.3, 0, 0.3)]
            ),
        )
    for _ in range(10):
        yield "noise", random.integers(0, 256, (EDGE, EDGE, 3)).astype(np.uint8)
        yield "speckles", np.clip(BACKGROUND + random.normal(0, 40, (EDGE, EDGE, 3)), 0, 255).astype(np.uint8)


def test_garbage_is_not_accepted() -> None:
    assert [name for name, picture in garbage() if judge(picture).accepted] == []


def test_latents_of_noise_or_of_a_shuffled_picture_are_not_accepted() -> None:
    import torch

    vae = autoencoder("embedded16")
    random = torch.Generator().manual_seed(0)
    latents = vae.encode(vae.preprocess(real(24)[0], EDGE))
    shuffled = latents.flatten(2)[:, :, torch.randperm(64, generator=random)].view_as(latents)
    noise = latents.mean((0, 2, 3), keepdim=True) + torch.randn(latents.shape, generator=random)
    pictures = to_pixels(vae.decode(torch.cat([shuffled, noise])))
    assert sum(judge(picture).accepted for picture in pictures) == 0


def test_the_mean_of_two_pictures_is_not_accepted() -> None:
    pictures = [render(sample_scene(5, index), EDGE).astype(int) for index in range(30)]
    means = [((a + b) // 2).astype(np.uint8) for a, b in zip(pictures[:15], pictures[15:], strict=True)]
    accepted = [judge(mean).accepted for mean in means]
    assert sum(accepted) == 0


def test_the_score_counts_and_says_what_was_wrong() -> None:
    pictures, captions = real(20)
    blank = np.full((EDGE, EDGE, 3), 244, np.uint8)
    result = score([*pictures[:19], blank], captions)
    assert result["right"] == 19 and result["judged"] == 20
    assert result["rejected"] == {"0 objects": 1}
    assert result["wrong"] == [captions[19]]


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 107)])
@pytest.mark.parametrize("objects", [1, 2])
def test_scenes_on_canvases_of_any_shape_are_told_from_one_another(size: tuple[int, int], objects: int) -> None:
    drawn = [sample_scene(7, index, objects, holdout=False) for index in range(12)]
    pictures = [render(scene, size) for scene in drawn]
    assert {picture.shape for picture in pictures} == {(*size, 3)}
    assert sum(matches(p, caption(s), size=objects == 1) for p, s in zip(pictures, drawn, strict=True)) >= 11
    texts = [caption(scene) for scene in drawn]
    others = [(p, other) for p, own in zip(pictures, texts, strict=True) for other in texts if other != own]
    told = [(p, other) for p, other in others if objects == 2]  # of one object another size may be drawn
    assert not any(matches(p, other) for p, other in told)
    for scene, picture in zip(drawn, pictures, strict=True):
        for thing, (_, _, _, cx, cy) in zip(scene.things, judge(picture).objects, strict=False):
            assert abs(cx - thing.cx) < 0.03 and abs(cy - thing.cy) < 0.03
