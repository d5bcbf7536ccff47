"""Registries of everything that settings choose by name: sources, formats, encoders, tasks, stages and scorers.

A decorator registers a class under a name::

    @sources.register("zarr", ZarrOptions)
    class Zarr(Source): ...

Built-in names are listed in a table together with the module that registers them, so that listing names and options
imports none of these modules. An installed package adds a name with an entry point of the registry's group
(``latentmill.sources``, ``latentmill.formats``, ``latentmill.autoencoders``, ``latentmill.text_encoders``,
``latentmill.image_encoders``, ``latentmill.vision_encoders``, ``latentmill.tasks``, ``latentmill.stages``,
``latentmill.scorers``). The entry point has the same name, and refers to the decorated class or to its module.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C")


class ConfigError(ValueError):
    """A setting is wrong. The message is one line that names it; programs exit with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class ExpectedError(RuntimeError):
    """Something that a person can mend, such as damaged data. Programs show the message as one line, without a
    traceback, and exit with code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: names similar to ``word``, or all names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(filter(None, names))}"


@dataclass(frozen=True)
class Builtin:
    """The module that registers a built-in name, and its options."""

    module: str
    options: str = ""
    """``module:class`` of its options, in a module that is quick to import; empty if it has no options of its own."""
    usage: str = ""
    """How the value is written if the name alone is not enough: ``clip:<repo or folder>``."""


@dataclass(frozen=True)
class Registered:
    """A registered object, and the dataclass of its options, if it has any."""

    object: Any
    options: type[Any] | None = None


@dataclass(frozen=True)
class Traits:
    """Properties of a stage that the launcher, the help and the engine need without importing it; declared with its
    options."""

    upstream: tuple[str, ...] = ()
    """The stages whose output it reads by default: the first one whose output exists."""
    partitioned: bool = False
    """It writes a dataset directory, partition by partition; any number of ranks may share the work."""
    single: bool = False
    """It runs as a single process, whatever number of ranks is requested, unless ``partitioned_with`` is set."""
    partitioned_with: str = ""
    """Option that makes the stage partitioned."""
    lockstep: bool = False
    """Its ranks wait for each other, so that all of them must run at the same time."""
    gpus: bool = False
    """It computes on GPUs if there are any."""
    reads_run: bool = False
    """It uses a finished training run, and does not read the output of the preceding stage in a command."""


class Registry(Generic[T]):
    """The possible values of one setting.

    Args:
        setting: Name of the setting in error messages, such as ``source``.
        group: Group of the entry points of installed packages.
        builtin: The built-in names, in the order in which they are listed.
    """

    def __init__(self, setting: str, group: str, builtin: Mapping[str, Builtin]) -> None:
        self.setting = setting
        self.group = group
        self.builtin = dict(builtin)
        self.added: dict[str, Registered] = {}

    def register(self, name: str, options: type | None = None) -> Callable[[C], C]:
        """Decorator that registers a class as ``name``; ``options`` is the dataclass of its options.

        Raises:
            ConfigError: The name is not an identifier, or is taken.
        """

        def add(found: C) -> C:
            self.add(name, found, options)
            return found

        return add

    def add(self, name: str, found: Any, options: type | None = None) -> None:
        """Register any object; see :meth:`register`."""
        if not name.isidentifier():
            raise ConfigError(f"{self.setting}={name!r}: expected letters, digits and _")
        kind = _definition(found)
        module = kind.__module__
        known, other = self.builtin.get(name), self.added.get(name)
        if known is not None and module not in (known.module, "__main__"):
            raise ConfigError(
                f"{self.setting}={name}: there is another {self.setting} of this name, built in: {module} needs "
                "another name"
            )
        if other is not None:
            before = _definition(other.object)
            if before.__qualname__ != kind.__qualname__:
                raise ConfigError(
                    f"{self.setting}={name}: both {before.__module__} and {module} register this name: remove one of "
                    "the two packages"
                )
        self.added[name] = Registered(found, options)

    def get(self, name: str) -> T:
        """Return the object called ``name``; its module is imported on first use.

        Raises:
            ConfigError: There is no such name, or its module cannot be imported.
        """
        found: T = self._find(name).object
        return found

    def options(self, name: str) -> type[Any] | None:
        """Return the dataclass of the options of ``name``; None if it has none.

        Raises:
            ConfigError: There is no such name, or its module cannot be imported.
        """
        known = self.builtin.get(name)
        if known is None or name in self.added:
            return self._find(name).options
        if not known.options:
            return None
        module, _, attribute = known.options.partition(":")
        found: type[Any] = getattr(import_module(module), attribute)
        return found

    def usage(self, name: str) -> str:
        """How ``name`` is written if it needs more than the name, such as ``clip:<repo or folder>``; otherwise empty.

        Classes of installed packages define it as the class attribute ``usage``.
        """
        if name in self.builtin:
            return self.builtin[name].usage
        return str(getattr(self._find(name).object, "usage", ""))

    def module(self, name: str) -> str:
        """Return the module that registers ``name``."""
        if name in self.builtin:
            return self.builtin[name].module
        module = str(_definition(self._find(name).object).__module__)
        return _points(self.group)[name].module if module == "__main__" and name in _points(self.group) else module

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in self.added or name in _points(self.group)

    def __iter__(self) -> Iterator[str]:
        yield from self.builtin  # installed packages are searched only for other names
        yield from [name for name in dict.fromkeys((*self.added, *_points(self.group))) if name not in self.builtin]

    def installed(self) -> list[str]:
        """The names that are not built in."""
        return [name for name in self if name not in self.builtin]

    def _find(self, name: str) -> Registered:
        if name not in self.added:
            if name in self.builtin:
                import_module(self.builtin[name].module)
            elif name in _points(self.group):
                self._load(_points(self.group)[name])
        if name not in self.added:
            raise ConfigError(self.unknown(name))
        return self.added[name]

    def _load(self, point: EntryPoint) -> None:
        package = point.dist.name if point.dist else point.value
        try:
            found = point.load()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self.setting}={point.name}: the installed package {package} cannot be loaded "
                f"({type(error).__name__}: {error}): update or uninstall it"
            ) from error
        if point.name not in self.added:
            if inspect.ismodule(found):
                raise ConfigError(
                    f"{self.setting}={point.name}: the module {point.value} of the installed package {package} does "
                    f"not register this name (@{self.group.partition('.')[2]}.register({point.name!r}))"
                )
            self.add(point.name, found)

    def unknown(self, name: str) -> str:
        """The error message for an unknown name."""
        return (
            f"{self.setting}={name}: {nearest(name, self)} (a package of your own adds one with an entry point of the "
            f"group {self.group})"
        )


def _definition(found: Any) -> Any:
    """The class or function that ``found`` is, wraps, or is an instance of."""
    found = inspect.unwrap(found)
    return found if inspect.isclass(found) or inspect.isfunction(found) else type(found)


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    """Entry points of the installed packages: name → entry point.

    Raises:
        ConfigError: two packages have an entry point of the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in _all_points().select(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            packages = " and ".join(str(p.dist.name if p.dist else p.value) for p in (other, point))
            raise ConfigError(f"{group}: the packages {packages} both add {point.name!r}: uninstall one of them")
    return found


@cache
def _all_points() -> Any:
    """Entry points of all installed packages; cached, because a file of each package is opened."""
    return entry_points()


def forget_entry_points() -> None:
    """Search for entry points again, after a package was installed or removed in this process."""
    _points.cache_clear()
    _all_points.cache_clear()


def _in(package: str, *names: str, options: str = "") -> dict[str, Builtin]:
    return {name: Builtin(f"{package}.{name}", options) for name in names}


sources: Registry[Any] = Registry(
    "source",
    "latentmill.sources",
    _in(
        "pipeline.sources",
        *("shapes", "digits", "image_folder", "url_list", "http_archive", "huggingface", "webdataset", "parquet"),
        *("ipc", "mds", "hdf5", "npy", "torchvision"),
    ),
)
"""Subclasses of :class:`pipeline.sources.base.Source`."""

formats: Registry[Any] = Registry(
    "format",
    "latentmill.formats",
    _in("pipeline.formats", "mds", "tar", "parquet", "ipc", "memmap", "hdf5", "reference", "pointer", "scores"),
)
"""Subclasses of :class:`pipeline.formats.base.Format`, or instances."""

_OPENCLIP, _CLIP = "openclip:<model>[:<pretrained>]", "clip:<repo or folder>"


def _encoders(setting: str, kind: str, **builtin: tuple[str, str]) -> Registry[Any]:
    found = {name: Builtin(f"pipeline.encoders.{module}", usage=usage) for name, (module, usage) in builtin.items()}
    return Registry(setting, f"latentmill.{kind}", found)


autoencoders = _encoders(
    "vae",
    "autoencoders",
    embedded=("embedded", ""),
    embedded16=("embedded", ""),
    diffusers=("diffusers", "diffusers:<repo or folder>"),
)
"""Subclasses of :class:`pipeline.encoders.base.Autoencoder`."""

text_encoders = _encoders(
    "text_encoder",
    "text_encoders",
    embedded=("embedded", ""),
    openclip=("openclip", _OPENCLIP),
    clip=("transformers", _CLIP),
    t5=("transformers", "t5:<repo or folder>"),
    hf=("language_model", "hf:<repo or folder>"),
)
"""Subclasses of :class:`pipeline.encoders.base.TextEncoder`."""

image_encoders = _encoders(
    "image_encoder",
    "image_encoders",
    embedded=("embedded", ""),
    openclip=("openclip", _OPENCLIP),
    clip=("transformers", _CLIP),
    hf=("image_text", "hf:<repo or folder>"),
    program=("image_text", "program:<file>"),
)
"""Subclasses of :class:`pipeline.encoders.base.ImageEncoder`."""

vision_encoders = _encoders(
    "encoder",
    "vision_encoders",
    embedded=("vision", ""),
    vit=("vision", "vit:<repo or folder>"),
    clip=("vision", _CLIP),
    openclip=("vision", _OPENCLIP),
    program=("vision", "program:<file>"),
)
"""Subclasses of :class:`pipeline.encoders.vision.VisionEncoder`."""

tasks: Registry[Any] = Registry(
    "task",
    "latentmill.tasks",
    {
        "diffuse": Builtin("pipeline.training.tasks.diffuse", "pipeline.config.train:DiffuseOptions"),
        "classify": Builtin("pipeline.training.tasks.classify", "pipeline.config.train:ClassifyOptions"),
        "caption": Builtin("pipeline.training.tasks.caption", "pipeline.config.train:CaptionTaskOptions"),
    },
)
"""Subclasses of :class:`pipeline.training.tasks.base.Task`."""


def _stage(name: str, options: str) -> Builtin:
    return Builtin(f"pipeline.stages.{name}", f"pipeline.config.{options}")


stages: Registry[Any] = Registry(
    "stage",
    "latentmill.stages",
    {
        "download": _stage("download", "sources:DownloadConfig"),
        "filter": _stage("filter", "filter:FilterConfig"),
        "dedup": _stage("dedup", "dedup:DedupConfig"),
        "score": _stage("score", "curate:ScoreConfig"),
        "select": _stage("select", "curate:SelectConfig"),
        "recaption": _stage("recaption", "recaption:RecaptionConfig"),
        "shard": _stage("shard", "shard:ShardConfig"),
        "texts": _stage("texts", "encode:TextsConfig"),
        "precompute": _stage("precompute", "encode:PrecomputeConfig"),
        "features": _stage("features", "encode:FeaturesConfig"),
        "train": _stage("train", "train:TrainConfig"),
        "generate": _stage("generate", "generate:GenerateConfig"),
        "evaluate": _stage("evaluate", "evaluate:EvaluateConfig"),
        "cost": _stage("cost", "tools:CostConfig"),
        "caption": _stage("caption", "caption:CaptionConfig"),
        "feidegger": _stage("feidegger", "tools:FeideggerConfig"),
        "verify": _stage("verify", "tools:VerifyConfig"),
        "repair": _stage("repair", "tools:RepairConfig"),
        "gc": _stage("gc", "tools:GcConfig"),
        "compact": _stage("compact", "tools:CompactConfig"),
        "publish": _stage("publish", "tools:PublishConfig"),
        "takedown": _stage("takedown", "tools:TakedownConfig"),
        "report": _stage("report", "tools:ReportConfig"),
    },
)
"""Subclasses of :class:`pipeline.partitions.stage.Stage`, or functions for tools."""


def _scorers(module: str, *names: str) -> dict[str, Builtin]:
    return {name: Builtin(module) for name in names}


scorers: Registry[Any] = Registry(
    "scorers",
    "latentmill.scorers",
    {
        **_scorers(
            "pipeline.curation.scorers.pixels",
            *("sharpness", "local_sharpness", "contrast", "brightness", "clipped", "entropy", "flat_share", "border"),
            *("seam", "colourfulness", "grey_share", "aspect", "min_edge", "jpeg_quality"),
        ),
        **_scorers(
            "pipeline.curation.scorers.caption_scores",
            *("caption_length", "caption_words", "caption_repetition", "caption_nonwords", "language"),
            "language_probability",
        ),
        **_scorers("pipeline.curation.scorers.networks", "text_area", "nsfw"),
        **_scorers(
            "pipeline.encoders.model_scores",
            *("embedding", "clip_similarity", "head", "classifier", "perplexity"),
        ),
    },
)
"""Instances of :class:`pipeline.curation.scorers.Scorer`, and subclasses of
:class:`pipeline.encoders.model_scores.ModelScorer`."""

captioners: Registry[Any] = Registry(
    "captioner",
    "latentmill.captioners",
    {
        "transformers": Builtin("pipeline.captioning.vision_language"),
        "openai": Builtin("pipeline.captioning.openai"),
        "checkpoint": Builtin("pipeline.captioning.trained_captioner"),
    },
)
"""Functions ``make(place, config, rank)`` that return a :class:`pipeline.captioning.base.Captioner`."""
