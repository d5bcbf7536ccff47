"""Sphinx settings. ``make docs`` builds the pages into docs/_build/html; a warning is an error."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]

project = "Latentmill"
author = "The Latentmill authors"
copyright = author
release = importlib.metadata.version("latentmill")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "option_reference",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = "Latentmill"
html_static_path: list[str] = []
