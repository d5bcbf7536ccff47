"""Rate limits for hosts: few concurrent requests, pauses on request, and no requests to hosts that are down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pipeline.sources.http.target import FetchError

_DOWN_AFTER = 10  # consecutive requests without any response
_DOWN_FOR = 300.0  # seconds
_MOST_HOSTS = 20_000  # remembered hosts before idle ones are dropped


@dataclass(slots=True)
class Host:
    """State of a host. Times are those of the event loop's clock."""

    slots: asyncio.Semaphore
    users: int = 0
    not_before: float = 0.0
    failures: int = 0
    last_failure: float = field(default=float("-inf"))

    def answered(self) -> None:
        self.failures = 0

    def silent(self) -> None:
        """Record that the host could not be reached or did not respond."""
        self.failures += 1
        self.last_failure = asyncio.get_running_loop().time()

    def pause(self, seconds: float) -> None:
        """Send no request to the host for ``seconds``, as it has asked."""
        self.not_before = max(self.not_before, asyncio.get_running_loop().time() + seconds)


class Manners:
    """Limits requests: ``connections`` in total, ``per_host`` at each host, ``per_second`` per host (0: no limit)."""

    def __init__(self, connections: int, per_host: int, per_second: float) -> None:
        self._connections = asyncio.Semaphore(connections)
        self._per_host = per_host
        self._interval = 1 / per_second if per_second else 0.0
        self._hosts: dict[str, Host] = {}

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[Host]:
        """Wait until a request to the host ``name`` is allowed.

        Raises:
            FetchError: ``host_down``, without a request, if the host has not answered the last ones.
        """
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= _MOST_HOSTS:
                self._hosts = {name: host for name, host in self._hosts.items() if host.users or self._recent(host)}
            host = self._hosts[name] = Host(asyncio.Semaphore(self._per_host))
        host.users += 1
        try:
            async with host.slots:
                await self._wait(host)
                if host.failures >= _DOWN_AFTER and self._recent(host):
                    raise FetchError("host_down", f"{_DOWN_AFTER} requests were not answered", retryable=True)
                async with self._connections:
                    yield host
        finally:
            host.users -= 1

    async def _wait(self, host: Host) -> None:
        time = asyncio.get_running_loop().time
        while (left := host.not_before - time()) > 0:
            await asyncio.sleep(left)
        host.not_before = max(host.not_before, time()) + self._interval

    def _recent(self, host: Host) -> bool:
        now = asyncio.get_running_loop().time()
        return host.not_before > now or now - host.last_failure < _DOWN_FOR
