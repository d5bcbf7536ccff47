"""A table of findings: failures first, and identical findings of several nodes only once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from pipeline.doctor.finding import Finding

_ORDER = ("fail", "warn", "skip", "ok")
_LOOK = {"fail": "bold red", "warn": "yellow", "skip": "dim", "ok": "green"}


@dataclass
class Row:
    """One line of the table."""

    state: str
    check: str
    where: list[str]
    text: str
    advice: str


def rows(findings: Iterable[Finding]) -> list[Row]:
    """Merge equal findings of several ranks or nodes into one row, and good findings of the same check."""
    made: dict[tuple[str, ...], Row] = {}
    for finding in findings:
        exact = (finding.text, finding.advice) if finding.state != "ok" else ()
        row = made.setdefault(
            (finding.state, finding.check, *exact),
            Row(finding.state, finding.check, [], finding.text, finding.advice),
        )
        if finding.node and finding.node not in row.where:
            row.where.append(finding.node)
    return sorted(made.values(), key=lambda row: _ORDER.index(row.state))


def render(findings: Iterable[Finding]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "check", "where"):
        table.add_column(name, no_wrap=name != "where", max_width=24 if name == "where" else None)
    table.add_column("what was found; what to do", overflow="fold", ratio=1)
    for row in rows(findings):
        where = (
            row.where[0]
            if len(row.where) == 1
            else f"{len(row.where)} nodes"
            if row.state == "ok"
            else ", ".join(row.where)
        )
        text = escape(row.text) + (f"\n[bold]→ {escape(row.advice)}[/]" if row.advice and row.state != "ok" else "")
        table.add_row(
            f"[{_LOOK[row.state]}]{row.state}[/]", escape(row.check), escape(where if row.where else ""), text
        )
    return table


def verdict(findings: list[Finding]) -> str:
    """The summary line below the table."""
    shown = rows(findings)
    fails, warns = (sum(row.state == state for row in shown) for state in ("fail", "warn"))
    if fails:
        return f"{fails} check{'s' * (fails > 1)} failed" + (f", {warns} warning{'s' * (warns > 1)}" if warns else "")
    return f"no check failed; {warns} warning{'s' * (warns > 1)}" if warns else "nothing is wrong"
