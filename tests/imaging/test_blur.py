"""Boxes of an image are blurred, and nothing else of it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.imaging import transform
from pipeline.imaging.blur import blurred, boxes_of, packed, unpacked
from pipeline.imaging.headers import ImageError
from pipeline.imaging.worker_protocol import answer, answer_with_boxes, understood, with_boxes

NOISE = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
BOX = ((0.25, 0.25, 0.5, 0.5),)


def test_what_is_in_a_box_is_blurred_and_what_is_far_from_it_is_not() -> None:
    found = blurred(NOISE, BOX)
    assert found[35:55, 45:75].std() < 0.1 * NOISE.std()
    assert np.array_equal(found[90:], NOISE[90:]) and np.array_equal(found[:, 120:], NOISE[:, 120:])
    assert found.shape == NOISE.shape and found.dtype == np.uint8


@pytest.mark.parametrize("box", [(-0.5, -0.5, 0.1, 0.1), (0.9, 0.9, 2.0, 2.0), (0, 0, 1, 1), (0.5, 0.5, 0.5, 0.5)])
def test_boxes_may_reach_beyond_the_image_and_have_no_area(box: tuple[float, float, float, float]) -> None:
    assert blurred(NOISE, (box,)).shape == NOISE.shape


def test_no_boxes_change_nothing() -> None:
    data = transform.encode(NOISE, "png")
    rules = transform.Rules(min_image_size=0)
    for boxes in ((), ((1.5, 1.5, 2.0, 2.0),)):
        assert np.array_equal(blurred(NOISE, boxes), NOISE)
    found = with_boxes(answer_with_boxes(packed((), data), rules), packed((), data))
    assert found == understood(answer(data, rules), data) and found.data == data  # type: ignore[union-attr]


def test_boxes_lie_on_the_image_as_it_is_seen_whatever_its_size_becomes() -> None:
    rules = transform.Rules(min_image_size=0, max_image_size=60, encode_format="png")
    found = transform.process(transform.encode(NOISE, "png"), rules, boxes=BOX)
    small = transform.decode(found.data, transform.probe(found.data, transform.Limits()))
    assert (found.width, found.height) == (80, 60)
    assert small[18:27, 23:37].std() < 0.3 * small[45:].std()


def test_a_task_holds_boxes_and_image() -> None:
    assert unpacked(packed(BOX * 3, b"image")) == (BOX * 3, b"image")


def test_a_worker_cannot_say_that_a_boxed_image_passed_untouched() -> None:
    data = transform.encode(NOISE, "png")
    said = answer(data, transform.Rules(min_image_size=0))
    with pytest.raises(ValueError, match="not blurred"):
        with_boxes(said, packed(BOX, data))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no_boxes"),
        ("null", "no_boxes"),
        ("[[0, 0, 1", "bad_boxes"),
        ("[" * 100_000, "bad_boxes"),
        ({"left": 0}, "bad_boxes"),
        ([[0, 0, 1]], "bad_boxes"),
        ([0, 0, 1, 1], "bad_boxes"),
        ([[0, 0, 1, float("nan")]], "bad_boxes"),
        ([[10, 10, 200, 220]], "bad_boxes"),  # pixels
        ([[0.5, 0, 0.1, 1]], "bad_boxes"),
        ([["0", 0, 1, 1]], "bad_boxes"),
    ],
)
def test_what_is_no_list_of_boxes_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        boxes_of(value)
    assert caught.value.reason == reason


def test_boxes_come_as_lists_or_as_json() -> None:
    assert boxes_of([[0.25, 0.25, 0.5, 0.5]]) == boxes_of("[[0.25, 0.25, 0.5, 0.5]]") == BOX
    assert boxes_of([]) == boxes_of("[]") == ()
