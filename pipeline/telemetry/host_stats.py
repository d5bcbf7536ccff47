"""Statistics of downloads by host: how many images were kept, and why others were not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Said = Mapping[str, Mapping[str, int]]
"""Host → reason (empty: kept) → samples; JSON-able."""

OTHERS = "(others)"
_MOST = 5000  # hosts that are counted separately
_REASONS = 4  # reasons shown per host


@dataclass(frozen=True, slots=True)
class HostStatus:
    """Counts of one host; ``reasons`` lists the most common reasons for images that were not kept."""

    host: str
    asked: int
    kept: int
    reasons: str


class Hosts:
    """Counts the outcomes of downloads by host; of very many hosts, only those with the most samples."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def add(self, url: str, outcome: str, reason: str) -> None:
        """Count a sample; does nothing if ``url`` is not a URL."""
        if "://" in url:
            try:
                host = urlsplit(url).hostname or "?"
            except ValueError:
                host = "?"
            self.merge({host: {"" if outcome == "kept" else reason: 1}})

    def merge(self, said: Said) -> None:
        """Add the counts of another object, from :meth:`said`."""
        for host, reasons in said.items():
            self._counts.setdefault(host, Counter()).update(reasons)
        if len(self._counts) > _MOST:
            self._counts = {host: Counter(reasons) for host, reasons in self.said(_MOST // 2).items()}

    def said(self, most: int) -> dict[str, dict[str, int]]:
        """Counts of the ``most`` hosts with the most samples, and of all others together."""
        rest = self._counts.get(OTHERS, Counter())
        ranked = sorted((h for h in self._counts if h != OTHERS), key=lambda h: (-self._counts[h].total(), h))
        others = sum((self._counts[host] for host in ranked[most:]), rest)
        found = {host: dict(self._counts[host]) for host in ranked[:most]}
        return found | ({OTHERS: dict(others)} if others else {})

    def statuses(self, most: int) -> list[HostStatus]:
        """The counts of :meth:`said` in the form in which they are shown."""
        return [_status(host, Counter(reasons)) for host, reasons in self.said(most).items()]


def _status(host: str, counts: Counter[str]) -> HostStatus:
    reasons = ", ".join(f"{reason} {n}" for reason, n in counts.most_common(_REASONS + 1) if reason)
    return HostStatus(host, counts.total(), counts[""], reasons)


def hosts_of(event: Mapping[str, Any]) -> Said:
    """The counts by host in an event of a process; empty if it has none."""
    said = event.get("hosts")
    return said if isinstance(said, dict) else {}
