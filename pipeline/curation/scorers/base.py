"""The class of a score, and the decorator that turns a function into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

from pipeline.config.options import ConfigError
from pipeline.registry import scorers

Kind = Literal["pixels", "caption"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Scorer:
    """A score that is a function of one image or one caption.

    Attributes:
        name: Its name in ``scorers=``, which is also the name of its column.
        kind: What it is computed from: ``pixels`` or ``caption``.
        type: Type of its column: ``float``, ``int`` or ``str``; for ``pixels`` always ``float``.
        function: A function of a :class:`~pipeline.curation.scorers.pixels.View` or of a caption (str).
        revision: Increase this when the value for the same sample changes, so that old values are not reused.
        package: The optional distribution that computes it, if any; values of other versions are not reused.
    """

    name: str
    kind: Kind
    type: str
    function: Callable[[Any], Any]
    revision: int = 1
    package: str = ""

    @property
    def __wrapped__(self) -> Callable[[Any], Any]:
        return self.function

    def describe(self) -> str:
        """What its values depend on in addition to the sample.

        Raises:
            ConfigError: The package that computes it is not installed.
        """
        if not self.package:
            return f"version {self.revision}"
        try:
            return f"version {self.revision}, {self.package} {version(self.package)}"
        except PackageNotFoundError:
            raise ConfigError(
                f"scorers={self.name} needs the package {self.package}: pip install latentmill[curation]"
            ) from None


def scorer(kind: Kind, type: str = "float", *, revision: int = 1, package: str = "") -> Callable[[F], F]:
    """Decorator that registers a function as the score of the same name. The arguments are those of :class:`Scorer`.

    Raises:
        ConfigError: The name is taken, or the type is not allowed for this kind.
    """

    def add(function: F) -> F:
        name = function.__name__
        if type not in (("float",) if kind == "pixels" else ("float", "int", "str")):
            raise ConfigError(f"scorers={name}: type={type}: expected float{', int or str' * (kind == 'caption')}")
        scorers.add(name, Scorer(name, kind, type, function, revision, package))
        return function

    return add
