"""Scores of samples by name.

``stage=score`` computes those named in ``scorers=``. Scores from pixels and captions are functions, registered by
:func:`scorer`; those from models (``embedding:<model>``, ``head:<file>``, ...) are subclasses of
:class:`pipeline.encoders.model_scores.ModelScorer`. An installed package adds either with an entry point of the group
``latentmill.scorers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config.options import ConfigError
from pipeline.curation.scorers.base import Scorer, scorer
from pipeline.registry import scorers

__all__ = ["Scorer", "get_scorer", "get_scorers", "scorer"]


def get_scorer(name: str) -> Any:
    """Return the :class:`Scorer` called ``name``, or the class of a scorer that uses a model, for ``<scorer>:<model>``.

    Raises:
        ConfigError: There is no such scorer, or a model is missing, or is given for a scorer that does not use one.
    """
    kind, _, model = name.partition(":")
    found = scorers.get(kind)
    if isinstance(found, type) and not model:
        raise ConfigError(f"scorers={name}: name its model, as {kind}:<model>")
    if isinstance(found, Scorer) and name != kind:
        raise ConfigError(f"scorers={name}: {kind} accepts nothing after a colon")
    return found


def get_scorers(names: Sequence[str]) -> dict[str, Any]:
    """Return the scorers called ``names``, in this order.

    Raises:
        ConfigError: A scorer is unknown or listed twice, or the list is empty.
    """
    if not names:
        raise ConfigError(f"scorers=: name at least one of {', '.join(scorers)}")
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise ConfigError(f"scorers={twice[0]}: is named twice")
    return {name: get_scorer(name) for name in names}
