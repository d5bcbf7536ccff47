"""Conclusions from the findings of all ranks together."""

from __future__ import annotations

import statistics
from collections import defaultdict

from launch.checkup.start import Heard
from pipeline.doctor.finding import Finding

_SLOW = 0.5  # share of the median speed of all nodes below which a node is slow
_LAST_LINES = 3
_MARKS = ("start", "end")  # findings that only show that a rank is alive


def judge(heard: Heard) -> list[Finding]:
    """The findings of all ranks, plus findings from comparing them."""
    shown = [finding for finding in heard.findings if finding.check not in _MARKS]
    return [*shown, *_silent(heard), *_different(shown), *_slow(shown)]


def _silent(heard: Heard) -> list[Finding]:
    """Findings about ranks that did not finish."""
    wanted = set(range(heard.ranks)) if heard.ranks else {-1}
    ended = {finding.rank for finding in heard.findings if finding.check == "end"}
    begun = {finding.rank: finding.node for finding in heard.findings}
    last = "; ".join(heard.other[-_LAST_LINES:])
    said = f"; last lines: {last}" if last else ""
    found = []
    by_node: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(wanted - ended):
        by_node[begun.get(rank, "")].append(rank)
    for node, ranks in by_node.items():
        who = f"ranks {_numbers(ranks)}" if heard.ranks else "the check"
        how = "started but did not finish" if node else "never began"
        found.append(Finding("ranks", "fail", f"{who} {how}{said}", "see the log of its node, or of SLURM", node=node))
    return found


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (", …" if len(ranks) > 16 else "")


def _different(findings: list[Finding]) -> list[Finding]:
    """Findings about nodes whose Python, packages or driver differ from the others."""
    found = []
    for key, what in (("python", "Python"), ("packages", "packages"), ("driver", "driver")):
        nodes: dict[str, list[str]] = defaultdict(list)
        for finding in findings:
            if key in finding.values and finding.node not in nodes[str(finding.values[key])]:
                nodes[str(finding.values[key])].append(finding.node)
        if len(nodes) > 1:
            groups = sorted(nodes.values(), key=len)
            text = f"{what} of {', '.join(groups[0])} are not those of {', '.join(groups[-1])}"
            advice = "use one environment on a file system that all nodes see; otherwise results may differ"
            found.append(
                Finding("same environment", "warn" if key == "driver" else "fail", text, advice, node=groups[0][0])
            )
    return found


def _slow(findings: list[Finding]) -> list[Finding]:
    """Findings about nodes that decode much more slowly than the others."""
    speeds = {finding.node: float(finding.values["decode"]) for finding in findings if "decode" in finding.values}
    if len(speeds) < 3:
        return []
    median = statistics.median(speeds.values())
    advice = "is it throttled, or used by others? exclude= it"
    return [
        Finding(
            "slow node", "warn", f"decodes {speed:,.0f} images a second, the median is {median:,.0f}", advice, node=node
        )
        for node, speed in speeds.items()
        if speed < _SLOW * median
    ]
