"""Prompts that contain fields of the sample: ``What is a {class_name} doing here?``"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.config.schema import ConfigError
from pipeline.samples import SampleError
from pipeline.samples.captions import repaired

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_BRACES = {"{{": "{", "}}": "}"}


def fields_of(prompt: str) -> list[str]:
    """The names of the fields in ``prompt``.

    Raises:
        ConfigError: a brace is not matched; write ``{{`` and ``}}`` for literal braces.
    """
    names = []
    for match in _FIELD.finditer(prompt):
        if match[0] in "{}" or match[1] == "":
            raise ConfigError(f"caption_prompt={prompt}: a {match[0]} alone; write {{{{ and }}}} for literal braces")
        if match[1]:
            names.append(match[1])
    return names


def check(prompt: str, columns: Collection[str]) -> None:
    """Raise ConfigError if a field is not in ``columns``."""
    for name in fields_of(prompt):
        if name not in columns:
            raise ConfigError(f"caption_prompt={prompt}: samples have no column {name}; they have {', '.join(columns)}")


def filled(prompt: str, row: Mapping[str, Any]) -> str:
    """Fill in the values of ``row``; items of lists are separated by semicolons.

    Raises:
        SampleError: ``no_prompt_field``: the sample has no value for a field.
    """

    def value(match: re.Match[str]) -> str:
        if match[0] in _BRACES:
            return _BRACES[match[0]]
        return _text(match[1], row.get(match[1]))

    return _FIELD.sub(value, prompt)


def _text(name: str, value: Any) -> str:
    if value is None or value in ("", []):
        raise SampleError("no_prompt_field", f"it has no {name}")
    if isinstance(value, list | tuple):
        return "; ".join(_text(name, part) for part in value)
    return repaired(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
