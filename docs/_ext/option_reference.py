"""The directive ``options``: a table of every option of a stage, generated from the dataclass that declares them."""

from __future__ import annotations

import dataclasses
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pipeline import cli
from pipeline.config import STAGES, LaunchConfig, StatusConfig

PROGRAMS = {**STAGES, "submit": LaunchConfig, "status": StatusConfig}


class Options(SphinxDirective):
    """``{options} filter`` lists the options of stage=filter."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        lines = [
            "",
            "| option | default | meaning |",
            "|---|---|---|",
            *map(_row, dataclasses.fields(PROGRAMS[self.arguments[0]])),
        ]
        node = nodes.section()
        self.state.nested_parse(StringList(lines, source="options"), self.content_offset, node)
        return list(node.children)


def _row(field: dataclasses.Field[Any]) -> str:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if default is dataclasses.MISSING:
        shown = "required"
    else:
        shown = f"`{text}`" if (text := cli._shown(default)) else ""
    allowed = " \\| ".join(f"`{choice}`" for choice in field.metadata.get("choices") or () if choice)
    allowed = allowed or cli.range_text(field.metadata.get("bounds") or {})
    meaning = field.metadata["help"].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return f"| `{field.name}` | {shown} | {meaning}{f' ({allowed})' if allowed else ''} |"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("options", Options)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
