"""The directive ``options``: a table of every option of a stage, generated from the dataclass that declares them."""

from __future__ import annotations

import dataclasses
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pipeline.config.options import default_value, option_text, shown
from pipeline.config.schema import STAGES, DoctorConfig, LaunchConfig, StatusConfig

PROGRAMS = {**STAGES, "submit": LaunchConfig, "status": StatusConfig, "doctor": DoctorConfig}


class Options(SphinxDirective):
    """``{options} filter`` lists the options of stage=filter."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        cls = PROGRAMS[self.arguments[0]]
        lines = [
            "",
            "| option | default | meaning |",
            "|---|---|---|",
            *(_row(cls, field) for field in dataclasses.fields(cls)),
        ]
        node = nodes.section()
        self.state.nested_parse(StringList(lines, source="options"), self.content_offset, node)
        return list(node.children)


def _row(cls: type, field: dataclasses.Field[Any]) -> str:
    default = default_value(field)
    if default is dataclasses.MISSING:
        text = "required"
    else:
        text = f"`{shown(default)}`" if shown(default) else ""
    meaning = option_text(cls, field).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return f"| `{field.name}` | {text} | {meaning} |"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("options", Options)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
