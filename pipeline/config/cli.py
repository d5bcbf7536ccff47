"""Converts command lines (``key=value``, ``--key value``, ``--key=value``) to configs, which are frozen dataclasses.

Settings override each other in this order: defaults < ``conf/dataset/<name>.yaml`` < command line. A key qualified by a
stage (``train.batch_size=64``, or in a section of that name in a YAML file) applies only to that stage.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.arrow import without_pandas
from pipeline.config.life import Life
from pipeline.config.options import (
    NEVER,
    Options,
    common_condition,
    condition_names,
    condition_of,
    condition_text,
    converted,
    default_value,
    extended,
    holds,
    option_text,
    owner_of,
    require_files,
    shown,
    without_effect,
)
from pipeline.config.options import nearest as nearest
from pipeline.config.schema import CURATION, STAGES, ConfigError, LaunchConfig, RunConfig, public, public_text
from pipeline.config.yaml_files import read_settings
from pipeline.registry import ExpectedError, formats, scorers, sources, stages, tasks

Config = TypeVar("Config", bound=Options)
Settings = dict[str, Any]
CONF = Path(__file__).parents[1] / "conf"
_WIDEST, _NARROWEST = 110, 40  # width of a help text in columns


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Split arguments into settings, as text: ``--key a b`` becomes ``[a,b]``, and ``--flag`` alone ``true``.

    Raises:
        ConfigError: an argument that is neither ``key=value`` nor ``--key``, or a key given twice.
    """
    settings: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                values = []
                while rest and not rest[0].startswith("--") and not _is_setting(rest[0]):
                    values.append(rest.pop(0))
                value = values[0] if len(values) == 1 else _joined(values) if values else "true"
        else:
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise ConfigError(f"{word!r} is not a setting: write key=value or --key value")
        key = key.replace("-", "_")
        if key in settings:
            raise ConfigError(f"{key} is given more than once")
        # bash does not expand the tilde in input=~/images
        settings[key] = os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    return settings


def _joined(values: Sequence[str]) -> str:
    """Join several words to a list; words that are already quoted are unchanged."""
    return "[" + ",".join(v if v[:1] in "\"'" and v[-1:] == v[:1] else shown([v])[1:-1] for v in values) + "]"


def _is_setting(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and key.replace(".", "").replace("-", "").replace("_", "").isalnum() and not key[0].isdigit()


def known_keys() -> set[str]:
    """All keys of all stages, including options that installed packages add."""
    registries = (stages, sources, formats, tasks, scorers)
    added = (registry.options(name) for registry in registries for name in registry.installed())
    return _own_keys() | {f.name for cls in filter(None, added) for f in dataclasses.fields(cls)}


@cache
def _own_keys() -> set[str]:
    """All keys of the built-in stages, found without searching for installed packages."""
    classes = (*(STAGES[stage] for stage in stages.builtin), LaunchConfig)
    return {f.name for cls in classes for f in dataclasses.fields(cls)}


def options_of(stage: str, settings: Mapping[str, Any]) -> type[Options]:
    """The config class of ``stage`` for these settings, with the options of installed packages that they select."""
    section = settings.get(stage)
    own = dict(section) if isinstance(section, Mapping) else {}
    own |= {key.removeprefix(f"{stage}."): value for key, value in settings.items() if key.startswith(f"{stage}.")}
    return extended(STAGES[stage], {**settings, **own})


def dataset_settings(name: str) -> Settings:
    """Settings of ``conf/dataset/<name>.yaml`` or of the YAML file ``name``.

    Raises:
        ConfigError: there is no such dataset, or the file is not a mapping.
    """
    return _settings_of("dataset", name)


def _settings_of(kind: str, name: str) -> Settings:
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONF / kind / f"{name}.yaml"
    if not path.is_file():
        known = (p.stem for p in (CONF / kind).glob("*.yaml"))
        if path.suffix in (".yaml", ".yml") and name == str(path):
            raise ConfigError(f"{kind}={name}: no such file")
        what = "dataset" if kind == "dataset" else kind
        raise ConfigError(f"{kind}={name}: no such {what}; {nearest(name, known)} (or give a path to a .yaml file)")
    return read_settings(path)


def yaml_name(name: str) -> str:
    """Name of the file for ``dataset=<name>`` or ``recipe=<name>``, for messages."""
    return name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"


def chosen(settings: Settings, split: str, subset: str, where: str) -> Settings:
    """Merge the sections of ``split`` and ``subset`` in ``splits`` and ``subsets`` (also within a split) into
    ``settings``.

    Raises:
        ConfigError: there is no such split or subset.
    """
    plain = {name: value for name, value in settings.items() if name not in ("about", "splits", "subsets")}
    splits = settings.get("splits") or {}
    if splits and split not in splits:
        raise ConfigError(f"{where}split={split}: there is none; {nearest(split, splits)}")
    plain |= splits.get(split) or {}
    subsets = {**(settings.get("subsets") or {}), **(plain.pop("subsets", None) or {})}
    if subset and subset not in subsets:
        raise ConfigError(
            f"{where}subset={subset}: there is none; {nearest(subset, subsets) if subsets else 'take all'}"
        )
    return plain | (subsets.get(subset) or {})


def phases_of(recipe: str) -> list[str]:
    """Names of a recipe's phases, in order; empty if it has none."""
    return [str(name) for name in _settings_of("recipe", recipe).get("phases") or {}]


def published_of(recipe: str) -> str:
    """The cost that a recipe's authors report, for comparison; empty if it is not given."""
    return str(_settings_of("recipe", recipe).get("published") or "")


def recipe_settings(recipe: str, phase: str) -> Settings:
    """Settings of a phase of a recipe: those of all phases, then its own. It starts from the previous phase.

    Raises:
        ConfigError: there is no such recipe, phase or key.
    """
    settings = _settings_of("recipe", recipe)
    settings.pop("published", None)
    phases = {str(key): value for key, value in (settings.pop("phases", None) or {}).items()}
    if phase not in phases and (phases or phase):
        raise ConfigError(f"recipe={recipe}, phase={phase}: {nearest(phase, phases)}")
    name = Path(recipe).stem
    if phase:
        names = list(phases)
        before = names[: names.index(phase)]
        settings |= phases[phase] or {}
        settings |= {"name": f"{name}-{phase}"} | ({"start_from": f"{name}-{before[-1]}"} if before else {})
    return select(settings, "train", f"{yaml_name(recipe)}: ")


def select(settings: Mapping[str, Any], stage: str, where: str) -> Settings:
    """Select the settings that apply to ``stage``; qualified keys take precedence over plain ones.

    Raises:
        ConfigError: a key is unknown to all stages, or a qualified key is unknown to its stage.
    """
    fields = {f.name for f in dataclasses.fields(options_of(stage, settings))}
    plain: Settings = {}
    own: Settings = {}
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if not dot and isinstance(value, dict) and key in STAGES:
            qualified = {f"{key}.{inner}": setting for inner, setting in value.items()}
            own |= select(qualified, stage, where)
        elif dot:
            if section not in STAGES:
                raise ConfigError(f"{where}{key}: no stage {section!r}; {nearest(section, STAGES)}")
            names = {f.name for f in dataclasses.fields(options_of(section, settings))}
            if name not in names:
                raise ConfigError(f"{where}{key}: stage {section} has no key {name!r}; {nearest(name, names)}")
            if section == stage:
                own[name] = value
        elif key in fields:
            plain[key] = value
        elif key not in _own_keys() and key not in known_keys():
            raise ConfigError(f"{where}unknown key {key!r}; {nearest(key, known_keys())}")
    return plain | own


def build(cls: type[Config], settings: Mapping[str, Any]) -> Config:
    """Check and convert ``settings``, and create the config.

    Raises:
        ConfigError: a key is unknown, a value is missing, or a value has the wrong type or is not allowed.
    """
    cls = extended(cls, settings)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in settings.items():
        if key not in fields:
            raise ConfigError(f"unknown key {key!r}; {nearest(key, fields)}")
        if "${" in str(value):
            raise ConfigError(f"{key}={value}: '${{' is not supported in values")
    values = {key: converted(fields[key], value) for key, value in settings.items()}
    missing = sorted(
        f.name for f in fields.values() if f.name not in values and default_value(f) is dataclasses.MISSING
    )
    if missing:
        raise ConfigError("missing: " + ", ".join(f"{key}=... ({fields[key].metadata.get('help')})" for key in missing))
    return cls(**values)


def load(stage: str, arguments: Sequence[str]) -> Any:
    """Create the config of ``stage`` from command-line ``arguments`` and the YAML files of recipe and dataset."""
    own: Settings = {}
    for key, value in parse(arguments).items():
        section, dot, name = key.partition(".")
        own[name if dot and section == stage else key] = value
    values, settings = _from_files(stage, own)
    config: Any = build_given(STAGES[stage], settings, own)
    _require_effect_of_file(stage, values, settings, config, f"{yaml_name(own.get('dataset', ''))}: ")
    return config


def ineffective(stage: str, own: Settings) -> dict[str, str]:
    """Find the settings in ``own`` that cannot have an effect in their stage, each with an explanation.

    Raises:
        ConfigError: see :func:`build`.
    """
    config: Any = build(STAGES[stage], {**_from_files(stage, own)[1], **own})
    found = without_effect(config, own)
    return {key: _without_effect(key, own[key], condition, config) for key, condition in found.items()}


def _from_files(stage: str, own: Settings) -> tuple[Settings, Settings]:
    """All settings in the dataset's YAML for this split and subset, and this stage's settings in both YAML files."""
    values: Settings = {}
    settings: Settings = {}
    if own.get("dataset") and issubclass(STAGES[stage], RunConfig):
        values = _of_dataset(own)
        settings = select(values, stage, f"{yaml_name(own['dataset'])}: ")
    if stage in CURATION and (recipe := own.get("curation") or settings.get("curation")):
        settings = select(_settings_of("recipe", str(recipe)), stage, f"{yaml_name(str(recipe))}: ") | settings
    if stage == "train" and own.get("recipe"):
        settings |= recipe_settings(own["recipe"], own.get("phase", ""))
    if stage == "train":
        _one_length(own, settings)
    return values, settings


def _of_dataset(own: Settings) -> Settings:
    where = f"{yaml_name(own['dataset'])}: "
    return chosen(dataset_settings(own["dataset"]), own.get("split", "train"), own.get("subset", ""), where)


def asked_for(stage: str, given: Settings, others: Iterable[str]) -> bool:
    """Whether the command, the dataset's YAML or a curation recipe configures ``stage``: in a section, by a qualified
    key, or by an option that none of the stages ``others`` has.

    Args:
        given: the command's settings.
    """
    layers = [given]
    if given.get("dataset"):
        layers.append(_of_dataset(given))
    if recipe := next((str(layer["curation"]) for layer in layers if layer.get("curation")), ""):
        layers.append(_settings_of("recipe", recipe))
    shared = {"curation"}.union(*({f.name for f in dataclasses.fields(STAGES[other])} for other in others))
    own = {f.name for f in dataclasses.fields(options_of(stage, given))} - shared
    return any(
        key == stage or key.startswith(f"{stage}.") or (key in own and value not in ("", None))
        for layer in layers
        for key, value in layer.items()
    )


def _one_length(own: Settings, settings: Settings) -> None:
    """Let ``steps`` or ``epochs`` in a command replace either of them in a file, since both set the training length.

    Raises:
        ConfigError: the command sets both.
    """
    given = [name for name in ("steps", "epochs") if str(own.get(name, "0")) not in ("0", "0.0")]
    if len(given) == 2:
        raise ConfigError(f"steps={own['steps']}, epochs={own['epochs']}: give one of them")
    for name in given:
        settings.pop("steps" if name == "epochs" else "epochs", None)


def build_given(cls: type[Config], settings: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """Create the config from ``settings`` in files and those ``given`` in a command, which take precedence.

    Raises:
        ConfigError: see :func:`build`; or a setting in the command cannot have an effect.
    """
    config = build(cls, {**settings, **given})
    for key, condition in without_effect(config, given).items():
        raise ConfigError(_without_effect(key, given[key], condition, config))
    return config


def _without_effect(key: str, value: Any, condition: str, config: Any) -> str:
    names = [name for name in sorted(condition_names(condition)) if getattr(config, name) not in ("", 0, ())]
    now = ", ".join(f"{name}={shown(getattr(config, name))}" for name in names)
    shown_value = value if isinstance(value, str) else shown(value)
    return f"{key}={shown_value} has no effect{f' with {now}' if now else ''}: it needs {condition_text(condition)}"


def _require_effect_of_file(stage: str, values: Settings, settings: Settings, config: Any, where: str) -> None:
    """Raise ConfigError for settings in a YAML file that cannot have an effect, either with that file alone or in this
    run.

    Settings for all stages are accepted, as they may be meant for another stage or for a choice made by a command.
    """
    cls = STAGES[stage]
    if not (inert := without_effect(config, settings)):
        return
    alone: Any = build(cls, _completed(cls, settings))
    for key, condition in without_effect(alone, inert).items():
        own = key in (values.get(stage) or {}) or f"{stage}.{key}" in values or key not in values
        if own or not any(_may_have_effect(other, key, values) for other in STAGES):
            raise ConfigError(where + _without_effect(key, settings[key], condition, alone))


def _may_have_effect(stage: str, key: str, values: Settings) -> bool:
    if key not in {f.name for f in dataclasses.fields(options_of(stage, values))}:
        return False
    cls, settings = STAGES[stage], select(values, stage, "")
    condition = without_effect(build(cls, _completed(cls, settings)), [key]).get(key, "")
    return not condition or not condition_names(condition) & set(settings)


def _completed(cls: type, settings: Mapping[str, Any]) -> Settings:
    """``settings`` with placeholders for missing required values."""
    missing = [f.name for f in dataclasses.fields(cls) if default_value(f) is dataclasses.MISSING]
    return {**dict.fromkeys(missing, "..."), **settings}


def dump(config: Any) -> str:
    """The settings that differ from the defaults, one ``key = value`` per line; plans and checkpoints hold all."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    given = {f.name: given[f.name] for f in dataclasses.fields(config) if given[f.name] != default_value(f)}
    width = max(map(len, given), default=0)
    lines = [f"  {name:<{width}} = {shown(public(value))}" for name, value in given.items()]
    rest = len(dataclasses.fields(config)) - len(given)
    return "\n".join([*lines, f"  and {rest} settings at their defaults"])


def arguments_of(config: Any) -> list[str]:
    """``key=value`` arguments from which :func:`load` recreates ``config``, without default values."""
    arguments = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value != default_value(f):
            arguments.append(f"{f.name}={shown(value)}")
    return arguments


def to_json(config: Any) -> dict[str, Any]:
    """The resolved config as JSON-serializable values, without secrets."""
    return {f.name: public(getattr(config, f.name)) for f in dataclasses.fields(config)}


def help_text(cls: type, usage: str, hidden: Collection[str] = (), width: int | None = None) -> str:
    """Help on all options with their defaults, by group, except those in ``hidden``.

    Args:
        width: Columns of the text (default: those of the terminal).
    """
    width = max(_NARROWEST, width or min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST))
    fields = [f for f in dataclasses.fields(cls) if f.name not in hidden and condition_of(cls, f) != NEVER]
    indent = 2 + min(max(len(f.name) for f in fields), width // 4) + 2
    lines = [*_wrapped(f"usage: {usage} key=value ...", width, 7), ""]
    lines += _wrapped(" ".join((cls.__doc__ or "").split("\n\n")[0].split()), width)
    for group, members in by_group(cls, fields).items():
        condition, additions = common_condition([condition_of(cls, f) for f in members])
        with_ = f" (only with {condition})" if condition else ""
        lines += ["", *(_wrapped(f"{group}{with_}:", width) if group else [])]
        for f, addition in zip(members, additions, strict=True):
            text = " ".join(filter(None, [option_text(cls, f, addition), _default_text(f)]))
            name = f"  {f.name}".ljust(indent)
            if len(f.name) > indent - 4:
                lines.append(name)
                name = " " * indent
            lines += _wrapped(name + text, width, indent)
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = default_value(field)
    if default is dataclasses.MISSING:
        return "(required)"
    return f"(default: {shown(default)})" if default not in ("", ()) and "(default:" not in _help(field) else ""


def _help(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("help", ""))


def program(name: str) -> str:
    """The command that starts a program: ``latentmill run`` if this process was started so, or else ``python ...``.

    Args:
        name: ``submit``, ``status``, ``doctor``, or a stage.
    """
    if Path(sys.argv[0]).name.startswith("latentmill"):
        return f"latentmill {'run' if name == 'submit' else name}"
    return f"python -m {stages.module(name)}" if name in STAGES else f"python launch/{name}.py"


def command_for(stage: str, config: Any, *more: str) -> str:
    """The command that runs ``stage`` (several: ``a,b``) on the dataset of ``config``, with the settings ``more``."""
    words = [*program("submit").split(), f"stage={stage}", *dataset_of(config), *more]
    return public_text(shlex.join(words))


def dataset_of(config: Any) -> list[str]:
    """The settings that choose the dataset of ``config``, and its place."""
    given = {name: getattr(config, name, "") for name in ("dataset", "data_dir", "split", "subset")}
    return [f"{name}={value}" for name, value in given.items() if value and (name, value) != ("split", "train")]


def by_group(cls: type, fields: Sequence[dataclasses.Field[Any]]) -> dict[str, list[dataclasses.Field[Any]]]:
    """Group options by the class that declares them; headings are the first sentences of the docstrings.

    The stage's own options come first, under an empty heading.
    """
    groups: dict[str, list[dataclasses.Field[Any]]] = {"": []}
    for base in _help_order(cls):
        if members := [f for f in fields if owner_of(cls, f.name) is base]:
            own = base is cls or base.__name__ == cls.__name__
            groups.setdefault("" if own else _heading(base), []).extend(members)
    return {heading: members for heading, members in groups.items() if members}


def _help_order(cls: type) -> list[type]:
    bases = list(cls.__mro__)
    for order in [base.__dict__["help_order"] for base in bases if "help_order" in base.__dict__]:
        places = iter([number for number, base in enumerate(bases) if base in order])
        for base in order:
            bases[next(places)] = base
    return bases


def _heading(cls: type) -> str:
    return " ".join((cls.__doc__ or cls.__name__).split("\n\n")[0].split()).rstrip(".")


def help_for(stage: str, arguments: Sequence[str]) -> str:
    """Help of a stage: all options, or, with other arguments such as ``task=classify``, only those that have an effect.

    Raises:
        ConfigError: see :func:`load`.
    """
    rest = [word for word in arguments if not wants_help([word])]
    cls: type[Options] = STAGES[stage]
    usage = program(stage)
    if not rest:
        return help_text(cls, usage)
    own: Settings = dict(parse(rest))
    config: Any = build(cls, _completed(cls, {**_from_files(stage, own)[1], **own}))
    cls = type(config)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    hidden = {f.name for f in dataclasses.fields(cls) if not holds(condition_of(cls, f), values)}
    left = f"\n\n{len(hidden)} more options have no effect with {' '.join(rest)}" if hidden else ""
    return help_text(cls, f"{usage} {' '.join(rest)}", hidden) + left


def wants_help(arguments: Sequence[str]) -> bool:
    return any(word in ("-h", "--help", "help=true") for word in arguments)


def config_for(stage: str, arguments: Sequence[str] | None = None) -> Any:
    """Return the config of a stage's program, or print help or a one-line error and exit."""
    without_pandas()
    arguments = sys.argv[1:] if arguments is None else arguments
    with errors_as_one_line():
        if wants_help(arguments):
            print(help_for(stage, arguments))
            raise SystemExit(0)
        try:
            config = load(stage, arguments)
            require_files(config)
            return config
        except ConfigError as error:
            Life().ended(2, f"error: {error}")  # tells the job script not to retry
            raise


class errors_as_one_line:  # noqa: N801 - used like a function
    """Context manager: a :class:`ConfigError` becomes one line on stderr and exit code 2, an :class:`ExpectedError` the
    same with exit code 1; a closed pipe is ignored."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ConfigError | ExpectedError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
        try:
            if not isinstance(error, BrokenPipeError):
                sys.stdout.flush()
                return
        except BrokenPipeError:
            pass
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        raise SystemExit(0) from None
