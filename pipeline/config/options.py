"""How an option is declared: its default, its help, its range, and when it has an effect.

All of this stands beside the default (:func:`option`), and is checked in one place: whatever makes a config, a command
line, a YAML file or Python code, passes through :meth:`Options.__post_init__`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

NEVER = "never"
"""As ``when`` of an option: it is inherited, but this stage has no use for it."""
LARGEST = 2**63 - 1
"""No whole number is larger: the file formats and libraries below store 64 bits."""
_COMPARISONS = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}


class ConfigError(ValueError):
    """A setting is wrong. The message is one line that names it; programs exit with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


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
) -> Any:
    """Declare one option.

    Args:
        default: The value if none is given. Without a default the option is required.
        help: One line for ``--help``.
        identity: Whether the option changes the bytes of the result.
        choices: The values allowed, for text or for each text of a list. With bounds: these, or a whole number.
        ge, gt, le, lt: Bounds of a number, or of each number of a list: at least, more than, at most, less than.
            NaN and infinity are never allowed.
        also: Numbers that are allowed outside of the bounds, such as 0 for "none".
        lengths: How many values a list may have (empty: any number).
        when: When the option has an effect (empty: always): ``name=value|value`` (another option has one of these
            values), ``name!=value|value``, ``name`` (it is set) or ``!name`` (it is not), joined by `` and `` and,
            weaker, `` or ``; :data:`NEVER`.
            :func:`pipeline.config.cli.load` refuses a setting that cannot have an effect.
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
    }
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base of all configs.

    Raises:
        ConfigError: a value that is not among its choices or out of its range.
    """

    inherited: ClassVar[Mapping[str, str]] = {}
    """By the name of an inherited option, or of the base that declares it: when it has an effect in this class."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            check_value(field, getattr(self, field.name))


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the names that ``word`` may have meant, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(filter(None, names))}"


def default_value(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; ``dataclasses.MISSING`` if it is required."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def number_text(value: float) -> str:
    """A number as it is written in a setting: large whole numbers in full, others short."""
    return str(int(value)) if float(value).is_integer() and abs(value) >= 1e5 else f"{value:g}"


def shown(value: Any) -> str:
    """A setting as it is written on a command line; texts of a list that hold a comma are quoted."""
    if isinstance(value, tuple | list):
        return "[" + ",".join(_quoted(str(part)) for part in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    if text and not any(mark in text for mark in ",\"'[]") and text == text.strip():
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def range_text(field: dataclasses.Field[Any]) -> str:
    """What a value of ``field`` must be, in words: ``at least 0, less than 1``; empty if anything will do."""
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
    """Raises ConfigError unless ``value`` is one that ``field`` can have."""
    meta = field.metadata
    lengths = meta.get("lengths") or ()
    if lengths and len(value) not in lengths:
        raise ConfigError(f"{field.name}={shown(value)}: expected {' or '.join(map(str, lengths))} values")
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, str):
            _check_text(field, part)
        elif isinstance(part, int | float) and not isinstance(part, bool):
            _check_number(field, part)


def _check_text(field: dataclasses.Field[Any], value: str) -> None:
    choices, bounds = field.metadata.get("choices") or (), field.metadata.get("bounds")
    if value in choices or not (choices or bounds):
        return
    if not bounds:
        raise ConfigError(f"{field.name}={value}: {nearest(value, choices)}")
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


# ---- when an option has an effect


def condition_of(cls: type, field: dataclasses.Field[Any]) -> str:
    """When ``field`` has an effect in ``cls``, as :func:`option` takes it; empty: always."""
    own = str(field.metadata.get("when") or "")
    inherited: Mapping[str, str] = getattr(cls, "inherited", {})
    base = next((base for base in cls.__mro__ if field.name in inspect.get_annotations(base)), cls)
    needed = inherited.get(field.name) or inherited.get(base.__name__) or ""
    if own and needed:
        return " or ".join(f"{needed} and {choice}" for choice in own.split(" or "))
    return own or needed


def holds(condition: str, values: Mapping[str, Any]) -> bool:
    """Whether a condition is met by the settings ``values``."""
    return not condition or any(
        all(_term_holds(term, values) for term in choice.split(" and ")) for choice in condition.split(" or ")
    )


def _term_holds(term: str, values: Mapping[str, Any]) -> bool:
    if term == NEVER:
        return False
    name, equals, wanted = term.partition("=")
    if equals:
        value = values[name.rstrip("!")]
        among = any(shown(part) in wanted.split("|") for part in (value if isinstance(value, tuple) else (value,)))
        return among != name.endswith("!")
    return bool(values[name.lstrip("!")]) != term.startswith("!")


def condition_names(condition: str) -> set[str]:
    """The options that a condition looks at."""
    return {term.partition("=")[0].strip("!") for term in _terms(condition) if term != NEVER}


def _terms(condition: str) -> Iterator[str]:
    for choice in filter(None, condition.split(" or ")):
        yield from choice.split(" and ")


def condition_text(condition: str) -> str:
    """A condition as messages and help show it: ``source=url_list or parquet``, ``task=caption and encoder=``."""
    return ", or ".join(" and ".join(map(_term_text, choice.split(" and "))) for choice in condition.split(" or "))


def _term_text(term: str) -> str:
    if term == NEVER:
        return "another stage"
    name, equals, wanted = term.partition("=")
    if equals:
        *names, last = wanted.split("|")
        return f"{name}={', '.join(names)}{' or ' if names else ''}{last}".replace("!=", " other than ")
    return f"without {name[1:]}=" if term.startswith("!") else f"{name}="


def option_text(cls: type, field: dataclasses.Field[Any]) -> str:
    """What is to know of an option but its default: its help, its range, and when it has an effect."""
    notes = [f"[{text}]"] if (text := range_text(field)) else []
    notes += [f"[with {condition_text(condition)}]"] if (condition := condition_of(cls, field)) else []
    return " ".join([field.metadata.get("help", ""), *notes])


def without_effect(config: Any, given: Iterable[str]) -> dict[str, str]:
    """Of the options named in ``given``, those that cannot have an effect in ``config``, with their conditions.

    A value that is the default is what happens anyway: it is no error.
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
    """The items of a list as it is written in a setting: ``[a,b]`` or ``a,b``; quotes keep a comma within an item.

    An item that begins with ``"`` or ``'`` ends at the same mark; within, ``\\`` takes the next character as it is.

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
