"""The result of one check: a state, what was found, and how to fix it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "warn", "fail", "skip"]
MARK = "@latentmill-doctor "
"""Prefix of a line that contains a finding, to recognize it in the output of a job."""


@dataclass(frozen=True)
class Finding:
    """The result of one check on one rank, or on the machine from which the job is submitted."""

    check: str
    state: State
    text: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    """Measured values by name, to compare ranks."""
    node: str = ""
    rank: int = -1
    """-1: not a rank of a job."""

    def line(self) -> str:
        return MARK + json.dumps(dataclasses.asdict(self), ensure_ascii=True)


def read(lines: Iterable[str]) -> Iterator[Finding]:
    """The findings in ``lines``; incomplete lines, for example at the end of a job that was cancelled, are skipped."""
    names = {f.name for f in dataclasses.fields(Finding)}
    for line in lines:
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                values = json.loads(text)
                yield Finding(**{name: value for name, value in values.items() if name in names})
            except (ValueError, TypeError, AttributeError):
                continue


class Report:
    """Prints the findings of one process, each immediately, because the next check may hang."""

    def __init__(self, node: str, rank: int) -> None:
        self.node, self.rank = node, rank
        self._lock = threading.Lock()

    def add(self, *findings: Finding) -> None:
        with self._lock:
            for finding in findings:
                placed = dataclasses.replace(finding, node=finding.node or self.node, rank=self.rank)
                # a single write that begins a new line: other processes may be in the middle of one
                os.write(sys.stdout.fileno(), f"\n{placed.line()}\n".encode())

    def run(self, check: str, look: Callable[[], Iterable[Finding]], seconds: float) -> bool:
        """Add the findings of ``look``; if it raises or takes more than ``seconds``, add that as a finding.

        Returns:
            Whether it ended in time.
        """
        ended = threading.Event()

        def work() -> None:
            try:
                self.add(*look())
            except Exception as error:  # the other checks continue after any error
                first = str(error).partition("\n")[0]
                self.add(Finding(check, "fail", f"{type(error).__name__}: {first}"))
            ended.set()

        threading.Thread(target=work, name=f"doctor-{check}", daemon=True).start()
        if not ended.wait(seconds):
            self.add(Finding(check, "fail", f"no answer within {seconds:g} s", "it would hang a job in the same way"))
        return ended.is_set()
