"""Captioned scenes of simple shapes: a small grammar, its captions, and a renderer for any size.

A scene has one object with a size ("a small red circle") or two with a relation ("a red circle above a blue square").
The only relations are "above" and "left of", with the upper or left object named first, so that each caption has one
meaning and each meaning one caption ("A below B" would say the same as "B above A").

Shapes are rendered from their signed distances with NumPy only, so that images are the same on every platform and do
not depend on the version of a drawing library. Small and large shapes of all kinds cover the same area.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.randomness import uniforms

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 20),
    "purple": (140, 50, 170),
    "orange": (250, 130, 20),
}
SIZES = ("small", "large")
RELATIONS = ("above", "left of")
BACKGROUND = (244, 244, 240)

HOLDOUT = (("purple", "circle"), ("orange", "square"), ("blue", "triangle"))
"""Pairs of colour and shape left out of training data, to test unseen combinations. Each colour and each shape occurs
in other pairs."""

# Lengths are fractions of the image's shorter edge. ``radius`` is that of the circle of the same area.
_RADIUS = {"small": (0.14, 0.16), "large": (0.235, 0.255), "": (0.11, 0.13)}
_JITTER = 6 / 64  # maximum displacement of a single object in each direction
_PAIR_OFFSET, _PAIR_JITTER = 0.22, 0.03
_SQUARE = math.sqrt(math.pi) / 2  # half edge of the square with the area of the unit circle
_TRIANGLE = math.sqrt(4 * math.pi / (3 * math.sqrt(3)))  # circumradius of the equilateral triangle with that area

_OBJECT = rf"a (?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?")


@dataclass(frozen=True)
class Thing:
    """One object; ``size`` is empty in scenes of two.

    ``cx``, ``cy`` (of the centroid; y points down) are fractions of the image's width and height, ``radius`` of its
    shorter edge.
    """

    shape: str
    colour: str
    size: str
    cx: float = 0.5
    cy: float = 0.5
    radius: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One object, or two where the first is ``relation`` ("above", "left of") the second."""

    things: tuple[Thing, ...]
    relation: str = ""


def sample_scene(seed: int, index: int, objects: int = 1, holdout: bool = True) -> Scene:
    """Scene ``index`` of the dataset ``seed``; it depends only on the arguments.

    Args:
        objects: 1, 2, or 0 for one or two with equal chances.
        holdout: leave out the pairs of colour and shape in :data:`HOLDOUT`.
    """
    if objects not in (0, 1, 2):
        raise ValueError(f"objects={objects}: expected 1, 2, or 0 for both kinds")
    u = uniforms(16, seed, "scene", index).tolist()
    pairs = seen_pairs() if holdout else all_pairs()
    first = pairs[int(u[1] * len(pairs))]
    count = objects or 1 + int(u[0] * 2)
    if count == 1:
        return Scene((_placed(first, SIZES[int(u[2] * 2)], (0.5, 0.5), _JITTER, u[3:6]),))
    others = [pair for pair in pairs if pair != first]
    second = others[int(u[2] * len(others))]
    relation = RELATIONS[int(u[6] * 2)]
    dx, dy = (0.0, _PAIR_OFFSET) if relation == "above" else (_PAIR_OFFSET, 0.0)
    return Scene(
        (
            _placed(first, "", (0.5 - dx, 0.5 - dy), _PAIR_JITTER, u[7:10]),
            _placed(second, "", (0.5 + dx, 0.5 + dy), _PAIR_JITTER, u[10:13]),
        ),
        relation,
    )


def all_pairs() -> list[tuple[str, str]]:
    """All pairs (colour, shape)."""
    return [(colour, shape) for colour in COLOURS for shape in SHAPES]


def seen_pairs() -> list[tuple[str, str]]:
    """All pairs (colour, shape) that are not held out."""
    return [pair for pair in all_pairs() if pair not in HOLDOUT]


def _placed(pair: tuple[str, str], size: str, centre: tuple[float, float], jitter: float, u: list[float]) -> Thing:
    colour, shape = pair
    low, high = _RADIUS[size]
    cx, cy = (c + jitter * (2 * v - 1) for c, v in zip(centre, u[:2], strict=True))
    return Thing(shape, colour, size, cx, cy, low + (high - low) * u[2])


def caption(scene: Scene) -> str:
    """The scene in words."""
    return f" {scene.relation} ".join(
        " ".join(word for word in ("a", thing.size, thing.colour, thing.shape) if word) for thing in scene.things
    )


def questions(scene: Scene) -> list[list[str]]:
    """Questions about the scene with their answers."""
    if scene.relation:
        first, second = scene.things
        where = {"above": ("above", "below"), "left of": ("left", "right")}[scene.relation]
        pairs = [
            [f"what is {place}?", f"a {t.colour} {t.shape}"] for place, t in zip(where, (first, second), strict=True)
        ]
    else:
        (thing,) = scene.things
        pairs = [
            [f"what colour is the {thing.shape}?", thing.colour],
            [f"what is {thing.colour}?", f"a {thing.shape}"],
            [f"how large is the {thing.shape}?", thing.size],
        ]
    return [*pairs, ["how many objects are there?", "one" if len(scene.things) == 1 else "two"]]


def parse_caption(text: str) -> Scene | None:
    """The scene that ``text`` describes (without positions and radii); None if it does not match the grammar."""
    found = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if found is None:
        return None
    size, colour, shape, relation, size2, colour2, shape2 = (group or "" for group in found.groups())
    first = Thing(shape, colour, size)
    return Scene((first, Thing(shape2, colour2, size2)), relation) if relation else Scene((first,))


def single_captions(held_out: bool) -> list[str]:
    """Captions of all single objects whose pair of colour and shape is (or is not) in :data:`HOLDOUT`."""
    return [f"a {size} {colour} {shape}" for colour, shape in (HOLDOUT if held_out else seen_pairs()) for size in SIZES]


def fixed_prompts(count: int = 32, objects: int = 1) -> list[str]:
    """Fixed prompts for evaluating a model: every single object in the training data, repeated as needed.

    With two objects: distinct captions, sampled like those of the training data.
    """
    if objects == 2:
        drawn = (caption(sample_scene(-1, index, 2)) for index in range(16 * count))
        return list(dict.fromkeys(drawn))[:count]
    captions = single_captions(held_out=False)
    return [captions[i % len(captions)] for i in range(count)]


def unseen_prompts(objects: int = 1) -> list[str]:
    """Prompts with combinations that never occur in training data; of two objects, one is held out."""
    singles = single_captions(held_out=True)
    if objects == 1:
        return singles
    scenes = (sample_scene(-2, index, 2, holdout=False) for index in range(1000))
    captions = [caption(s) for s in scenes if sum((t.colour, t.shape) in HOLDOUT for t in s.things) == 1]
    return list(dict.fromkeys(captions))[:16]


def render(scene: Scene, size: int | tuple[int, int]) -> npt.NDArray[Any]:
    """The image of ``scene``: uint8 (h, w, 3), RGB, edges antialiased over one pixel.

    Args:
        size: (h, w), or the edge of a square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    edge = min(height, width)
    image = np.broadcast_to(np.asarray(BACKGROUND, np.float64), (height, width, 3)).copy()
    for thing in scene.things:
        place = (thing.cx * width, thing.cy * height, thing.radius * edge)
        cover = coverage(thing.shape, *place, (height, width))[..., None]
        image += cover * (np.asarray(COLOURS[thing.colour], np.float64) - image)
    found: npt.NDArray[Any] = np.floor(image + 0.5).astype(np.uint8)
    return found


def coverage(
    shape: str, cx: float, cy: float, radius: float, shape_px: tuple[int, int], soft: float = 1.0
) -> npt.NDArray[Any]:
    """How much of each pixel a shape covers: float64 (h, w) in [0, 1].

    Args:
        cx, cy: centroid in pixels from the upper left corner of the image.
        radius: radius of the circle of the same area, in pixels.
        shape_px: (h, w).
        soft: width of the edge in pixels; 1 is antialiasing, larger values blur the edge.
    """
    x = (np.arange(shape_px[1]) + 0.5 - cx)[None, :]
    y = (np.arange(shape_px[0]) + 0.5 - cy)[:, None]
    if shape == "circle":
        inside = radius - np.sqrt(x * x + y * y)
    elif shape == "square":
        inside = radius * _SQUARE - np.maximum(np.abs(x), np.abs(y))
    elif shape == "triangle":  # pointing up; the centroid is half the circumradius from each edge
        slanted = math.sqrt(3) / 2 * np.abs(x) - 0.5 * y
        inside = radius * _TRIANGLE / 2 - np.maximum(y, slanted)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    cover: npt.NDArray[Any] = np.clip(0.5 + inside / soft, 0.0, 1.0)
    return cover
