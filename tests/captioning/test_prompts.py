"""Prompts with fields of a sample."""

from __future__ import annotations

import pytest

from pipeline.captioning.prompts import check, fields_of, filled
from pipeline.config.schema import ConfigError
from pipeline.samples import SampleError


def test_fields_are_filled_in() -> None:
    row = {"class_name": "dog", "label": 3, "captions": ["a dog", "a {label}"], "tags": {"b": 1, "a": [2]}}
    assert filled("What does the {class_name} ({label}) do? {{{captions}}}", row) == (
        "What does the dog (3) do? {a dog; a {label}}"
    )
    assert filled("{tags}", row) == '{"a": [2], "b": 1}'


def test_names_of_fields() -> None:
    assert fields_of("Describe {a} and {{b}} and {c}.") == ["a", "c"]


@pytest.mark.parametrize("prompt", ["a {", "a } b", "{}", "{a{b}"])
def test_braces_without_a_partner_are_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="alone; write"):
        check(prompt, ["a", "b"])


def test_unknown_fields_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="no column clas; they have class, caption"):
        check("a {clas}", ["class", "caption"])


@pytest.mark.parametrize("value", [None, "", []])
def test_a_sample_without_a_value_has_no_prompt(value: object) -> None:
    with pytest.raises(SampleError, match="no_prompt_field: it has no title"):
        filled("What is {title}?", {"title": value})
