"""Conditions: what they allow, what they mean, and that nothing in them is ever run."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config.options import ConfigError
from pipeline.curation.expressions import Threshold, parse
from pipeline.curation.order_statistics import order_statistics, word_statistics

COLUMNS = {
    "a": np.array([1.0, 2.0, np.nan, 4.0]),
    "b": np.array([4.0, 3.0, 2.0, 0.0]),
    "language": np.array(["en", None, "de", "fr"], object),
}


def holds(text: str, **values: float) -> list[bool]:
    found = np.ones(4, bool)
    for condition in parse(text):
        found &= condition.holds(COLUMNS, values)
    return found.tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a > 1", [0, 1, 0, 1]),
        ("not a > 1", [1, 0, 0, 0]),
        ("a != 1", [0, 1, 0, 1]),
        ("1 < a <= 4", [0, 1, 0, 1]),
        ("a > 1 or b >= 2", [1, 1, 1, 1]),
        ("a > 1 and b >= 2", [0, 1, 0, 0]),
        ("not (a > 1 and b >= 2)", [1, 0, 0, 1]),
        ("a + b == 5", [1, 1, 0, 0]),
        ("a / b > 3", [0, 0, 0, 0]),
        ("abs(a - b) >= 3", [1, 0, 0, 1]),
        ("-a < -1", [0, 1, 0, 1]),
        ("language == 'en'", [1, 0, 0, 0]),
        ("language != 'en'", [0, 0, 1, 1]),
        ("language in ['en', 'de']", [1, 0, 1, 0]),
        ("language not in ('en', 'de')", [0, 0, 0, 1]),
        ("b in [0, 2]", [0, 0, 1, 1]),
        ("missing(a) or a > 3", [0, 0, 1, 1]),
        ("", [1, 1, 1, 1]),
    ],
)
def test_what_an_expression_means(text: str, expected: list[int]) -> None:
    assert holds(text) == [bool(one) for one in expected]


def test_thresholds_are_named_and_looked_up() -> None:
    (first, second) = parse("a >= q50 and top(b, 0.5)")
    assert first.thresholds == (Threshold("a", 0.5),) and second.thresholds == (Threshold("b", 0.5, top=True),)
    assert holds("a >= q50 and top(b, 0.5)", **{"q(a, 0.5)": 2.0, "top(b, 0.5)": 3.0}) == [False, True, False, False]
    assert [Threshold("a", share).rank(10) for share in (0.0, 0.1, 0.11, 0.5, 1.0)] == [0, 0, 1, 4, 9]
    assert [Threshold("a", share, True).rank(10) for share in (0.1, 0.3, 1.0)] == [9, 7, 0]


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a >",
        "1 > 0",
        "a > 1 > ",
        "__import__('os').system('true') > 0",
        "a.__class__ == 1",
        "a[0] > 1",
        "(lambda: a)() > 1",
        "[a for a in b] == 1",
        "a ** 9999999 > 1",
        "a is 1",
        "a > True",
        "f'{a}' == 'x'",
        "(a := 1) > 0",
        "a > q10 + 1",
        "3 > q10",
        "top(a, 2)",
        "top(a + b, 0.1)",
        "missing(a + 1)",
        "a in b",
        "a + (b > 1) > 2",
        "not a",
        "a and b > 1",
        "open('x') > 1",
        "a > 1" + " and a > 1" * 2000,
        "(" * 90 + "a > 1" + ")" * 90 + " or " + "not " * 60 + "a > 1",
        "a > 1; b",
        "a > b'x'",
        "a > 1j",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="where="):
        parse(text)


@pytest.mark.parametrize("text", ["language > 1", "a == 'x'", "language + 1 > 2", "a in ['x']"])
def test_texts_and_numbers_are_not_mixed(text: str) -> None:
    with pytest.raises(ConfigError, match="text"):
        holds(text)


def test_order_statistics_are_those_of_the_sorted_numbers() -> None:
    random = np.random.default_rng(0)
    numbers = np.concatenate([random.normal(size=3000), [np.nan] * 5, [0.0, -0.0, np.inf, -np.inf, 1e-310] * 20])
    pieces = np.array_split(random.permutation(numbers), 7)
    expected = np.sort(numbers[~np.isnan(numbers)])
    ranks = [0, 1, 20, 1500, 1501, len(expected) - 1]
    found = order_statistics(lambda: pieces, lambda count: ranks if count == len(expected) else [])
    assert found == expected[ranks].tolist()
    assert order_statistics(lambda: [np.array([np.nan])], lambda count: [0]) == []
    words = random.integers(0, 2**64, 1000, np.uint64)
    assert word_statistics(lambda: [words], lambda count: [10, 999]) == np.sort(words)[[10, 999]].tolist()
