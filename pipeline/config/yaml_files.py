"""Reads YAML files with settings: datasets, recipes, cluster presets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.options import ConfigError


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # PyYAML has no type hints
    """Uses YAML 1.2's scalar types (``no``, ``on``, ``012`` and ``12:30`` are text), and rejects duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as in PyYAML

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given more than once", key_node.start_mark
                )
            seen.add(key if isinstance(key, str | int | float) else id(key_node))
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
    ("null", r"~|null|Null|NULL", "~nN"),
    ("null", r"", None),
    ("merge", r"<<", "<"),
):
    _starts = list(_first) if _first else [""]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _starts)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML in UTF-8 (or UTF-16 with a byte order mark), or is not a
            mapping.
    """
    try:
        values = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return {str(key): value for key, value in values.items()}
