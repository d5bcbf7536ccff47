"""Number ranges in file names: ``part-{0000..0099}.tar``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.config.schema import ConfigError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST = 1_000_000


def expand(patterns: Sequence[str]) -> list[str]:
    """Expand ``a-{08..11}.tar`` to ``a-08.tar``, ``a-09.tar``, …; several ranges in a pattern give all combinations.

    Raises:
        ConfigError: a range is empty, or there are too many names.
    """
    found: list[str] = []
    for pattern in patterns:
        matched = _RANGE.search(pattern)
        if not matched:
            found.append(pattern)
            continue
        first, last = int(matched[1]), int(matched[2])
        if last < first or last - first >= _MOST:
            raise ConfigError(f"{matched[0]}: an empty or very long range")
        width = len(matched[1])
        head, tail = pattern[: matched.start()], pattern[matched.end() :]
        found += expand([f"{head}{number:0{width}d}{tail}" for number in range(first, last + 1)])
        if len(found) > _MOST:
            raise ConfigError(f"{pattern}: more than {_MOST} files")
    return found
