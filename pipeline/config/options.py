"""Declaration of options: default, help, range, and when they have an effect.

:func:`option` declares all of these together, and they are checked in one place: every config, whether made from a
command line, a YAML file or Python code, passes through :meth:`Options.__post_init__`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pipeline.registry import ConfigError as ConfigError
from pipeline.registry import Registry, Traits
from pipeline.registry import nearest as nearest

Part = TypeVar("Part", bound="Options")
NEVER = "never"
"""Value of ``when`` for an inherited option that a stage does not use."""
LARGEST = 2**63 - 1
"""Largest allowed integer, because file formats and libraries store 64 bits."""
_USUAL, _MOST = 3, 0.8  # minimum number and share of a group's options with a condition to state it in the heading
_COMPARISONS = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    identity: bool = False,
    choices: tuple[str, ...] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    also: tuple[float, ...] = (),
    lengths: tuple[int, ...] = (),
    when: str = "",
    names: Registry[Any] | None = None,
    path: str = "",
    words: tuple[str, ...] = (),
) -> Any:
    """Declare an option.

    Args:
        default: Default value. An option without a default is required.
        help: One line for ``--help``.
        identity: Whether the bytes of the output depend on the option.
        choices: Allowed values of a text, or of each text of a list. If there are bounds, an integer is allowed, too.
        ge, gt, le, lt: Bounds of a number, or of each number of a list: at least, more than, at most, less than. NaN
            and infinity are never allowed.
        also: Numbers outside of the bounds that are allowed, such as 0 for "none".
        lengths: Allowed lengths of a list (empty: any length).
        names: Registry of the allowed values. Names registered by installed packages are allowed, too, and their
            options become options of the config (:func:`extended`).
        when: When the option has an effect (empty: always): ``name=value|value`` (another option has one of these
            values), ``name!=value|value``, ``name^=text|text`` (its value begins with one of these), ``name`` (it is
            set) or ``!name`` (it is not), joined by ``and`` and, weaker, ``or``; :data:`NEVER`.
            :func:`pipeline.config.cli.load` rejects a setting that cannot have an effect.
        path: What the value names: ``file``, or ``file or folder``, which must exist when a stage starts
            (:func:`require_files`).
        words: Values of such an option that name no file.
    """
    bounds = {name: bound for name, bound in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if bound is not None}
    metadata = {
        "help": help,
        "identity": identity,
        "choices": choices,
        "bounds": bounds,
        "also": also,
        "lengths": lengths,
        "when": when,
        "names": names,
        "path": path,
        "words": words,
    }
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of all configs.

    Raises:
        ConfigError: A value is not among its choices, or out of range.
    """

    traits: ClassVar[Traits] = Traits()
    """How the stage of this config runs."""
    inherited: ClassVar[Mapping[str, str]] = {}
    """When inherited options have an effect in this class, by name of the option or of the base that declares it."""
    help_order: ClassVar[tuple[type, ...]] = ()
    """Bases of this class in the order in which help shows them (default: the order of inheritance)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))

    @property
    def upstreams(self) -> tuple[str, ...]:
        """Of a stage's config: the stages whose output it reads by default, with these settings."""
        return self.traits.upstream


def default_value(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; ``dataclasses.MISSING`` if it is required."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def number_text(value: float) -> str:
    """Format a number for a setting: large integers in full, other numbers in short form."""
    return str(int(value)) if float(value).is_integer() and abs(value) >= 1e5 else f"{value:g}"


def shown(value: Any) -> str:
    """Format a setting for the command line; list items that contain a comma are quoted."""
    if isinstance(value, tuple | list):
        return "[" + ",".join(_quoted(str(part)) for part in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    if text and not any(mark in text for mark in ",\"'[]") and text == text.strip():
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def range_text(field: dataclasses.Field[Any]) -> str:
    """Describe the range of ``field``: ``at least 0, less than 1``; empty if there is none."""
    meta = field.metadata
    choices = [choice or '""' for choice in meta.get("choices") or ()]
    bounds = [f"{_COMPARISONS[name][0]} {number_text(bound)}" for name, bound in (meta.get("bounds") or {}).items()]
    numbers = " or ".join([*map(number_text, meta.get("also") or ()), ", ".join(bounds)]) if bounds else ""
    if choices and numbers:
        numbers = f"a whole number of {numbers}"
    lengths = " or ".join(map(str, meta.get("lengths") or ()))
    values = " or ".join(filter(None, [" | ".join(choices), numbers]))
    return ": ".join(filter(None, [f"{lengths} values" if lengths else "", values]))


def check_value(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ConfigError unless ``value`` is allowed for ``field``."""
    meta = field.metadata
    lengths = meta.get("lengths") or ()
    if lengths and len(value) not in lengths:
        raise ConfigError(f"{field.name}={shown(value)}: expected {' or '.join(map(str, lengths))} values")
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, str):
            _check_text(field, part)
        elif isinstance(part, int | float) and not isinstance(part, bool):
            _check_number(field, part)


def require_files(config: Options) -> None:
    """Raise ConfigError if an option names a file that is not there or cannot be read."""
    for field in dataclasses.fields(config):
        kind, words = str(field.metadata.get("path") or ""), field.metadata.get("words", ())
        value = getattr(config, field.name) if kind else ""
        if value and value not in words and "://" not in value:
            try:
                _require_file(Path(value), kind, Path(getattr(config, "input", "") or ""))
            except ConfigError as error:
                instead = f" (or: {', '.join(words)})" if words else ""
                raise ConfigError(f"{field.name}={value}: {error}{instead}") from None


def _require_file(path: Path, kind: str, folder: Path) -> None:
    """``path`` may be relative to the current folder or to the input ``folder``."""
    found = next((place for place in (path, folder / path) if os.path.exists(place)), None)
    if found is None:
        raise ConfigError(f"the {kind} does not exist")
    if kind == "file" and found.is_dir():
        raise ConfigError("is a folder, not a file")
    if not os.access(found, os.R_OK):
        raise ConfigError("cannot be read: no permission")


def _check_text(field: dataclasses.Field[Any], value: str) -> None:
    choices, bounds = field.metadata.get("choices") or (), field.metadata.get("bounds")
    names: Registry[Any] | None = field.metadata.get("names")
    if value in choices or not (choices or bounds):
        return
    if names is not None and value not in names.builtin and value in names:
        return
    if not bounds:
        known = (*choices, *names.installed()) if names is not None else choices
        raise ConfigError(f"{field.name}={value}: {nearest(value, known)}")
    if not (value.isascii() and value.isdigit() and len(value) < 20):
        raise ConfigError(f"{field.name}={value}: must be {range_text(field)}")
    _check_number(field, int(value))


def _check_number(field: dataclasses.Field[Any], value: float) -> None:
    meta = field.metadata
    if not math.isfinite(value):
        raise ConfigError(f"{field.name}={value}: expected a finite number")
    if value in (meta.get("also") or ()):
        return
    if not all(_COMPARISONS[name][1](value, bound) for name, bound in (meta.get("bounds") or {}).items()):
        raise ConfigError(f"{field.name}={shown(value)}: must be {range_text(field)}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{field.name}={value}: must be at most {LARGEST}")


# ---- values as text


def converted(field: dataclasses.Field[Any], value: Any) -> Any:
    """Convert ``value``, from a command line or a YAML file, to the declared type of ``field``.

    Raises:
        ConfigError: it cannot be converted.
    """
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    several = kind.startswith("tuple[")
    item = kind.removeprefix("tuple[").removesuffix(", ...]") if several else kind
    if item not in _CONVERSIONS:
        raise TypeError(f"option {field.name}: of type {kind}; known: {', '.join(_CONVERSIONS)} and tuple[..., ...]")
    convert, expected, all_expected = _CONVERSIONS[item]
    parts = _items(field, value) if several else [value]
    try:
        values = tuple(map(convert, parts))
    except (ValueError, OverflowError):
        wanted = f"a list of {all_expected}, as [a,b]" if several else expected
        raise ConfigError(f"{field.name}={value}: expected {wanted}") from None
    return values if several else values[0]


def _items(field: dataclasses.Field[Any], value: Any) -> Iterable[Any]:
    if isinstance(value, str):
        try:
            return list_items(value)
        except ConfigError as error:
            raise ConfigError(f"{field.name}={value}: {error}") from None
    return value if isinstance(value, list | tuple) else [value]


def _whole_number(value: Any) -> int:
    if type(value) not in (str, int):  # reject floats and booleans
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if type(value) not in (str, int, float):
        raise ValueError
    return float(value)


def _true_or_false(value: Any) -> bool:
    if isinstance(value, int):
        return bool(value)
    word = value.lower() if isinstance(value, str) else value
    if word in ("true", "yes", "y", "on", "1"):
        return True
    if word in ("false", "no", "n", "off", "0"):
        return False
    raise ValueError


def _text(value: Any) -> str:
    if isinstance(value, dict | list | tuple | bytes):
        raise ValueError
    return "" if value is None else str(value)


_CONVERSIONS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "int": (_whole_number, "a whole number", "whole numbers"),
    "float": (_number, "a number", "numbers"),
    "bool": (_true_or_false, "true or false", "true or false"),
    "str": (_text, "text", "texts"),
}
"""For each type: the conversion, and descriptions of the expected value and list of values."""


# ---- when an option has an effect


def condition_of(cls: type, field: dataclasses.Field[Any]) -> str:
    """When ``field`` has an effect in ``cls``, as a ``when`` of :func:`option`; empty: always."""
    own = str(field.metadata.get("when") or "")
    return both(inherited_condition(cls, field), own)


def both(one: str, two: str) -> str:
    """The conjunction of two conditions."""
    if not (one and two):
        return one or two
    return " or ".join(f"{left} and {right}" for left in one.split(" or ") for right in two.split(" or "))


def inherited_condition(cls: type, field: dataclasses.Field[Any]) -> str:
    """The additional condition of ``field`` in ``cls``, compared to the class that declares it."""
    inherited: Mapping[str, str] = getattr(cls, "inherited", {})
    return inherited.get(field.name) or inherited.get(owner_of(cls, field.name).__name__) or ""


def owner_of(cls: type, name: str) -> type:
    """The class that declares the option ``name`` of ``cls``, which is its group."""
    return next((base for base in cls.__mro__ if name in inspect.get_annotations(base)), cls)


def groups_of(cls: type) -> list[str]:
    """Names of the classes that the options of ``cls`` are declared in."""
    return [base.__name__ for base in cls.__mro__ if base is not Options and issubclass(base, Options)]


def part_of(config: Options, cls: type[Part], **changes: Any) -> Part:
    """The options of ``config`` that ``cls`` also has, as a config, including those of installed packages."""
    extension = type(config).__dict__.get("extension")
    if extension and (added := tuple(one for one in extension[1] if not issubclass(cls, one[1]))):
        cls = _extended(cls, added)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls)}
    return cls(**{**values, **changes})


# ---- options that installed packages add


def extended(cls: type[Part], settings: Mapping[str, Any]) -> type[Part]:
    """Extend ``cls`` with the options of all sources, tasks etc. from installed packages that ``settings`` select.

    Raises:
        ConfigError: two packages declare an option of the same name.
    """
    added: list[tuple[str, type[Options]]] = []
    for field in dataclasses.fields(cls):
        names: Registry[Any] | None = field.metadata.get("names")
        value = settings.get(field.name, default_value(field)) if names is not None else None
        if names is None or not isinstance(value, str | tuple | list):
            continue
        several = str(field.type).startswith("tuple")
        for name in (
            list_items(value) if several and isinstance(value, str) else [value] if isinstance(value, str) else value
        ):
            if name and name not in names.builtin and name in names and (options := names.options(name)):
                added.append((both(condition_of(cls, field), f"{field.name}={name}"), options))
    return _extended(cls, tuple(added)) if added else cls


def _extended(cls: type[Any], added: tuple[tuple[str, type[Options]], ...]) -> Any:
    """Extend ``cls`` with the options in ``added`` and the conditions under which they have an effect; cached."""
    found = _EXTENDED.get((cls, added))
    if found is None:
        found = _EXTENDED[cls, added] = _made(cls, added)
    return found


_EXTENDED: dict[tuple[type, tuple[tuple[str, type[Options]], ...]], Any] = {}


def _made(cls: type[Any], added: tuple[tuple[str, type[Options]], ...]) -> Any:
    inherited = dict(getattr(cls, "inherited", {}))
    known = {f.name for f in dataclasses.fields(cls)}
    for condition, options in added:
        if not issubclass(options, Options):
            raise ConfigError(
                f"{options.__module__}.{options.__qualname__}: options are a dataclass derived from Options"
            )
        for field in dataclasses.fields(options):
            if field.name in known and owner_of(options, field.name) not in cls.__mro__:
                raise ConfigError(f"{condition}: the option {field.name!r} that it adds exists already")
            known.add(field.name)
        new = [base for base in options.__mro__ if base not in cls.__mro__]
        inherited |= {base.__name__: condition for base in new}
    body = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "inherited": inherited,
        "extension": (cls, added),
        "__reduce__": _reduced,
    }
    bases = (*dict.fromkeys(options for _, options in added), cls)
    return dataclasses.dataclass(frozen=True, kw_only=True)(type(cls.__name__, bases, body))


def _reduced(self: Any) -> tuple[Any, ...]:
    """Pickle a config with added options so that its class is recreated when it is loaded."""
    return _again, (*type(self).extension, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


def _again(cls: type, added: tuple[tuple[str, type[Options]], ...], values: dict[str, Any]) -> Any:
    return _extended(cls, added)(**values)


def holds(condition: str, values: Mapping[str, Any]) -> bool:
    """Whether the settings ``values`` meet a condition."""
    return not condition or any(
        all(_term_holds(term, values) for term in choice.split(" and ")) for choice in condition.split(" or ")
    )


def _term_holds(term: str, values: Mapping[str, Any]) -> bool:
    if term == NEVER:
        return False
    name, equals, wanted = term.partition("=")
    if equals:
        value = values[name.rstrip("!^")]
        parts = [shown(part) for part in (value if isinstance(value, tuple) else (value,))]
        if name.endswith("^"):
            return any(part.startswith(tuple(wanted.split("|"))) for part in parts)
        return any(part in wanted.split("|") for part in parts) != name.endswith("!")
    return bool(values[name.lstrip("!")]) != term.startswith("!")


def condition_names(condition: str) -> set[str]:
    """Names of the options in a condition."""
    return {term.partition("=")[0].strip("!^") for term in _terms(condition) if term != NEVER}


def _terms(condition: str) -> Iterator[str]:
    for choice in filter(None, condition.split(" or ")):
        yield from choice.split(" and ")


def condition_text(condition: str) -> str:
    """Format a condition for messages and help: ``source=url_list or parquet``, ``task=caption and encoder set``."""
    return ", or ".join(" and ".join(map(_term_text, choice.split(" and "))) for choice in condition.split(" or "))


def _term_text(term: str) -> str:
    if term == NEVER:
        return "another stage"
    name, equals, wanted = term.partition("=")
    if equals:
        more = "..." if name.endswith("^") else ""
        *names, last = (value + more for value in wanted.split("|"))
        told = f"{name.rstrip('^')}={', '.join(names)}{' or ' if names else ''}{last}"
        return told.replace("!=", " other than ")
    return f"{name[1:]} not set" if term.startswith("!") else f"{name} set"


def common_condition(conditions: Sequence[str]) -> tuple[str, list[str]]:
    """Split the conditions of a group of options into a common part and the rest of each.

    Args:
        conditions: The condition of each option of the group.

    Returns:
        A text for the heading of the group, and one for each option; empty if there is no condition.
    """
    shared = set.intersection(*(set(choice.split(" and ")) for c in conditions for choice in c.split(" or ")))
    rest = [_without(condition, shared) for condition in conditions]
    usual, count = Counter(rest).most_common(1)[0]
    if count < _USUAL or (not all(rest) and count < _MOST * len(rest)):
        usual = ""
    heading = " and ".join(
        [*(_term_text(term) for term in _ordered(shared, conditions)), *([condition_text(usual)] if usual else [])]
    )
    more = "; with other values where an option says so" if usual and set(rest) - {usual} else ""
    return heading + more, [_addition(condition, usual, bool(shared)) for condition in rest]


def _without(condition: str, shared: set[str]) -> str:
    choices = [[term for term in choice.split(" and ") if term not in shared] for choice in condition.split(" or ")]
    return " or ".join(" and ".join(choice) for choice in choices) if all(choices) else ""


def _ordered(shared: set[str], conditions: Sequence[str]) -> list[str]:
    return [term for term in conditions[0].split(" or ")[0].split(" and ") if term and term in shared]


def _addition(condition: str, usual: str, shared: bool) -> str:
    if condition == usual:
        return ""
    if not condition:
        return "[always]" if usual else ""
    for term in condition.split(" or ")[0].split(" and ") if usual else ():
        if both(usual, term) == condition:
            return f"[also needs {condition_text(term)}]"
    return f"[{'also needs' if shared and not usual else 'only with'} {condition_text(condition)}]"


def option_text(cls: type, field: dataclasses.Field[Any], condition: str | None = None) -> str:
    """Describe an option, without its default: its help, its range, and when it has an effect.

    Args:
        condition: Text of the condition, from :func:`common_condition`. None: the whole condition.
    """
    if condition is None:
        condition = f"[only with {condition_text(own)}]" if (own := condition_of(cls, field)) else ""
    value_range = range_text(field)
    return " ".join(
        filter(None, [field.metadata.get("help", ""), f"[{value_range}]" if value_range else "", condition])
    )


def without_effect(config: Any, given: Iterable[str]) -> dict[str, str]:
    """Find the options in ``given`` that cannot have an effect in ``config``, with their conditions.

    Options with their default value are ignored.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found = {}
    names = set(given)
    for field in dataclasses.fields(config):
        condition = condition_of(type(config), field) if field.name in names else ""
        if condition and values[field.name] != default_value(field) and not holds(condition, values):
            found[field.name] = condition
    return found


# ---- lists as text


def list_items(text: str) -> list[str]:
    """Parse a list in a setting, ``[a,b]`` or ``a,b``; quotes allow commas within an item.

    An item that begins with ``"`` or ``'`` ends at the same mark; within, ``\\`` escapes the next character.

    Raises:
        ConfigError: a quote is not closed, or something follows it.
    """
    text = text.strip()
    text = text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text
    items: list[str] = []
    while text:
        mark = text[0]
        if mark in "\"'":
            item, text = _quoted_item(text, mark)
            rest, comma, after = text.lstrip().partition(",")
            if rest:
                raise ConfigError(f"{text.strip()[:40]!r} follows a closing quote: expected a comma")
        else:
            item, comma, after = text.partition(",")
        items.append(item if mark in "\"'" else item.strip())
        text = after.lstrip()
        if comma and not text:
            items.append("")
    return items


def _quoted_item(text: str, mark: str) -> tuple[str, str]:
    characters = iter(range(1, len(text)))
    item = ""
    for place in characters:
        if text[place] == mark:
            return item, text[place + 1 :]
        if text[place] == "\\" and place + 1 < len(text):
            place = next(characters)
        item += text[place]
    raise ConfigError(f"the quote in {text[:40]!r} is not closed")
