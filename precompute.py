"""stage=precompute from the checkout: ``accelerate launch --multi_gpu --num_processes 8 precompute.py …``."""

from __future__ import annotations

import sys

from pipeline.config.cli import config_for
from pipeline.stages.precompute import main

_ALIASES = {"--datadir": "--input", "--savedir": "--output"}


def arguments(argv: list[str]) -> list[str]:
    """The arguments with the names that this script is known by turned into those of the stage."""
    translated = []
    for word in argv:
        name, equals, value = word.partition("=")
        translated.append(_ALIASES.get(name, name) + equals + value)
    return translated


if __name__ == "__main__":
    main(config_for("precompute", arguments(sys.argv[1:])))
