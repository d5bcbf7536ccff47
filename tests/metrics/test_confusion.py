"""Which classes are taken for which others."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from pipeline.metrics.confusion import confused_pairs, confusion_svg

CONFUSION = np.array([[8, 2, 0], [0, 5, 5], [1, 0, 9]])
NAMES = ["cat", "dog", "a <horse> & more"]


def test_the_commonest_mistakes_come_first() -> None:
    pairs = [(pair["label"], pair["predicted"], pair["count"]) for pair in confused_pairs(CONFUSION, NAMES)]
    assert pairs == [("dog", NAMES[2], 5), ("cat", "dog", 2), (NAMES[2], "cat", 1)]
    assert confused_pairs(CONFUSION, NAMES)[0]["share"] == 0.5
    assert confused_pairs(np.diag([3, 4]), ["a", "b"]) == []


def test_the_picture_is_svg_with_every_cell_named() -> None:
    svg, left_out = confusion_svg(CONFUSION, NAMES)
    root = ElementTree.fromstring(svg)
    titles = [title.text for title in root.iter("title")]
    assert len(titles) == 9 and "dog predicted as a <horse> & more: 5 (50.0 %)" in titles
    assert left_out == 0


def test_of_many_classes_those_with_the_most_mistakes_are_drawn() -> None:
    confusion = np.diag(np.full(60, 9))
    confusion[50, 51] = 3
    svg, left_out = confusion_svg(confusion, [f"class {number}" for number in range(60)])
    assert left_out == 20 and "class 50 predicted as class 51: 3 (25.0 %)" in svg
