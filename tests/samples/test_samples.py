"""What samples are made of: captions, fields and labels as datasets have them."""

from __future__ import annotations

import datetime
import decimal
import json
from typing import Any

import numpy as np
import pytest

from pipeline.samples import SampleError, caption_fields, image_format, label_of, plain
from pipeline.samples.captions import captions_of, repaired


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        (float("nan"), []),
        (3, []),
        (True, []),
        ("", []),
        (" \n", []),
        ("a", ["a"]),
        (b"caf\xc3\xa9", ["café"]),
        (b"caf\xe9", ["caf\ufffd"]),
        ("cut \ud83d", ["cut \ufffd"]),
        ("whole \ud83d\ude00", ["whole \U0001f600"]),
        (["a", None, 3, "b"], ["a", "b"]),
        (("a", ["b"]), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.str_("a"), ["a"]),
        ({"caption": "x"}, ["x"]),
        ({"captions": None, "Text": "x"}, ["x"]),
        ([{"raw": "x"}, {"raw": "y"}], ["x", "y"]),
        ({"other": "x"}, []),
        (datetime.datetime(2020, 1, 1), []),
    ],
)
def test_captions_are_texts_and_nothing_is_invented(value: Any, expected: list[str]) -> None:
    assert captions_of(value) == expected
    assert caption_fields(value) == {"caption": expected[0] if expected else "", "captions": expected}


def test_a_value_nested_without_end_is_no_caption_and_no_field() -> None:
    nested: Any = "x"
    for _ in range(100):
        nested = [nested]
    assert captions_of(nested) == []
    with pytest.raises(SampleError, match="bad_field: nested"):
        plain(nested)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("half \ud83d", "half \ufffd"),
        (float("nan"), None),
        (float("inf"), "inf"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (datetime.timedelta(seconds=1.5), 1.5),
        (decimal.Decimal("1.10"), "1.10"),
        (b"text", "text"),
        (np.float32(0.5), 0.5),
        (np.arange(2), [0, 1]),
        ({1: {"\ud83d": [b"x"]}}, {"1": {"\ufffd": ["x"]}}),
    ],
)
def test_fields_are_what_json_in_utf8_can_hold(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    json.dumps(plain(value), ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("value", [b"\xff\xfe", object(), [{"x": b"\xff"}]])
def test_a_field_that_has_no_form_in_json_fails_its_sample(value: Any) -> None:
    with pytest.raises(SampleError, match="bad_field"):
        plain(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), (np.int64(3), 3), (3.0, 3), ("7", 7), (b"7\n", 7), (True, 1), (None, None), ("", None), (np.nan, None)],
)
def test_labels_are_numbers_of_classes(value: Any, expected: int | None) -> None:
    assert label_of(value) == expected


@pytest.mark.parametrize("value", ["cat", 1.5, -1, float("inf"), 2**70, [1], np.array([1, 2]), {"a": 1}])
def test_what_is_no_number_of_a_class_fails_its_sample(value: Any) -> None:
    with pytest.raises(SampleError, match="bad_label"):
        label_of(value)


def test_texts_that_are_fine_stay_as_they_are() -> None:
    assert repaired("Grün 👩‍💻 \x00") == "Grün 👩‍💻 \x00"


@pytest.mark.parametrize(
    ("name", "expected"), [("a.JPG", "jpeg"), ("a.b.jfif", "jpeg"), ("a.jp2", "jpeg2000"), ("jpg", ""), ("a.txt", "")]
)
def test_a_name_promises_a_format(name: str, expected: str) -> None:
    assert image_format(name) == expected
