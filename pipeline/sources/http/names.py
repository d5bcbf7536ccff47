"""Resolves host names: addresses are cached, checked, and used for the connection unchanged."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver

from pipeline.sources.http.target import FetchError, is_internal

_REMEMBERED = 300.0  # seconds that a result, or a failure, is cached
_MOST = 100_000  # cached names
_LOOKUPS = 32  # concurrent lookups; the system's resolver blocks


class Names(AbstractResolver):
    """Looks up names in threads and caches the results; rejects names with an internal address."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._known: dict[str, tuple[float, asyncio.Future[list[str]]]] = {}
        self._threads = ThreadPoolExecutor(_LOOKUPS, "names")

    async def addresses(self, host: str) -> list[str]:
        """The addresses of ``host``; the connection that follows uses the same ones.

        Raises:
            FetchError: ``dns`` if there is none, ``private_address`` if one is not globally routable.
        """
        loop = asyncio.get_running_loop()
        expires, answer = self._known.get(host, (0.0, None))
        if answer is None or loop.time() >= expires:
            if len(self._known) >= _MOST:
                self._known.clear()
            answer = asyncio.ensure_future(self._look_up(host))
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieve the exception
            self._known[host] = loop.time() + _REMEMBERED, answer
        return await asyncio.shield(answer)

    async def _look_up(self, host: str) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, _lookup, host)
        if not found:
            raise FetchError("dns", host, at_once=True)
        if not self._allow_private and any(is_internal(address) for address in found):
            raise FetchError("private_address", "allow_private_hosts=true would allow it", retryable=True)
        return found

    def forget(self, host: str) -> None:
        """Remove ``host`` from the cache."""
        self._known.pop(host, None)

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[Any]:
        """Called by aiohttp to get the addresses to connect to."""
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in await self.addresses(host)
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _lookup(host: str) -> list[str]:
    """The addresses of ``host``; empty if it cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
