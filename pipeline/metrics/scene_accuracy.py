"""Checks whether an image shows what its caption describes, for :mod:`pipeline.sources.shapes_scene`; uses only numpy.

Objects are the regions that differ from the background. A template of every shape is fitted to each object (place,
radius, colour and softness of the edge are free), and the best one is chosen. As the best fit alone would call one blob
in three a circle, there are absolute criteria: the template must explain almost all of the difference from the
background, the colour must be close to one of the palette, and background and radius must be those of a scene. An image
that fails any of these is not accepted and matches nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.sources.shapes_scene import BACKGROUND, COLOURS, SHAPES, Scene, Thing, coverage, parse_caption

MAX_RESIDUAL = 0.04
"""Largest fraction of the difference from the background (its energy) that may remain unexplained.

At 64 px, sharp images of the shapes leave at most 0.003; their latents decoded by ``embedded16`` 0.03 (one object) or
0.042 (two). Fitted as a circle, a sharp pentagon leaves 0.043, an ellipse of 1.2 to 1 0.05, a diamond 0.09. A hexagon
leaves 0.026 and passes as a circle.
"""
_MIN_MARGIN = 1.5  # the second best shape must leave at least this many times as much unexplained
_MAX_COLOUR_DISTANCE = 60.0  # in RGB, 0..255; different colours of the palette are more than 70 apart
_MAX_BACKGROUND_DISTANCE = 40.0
_DIFFERENT = 80.0  # RGB distance from the background that makes a pixel part of an object; colours are 200 away
_MIN_AREA = 0.008  # as a fraction of the image; the smallest objects cover 0.038
_RADII = (0.09, 0.28)
_LARGE = 0.195  # radius between small and large
_EDGE = 1 / 16  # widest soft edge of a template, relative; at 64 px, renders have 1 px, decoded latents 2 or 3


@dataclass(frozen=True)
class Verdict:
    """What an image shows.

    Attributes:
        objects: (shape, colour, size, cx, cy) each, in the order of a caption: the upper or left one first; positions
            are fractions of width and height.
        relation: between two objects, else "".
        residual: fraction that remains unexplained; 0 is perfect.
        accepted: whether all absolute criteria are met.
        reason: the first criterion that is not.
    """

    objects: tuple[tuple[str, str, str, float, float], ...]
    residual: float
    accepted: bool
    relation: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Fit:
    """A template fitted to one object; lengths in pixels."""

    shape: str
    residual: float
    cx: float
    cy: float
    radius: float
    colour: npt.NDArray[Any]


def judge(image: npt.NDArray[Any]) -> Verdict:
    """Describe ``image``, uint8 (h, w, 3) RGB, at least 32 px along its shorter edge."""
    edge = min(image.shape[:2])
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    if np.linalg.norm(background - BACKGROUND) > _MAX_BACKGROUND_DISTANCE:
        return Verdict((), 1.0, False, reason="background")
    difference = pixels - background
    places = _objects(np.sqrt((difference**2).sum(-1)) > _DIFFERENT)
    if len(places) not in (1, 2):
        return Verdict((), 1.0, False, reason=f"{len(places)} objects")
    fits = []
    reasons = []
    for cut in _cut_apart(difference, places):
        ranked = sorted((_fitted(shape, cut) for shape in SHAPES), key=lambda fit: fit.residual)
        fits.append(ranked[0])
        reasons.append(_complaint(ranked[0], ranked[1], background, edge))
    residual = max(fit.residual for fit in fits)
    reason = next((reason for reason in reasons if reason), "")
    things = [_named(fit, background, image.shape[:2], single=len(fits) == 1) for fit in fits]
    things, relation = _in_order(things)
    if len(things) == 2 and not relation:
        reason = reason or "relation"
    objects = tuple((t.shape, t.colour, t.size, t.cx, t.cy) for t in things)
    return Verdict(objects, residual, not reason, relation, reason)


def matches(image: npt.NDArray[Any], caption: str, size: bool = False) -> bool:
    """Whether ``image`` is accepted and shows the ``caption``: shapes, colours and relation; with ``size``, also sizes.

    Raises:
        ValueError: the caption does not conform to the grammar.
    """
    return matches_verdict(judge(image), caption, size)


def matches_verdict(verdict: Verdict, caption: str, size: bool = False) -> bool:
    """Like :func:`matches`, for an image that has been judged already."""
    wanted = parse_caption(caption)
    if wanted is None:
        raise ValueError(f"{caption!r} is not a caption of a shapes scene")
    return verdict.accepted and _agrees(verdict, wanted, size)


def _agrees(verdict: Verdict, wanted: Scene, size: bool) -> bool:
    if len(verdict.objects) != len(wanted.things) or verdict.relation != wanted.relation:
        return False
    for (shape, colour, found_size, _, _), thing in zip(verdict.objects, wanted.things, strict=True):
        if (shape, colour) != (thing.shape, thing.colour) or (size and found_size != thing.size):
            return False
    return True


def _objects(mask: npt.NDArray[Any]) -> list[tuple[float, float]]:
    """Centroids (x, y), in pixels, of the connected parts of ``mask`` (h, w) that are not tiny."""
    rest = mask.copy()
    centroids = []
    while rest.any():
        part = _connected(rest)
        rest &= ~part
        if part.sum() >= _MIN_AREA * mask.size:
            y, x = np.nonzero(part)
            centroids.append((float(x.mean()) + 0.5, float(y.mean()) + 0.5))
        if len(centroids) > 2:
            break
    return centroids


def _connected(mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The component of ``mask`` that is connected (by edges) to its first pixel."""
    part = np.zeros_like(mask)
    part.flat[int(np.argmax(mask))] = True
    count = 0
    while (now := int(part.sum())) != count:
        count = now
        grown = part.copy()
        grown[1:] |= part[:-1]
        grown[:-1] |= part[1:]
        grown[:, 1:] |= part[:, :-1]
        grown[:, :-1] |= part[:, 1:]
        part = grown & mask
    return part


def _cut_apart(difference: npt.NDArray[Any], places: list[tuple[float, float]]) -> list[npt.NDArray[Any]]:
    """For each object, a copy of ``difference`` (h, w, 3) that is zero where another object is closer."""
    y, x = np.indices(difference.shape[:2]) + 0.5
    distances = np.stack([np.hypot(x - cx, y - cy) for cx, cy in places])
    nearest = distances.argmin(0)
    return [np.where((nearest == number)[..., None], difference, 0.0) for number in range(len(places))]


def _fitted(shape: str, difference: npt.NDArray[Any]) -> _Fit:
    """Fit a template of ``shape`` to ``difference`` (h, w, 3) by coordinate descent, starting from its moments."""
    h, w = difference.shape[:2]
    energy = (difference**2).sum(-1)
    strength = np.sqrt(energy)
    strength = np.clip(strength / np.percentile(strength[strength > _DIFFERENT], 75), 0.0, 1.0)
    strength[strength < 0.2] = 0.0
    y, x = np.indices((h, w)) + 0.5
    area = strength.sum()
    best = [
        float((x * strength).sum() / area),
        float((y * strength).sum() / area),
        math.sqrt(area / math.pi),
        _EDGE / 2 * min(h, w),
    ]
    residual, colour = _residual(shape, best, difference, energy.sum())
    step = 0.03 * min(h, w)
    while step > 0.003 * min(h, w):
        improved = False
        for axis in range(len(best)):
            for sign in (-1.0, 1.0):
                trial = best.copy()
                trial[axis] += sign * step
                left, its_colour = _residual(shape, trial, difference, energy.sum())
                if left < residual:
                    best, residual, colour, improved = trial, left, its_colour, True
        step = step if improved else step / 2
    return _Fit(shape, residual, best[0], best[1], best[2], colour)


def _residual(
    shape: str, place: list[float], difference: npt.NDArray[Any], energy: float
) -> tuple[float, npt.NDArray[Any]]:
    """Fraction of ``energy`` that the template leaves, and its colour (minus the background) by least squares.

    ``place``: x and y of the centroid, radius, and width of the soft edge, in pixels.
    """
    h, w = difference.shape[:2]
    soft = min(max(place[3], 1.0), max(_EDGE * min(h, w), 1.0))
    cover = coverage(shape, place[0], place[1], max(place[2], 0.5), (h, w), soft)
    weight = (cover**2).sum()
    if weight < 1e-9:
        return 1.0, np.zeros(3)
    product = np.tensordot(cover, difference, axes=([0, 1], [0, 1]))
    return float(1.0 - (product**2).sum() / (weight * energy)), product / weight


def _nearest_colour(colour: npt.NDArray[Any]) -> tuple[str, float]:
    """The nearest colour of the palette, and its RGB distance."""
    distances = {name: float(np.linalg.norm(colour - np.asarray(rgb))) for name, rgb in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def _complaint(fit: _Fit, second: _Fit, background: npt.NDArray[Any], edge: int) -> str:
    """The first absolute criterion that ``fit`` does not meet, or ""."""
    if fit.residual > MAX_RESIDUAL:
        return "residual"
    if second.residual < _MIN_MARGIN * fit.residual:
        return "ambiguous shape"
    if _nearest_colour(fit.colour + background)[1] > _MAX_COLOUR_DISTANCE:
        return "colour"
    if not _RADII[0] <= fit.radius / edge <= _RADII[1]:
        return "radius"
    return ""


def _named(fit: _Fit, background: npt.NDArray[Any], canvas: tuple[int, ...], single: bool) -> Thing:
    height, width = canvas
    edge = min(canvas)
    size = ("large" if fit.radius / edge > _LARGE else "small") if single else ""
    colour = _nearest_colour(fit.colour + background)[0]
    return Thing(fit.shape, colour, size, fit.cx / width, fit.cy / height, fit.radius / edge)


def _in_order(things: list[Thing]) -> tuple[list[Thing], str]:
    """Objects in the order of a caption, and the relation; "" if they lie neither above nor next to each other."""
    if len(things) == 1:
        return things, ""
    first, second = things
    dx, dy = abs(first.cx - second.cx), abs(first.cy - second.cy)
    if max(dx, dy) < 2 * min(dx, dy):
        return things, ""
    if dy > dx:
        return sorted(things, key=lambda thing: thing.cy), "above"
    return sorted(things, key=lambda thing: thing.cx), "left of"


def score(images: Sequence[npt.NDArray[Any]], captions: Sequence[str], size: bool = False) -> dict[str, Any]:
    """Count images that match their captions.

    Returns:
        ``judged``, ``right``; ``rejected``: number of images that were not accepted, by reason; ``wrong``: captions of
        images that do not match; ``residual``: the median.
    """
    verdicts = [judge(image) for image in images]
    right = [matches_verdict(v, text, size) for v, text in zip(verdicts, captions, strict=True)]
    return {
        "judged": len(right),
        "right": sum(right),
        "rejected": dict(Counter(verdict.reason for verdict in verdicts if not verdict.accepted)),
        "wrong": [text for text, is_right in zip(captions, right, strict=True) if not is_right],
        "residual": round(float(np.median([verdict.residual for verdict in verdicts])), 4) if verdicts else None,
    }
