"""The directive ``options``: a table of every option of a stage, generated from the dataclass that declares them."""

from __future__ import annotations

import dataclasses
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pipeline.config.cli import by_group
from pipeline.config.options import NEVER, common_condition, condition_of, default_value, option_text, shown
from pipeline.config.schema import STAGES, DoctorConfig, LaunchConfig, StatusConfig

PROGRAMS = {**STAGES, "submit": LaunchConfig, "status": StatusConfig, "doctor": DoctorConfig}


class Options(SphinxDirective):
    """``{options} filter`` lists the options of stage=filter, in the groups of its ``--help``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        cls = PROGRAMS[self.arguments[0]]
        fields = [field for field in dataclasses.fields(cls) if condition_of(cls, field) != NEVER]
        lines = []
        for heading, members in by_group(cls, fields).items():
            condition, additions = common_condition([condition_of(cls, field) for field in members])
            with_ = f" (only with {_escaped(condition)})" if condition else ""
            lines += ["", f"*{_escaped(heading)}*{with_}:"] if heading else []
            lines += ["", "| option | default | meaning |", "|---|---|---|"]
            lines += [_row(cls, field, addition) for field, addition in zip(members, additions, strict=True)]
        node = nodes.section()
        self.state.nested_parse(StringList(lines, source="options"), self.content_offset, node)
        return list(node.children)


def _row(cls: type, field: dataclasses.Field[Any], addition: str) -> str:
    default = default_value(field)
    if default is dataclasses.MISSING:
        text = "required"
    else:
        text = f"`{shown(default)}`" if shown(default) else ""
    return f"| `{field.name}` | {text} | {_escaped(option_text(cls, field, addition))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("options", Options)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
