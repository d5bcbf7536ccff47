"""The syntax with which settings name models: ``clip:<repo or folder>#layer=penultimate``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.registry import ConfigError, Registry, nearest

LAYERS = ("last", "penultimate")


@dataclass(frozen=True)
class ModelSpec:
    """A model named by the value of a setting.

    Attributes:
        setting: name of the setting, for messages: ``text_encoder``.
        text: the whole value.
        kind: name of the encoder in its registry.
        place: the part after the first colon: a repository, a folder, a model's name; may be empty.
        options: the options after ``#``.
    """

    setting: str
    text: str
    kind: str
    place: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, setting: str, text: str, *, options: bool = True) -> ModelSpec:
        """Parse ``kind:place#key=value#key=value``. A comma may separate further options, too; on a command line it
        begins the next model.

        Args:
            options: False: ``#`` and commas are part of the place.
        """
        head, *tail = re.split(r"[#,]", text) if options else [text]
        kind, _, place = head.partition(":")
        return cls(setting, text, kind, place, dict(part.partition("=")[::2] for part in tail))

    def __str__(self) -> str:
        return f"{self.setting}={self.text}"

    def error(self, reason: str) -> ConfigError:
        """An error with the setting, its value, and ``reason``."""
        return ConfigError(f"{self}: {reason}")

    def find(self, registry: Registry[Any]) -> Any:
        """The class registered for this kind.

        Raises:
            ConfigError: there is none, its place is missing or not allowed, or it does not accept one of the options.
        """
        usage = registry.usage(self.kind) if self.kind in registry else ""
        if self.kind not in registry or (self.place == "") != (usage == ""):
            usages = ", ".join(filter(None, map(registry.usage, registry)))
            raise self.error(f"{nearest(self.kind, registry)}{f' (as {usages})' if usages else ''}")
        found = registry.get(self.kind)
        takes: Iterable[str] = getattr(found, "takes", ())
        for option in self.options:
            if option not in takes:
                allowed = f"{', '.join(takes)} after the #" if takes else "no options"
                raise self.error(f"{self.kind} takes {allowed}")
        return found

    def choice(self, option: str, choices: tuple[str, ...]) -> str:
        """The value of ``option``, one of ``choices``; the first if it is not given."""
        value = self.options.get(option, choices[0])
        if value not in choices:
            raise self.error(f"{option}={value}: {nearest(value, choices)}")
        return value

    def tokens(self, option: str) -> int | None:
        """The value of ``option``, a number of tokens; None if it is not given."""
        value = self.options.get(option)
        if value is not None and (not value.isdigit() or not int(value)):
            raise self.error(f"{option}={value}: expected a number of tokens")
        return None if value is None else int(value)

    def flag(self, option: str) -> bool | None:
        """The value of ``option``, true or false; None if it is not given."""
        value = self.options.get(option)
        if value not in (None, "true", "false"):
            raise self.error(f"{option}={value}: expected true or false")
        return None if value is None else value == "true"
