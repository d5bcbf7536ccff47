"""Downloads files from untrusted hosts: addresses are checked and pinned, sizes and times are limited.

Uses aiohttp in one event loop. A file is written to a :class:`Sink`, which may already hold a part of it. Objects in
stores follow the same path and limits; :mod:`pipeline.stores` reads them in threads.
"""

from __future__ import annotations

import asyncio
import base64
import random
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from itertools import count
from typing import Any, Protocol, TypeVar

import aiohttp
from multidict import CIMultiDict, MultiMapping
from yarl import URL

from pipeline.sources.http.manners import Host, Manners
from pipeline.sources.http.names import Names
from pipeline.sources.http.target import FetchError, Target, check
from pipeline.stores import Store, StoreError, is_url

_REDIRECTS = 5
_REDIRECT_CODES = (301, 302, 303, 307, 308)
_CONNECT = 30.0  # maximum seconds to wait for a connection
_SLOWEST = 1000  # bytes per second, on average over ``timeout`` seconds
_AT_ONCE = (408, 425, 429, 500, 502, 503, 504)  # retried soon
_LATER = (401, 403)  # retryable with other credentials or a newly signed URL
_BUSY = (429, 503)  # concerns the host, not one file
_LONGEST_PAUSE = 60.0
_LOOK = 0.5  # seconds between checks whether to stop
_LARGE = 1 << 20  # bytes; only _LARGE_AT_ONCE larger bodies are received at a time
_LARGE_AT_ONCE = 8
_THREADS = 32  # concurrent requests to object stores
_STRONG_AGE = 60.0  # seconds from Last-Modified to Date that make the former a strong validator

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits of a download, and where it may come from.

    ``timeout``: seconds with (almost) no data; ``deadline``: seconds in total, without waiting for a slot; ``retries``:
    number of tries after the first one; ``per_second``: requests per host, 0 for no limit; ``step``: called often, may
    raise.
    """

    timeout: float = 60.0
    deadline: float = 86400.0
    retries: int = 3
    max_bytes: int = 2**40
    allow_private_hosts: bool = False
    connections: int = 64
    per_host: int = 8
    per_second: float = 0.0
    user_agent: str = "latentmill"
    step: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Head:
    """The header of a response.

    ``offset``: position of the body in the file; ``length``: bytes of the whole file, -1 if unknown; ``validator``:
    ETag or otherwise Last-Modified; ``strong``: whether ``validator`` is unique to this version of the file.
    """

    offset: int
    length: int
    validator: str
    strong: bool
    headers: MultiMapping[str] = field(repr=False)


class Sink(Protocol):
    """Receives the bytes of a file."""

    def have(self) -> tuple[int, str]:
        """Number of bytes that an earlier try has stored, and the (strong) validator of their version."""

    def begin(self, head: Head) -> None:
        """Start a response; ``head.offset`` is 0 or the number of bytes that :meth:`have` returned."""

    def write(self, data: bytes, /) -> object:
        """Append ``data``."""


@dataclass(slots=True)
class _Budget:
    """Seconds left for a file; only time within :meth:`spending` counts, and retry delays."""

    left: float
    deadline: float

    @asynccontextmanager
    async def spending(self, most: float) -> AsyncIterator[None]:
        """Raise FetchError ``timeout`` after ``most`` seconds, or ``deadline`` when no time is left."""
        time = asyncio.get_running_loop().time
        begin = time()
        last = self.left <= most
        try:
            async with asyncio.timeout(min(most, max(self.left, 0))):
                yield
        except TimeoutError:
            if last:
                raise self.over() from None
            raise FetchError("timeout", f"no byte within {most:g} s", at_once=True) from None
        finally:
            self.left -= time() - begin

    def over(self) -> FetchError:
        return FetchError("deadline", f"more than {self.deadline:g} s", retryable=True)


class Client:
    """Fetches any number of files concurrently. An async context manager for one event loop."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.names = Names(policy.allow_private_hosts)
        self.manners = Manners(policy.connections, policy.per_host, policy.per_second)
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._threads = ThreadPoolExecutor(_THREADS, "stores")

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self.names, use_dns_cache=False, limit=0, ssl=_tls(), keepalive_timeout=10.0
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(self.policy.timeout, _CONNECT)),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={"User-Agent": self.policy.user_agent, "Accept-Encoding": "identity", "Accept": "*/*"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self.names.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str, sink: Sink, headers: Mapping[str, str] | None = None) -> int:
        """Download ``url`` into ``sink``, retrying transient errors, and return its size in bytes.

        ``headers`` and credentials in the URL are sent only to the server of ``url``. For an object in a store, only
        ``If-Match``, the required version, is used.

        Raises:
            FetchError: ``bad_url``, ``dns``, ``private_address``, ``too_many_redirects``, ``http_404`` and the like,
                ``tls``, ``too_many_bytes``, ``truncated``, ``connection``, ``timeout``, ``deadline`` or ``host_down``;
                for stores ``missing``, ``denied``, ``changed_since_plan`` or ``store_failed``.
                Retryable if the server, a new signature or another setting may fix it.
            OSError: the sink cannot be written.
        """
        check(url)
        target = Store(url) if is_url(url) else Target.parse(url)
        budget = _Budget(self.policy.deadline, self.policy.deadline)
        for attempt in count():
            self.policy.step()
            try:
                if isinstance(target, Store):
                    return await self._object(target, sink, (headers or {}).get("If-Match", ""), budget)
                return await self._try(target, sink, dict(headers or {}), budget)
            except FetchError as error:
                wait = max(error.wait, min(_LONGEST_PAUSE, 0.5 * 2**attempt * random.uniform(0.5, 1.5)))
                patient = wait <= _LONGEST_PAUSE and wait < budget.left
                if not (error.at_once and attempt < self.policy.retries and patient):
                    raise
            await _sleep(wait)
            budget.left -= wait
        raise AssertionError("unreachable")

    async def _try(self, start: Target, sink: Sink, headers: dict[str, str], budget: _Budget) -> int:
        """Follow redirects, checking each address, and download the body."""
        target = start
        for _ in range(_REDIRECTS + 1):
            have, version = sink.have()
            asking = headers if target.origin == start.origin else {}
            if have:
                asking = {**asking, "Range": f"bytes={have}-", "If-Range": version}
            async with (
                self.manners.turn(target.netloc) as host,
                self._answer(target, asking, host, budget) as response,
            ):
                location = response.headers.get("Location")
                if response.status in _REDIRECT_CODES and location:
                    target = target.follow(location)
                    continue
                if response.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                    raise _refusal(response, host)
                return await self._copy(_head(response, have), lambda: self._received(response, budget), sink)
        raise FetchError("too_many_redirects", f"more than {_REDIRECTS}")

    @asynccontextmanager
    async def _answer(
        self, target: Target, headers: Mapping[str, str], host: Host, budget: _Budget
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Request ``target`` and yield the response once its headers have arrived."""
        if target.credentials:
            headers = {**headers, "Authorization": f"Basic {base64.b64encode(target.credentials).decode()}"}
        try:
            async with budget.spending(self.policy.timeout):
                await self.names.addresses(target.host)
                with _network("connection"):
                    url = URL(target.url, encoded=True)
                    response = await self._session.get(url, headers=headers, allow_redirects=False)
        except FetchError as error:
            if error.reason in ("dns", "connection", "timeout"):
                host.silent()
            raise
        host.answered()
        async with response:
            yield response

    async def _received(self, response: aiohttp.ClientResponse, budget: _Budget) -> bytes:
        """The next bytes of a body; empty at its end."""
        async with budget.spending(self.policy.timeout):
            with _network("truncated"):
                return await response.content.readany()

    async def _object(self, store: Store, sink: Sink, wanted: str, budget: _Budget) -> int:
        """Download an object of the version ``wanted`` (empty: any) into the sink and return its size."""

        async def asked(do: Callable[[], T]) -> T:
            async with budget.spending(self.policy.timeout):
                return await asyncio.get_running_loop().run_in_executor(self._threads, _of_store, do)

        have, version = sink.have()
        if wanted and version != wanted:
            have = 0
        async with self.manners.turn(store.bucket) as host:
            try:
                found, pieces = await asked(lambda: store.get("", have, wanted or (version if have else "")))
            except FetchError as error:
                if error.reason != "changed_since_plan" or wanted:
                    raise
                have = 0  # the stored bytes belong to another version
                found, pieces = await asked(lambda: store.get("", 0, ""))
            host.answered()
            head = Head(have, found.size, found.etag, bool(found.etag), CIMultiDict())
            return await self._copy(head, lambda: asked(lambda: next(pieces, b"")), sink)

    async def _copy(self, head: Head, read: Callable[[], Awaitable[bytes]], sink: Sink) -> int:
        """Copy the body, which ``read`` returns piece by piece, to the sink; return the size of the whole file."""
        if head.length > self.policy.max_bytes:
            raise FetchError("too_many_bytes", f"{head.length}, more than {self.policy.max_bytes}", retryable=True)
        sink.begin(head)
        size = head.offset
        pace = _Pace(self.policy.timeout)
        large = False
        try:
            while True:
                self.policy.step()
                if not (data := await read()):
                    break
                size += len(data)
                if size > self.policy.max_bytes:
                    raise FetchError("too_many_bytes", f"more than {self.policy.max_bytes}", retryable=True)
                pace.check(len(data))
                sink.write(data)
                if not large and size > _LARGE:
                    large = await self._large.acquire()
                    pace = _Pace(self.policy.timeout)
        finally:
            if large:
                self._large.release()
        if size < head.length:
            raise FetchError("truncated", f"{size} bytes came, {head.length} were announced", at_once=True)
        return size


def _of_store(do: Callable[[], T]) -> T:
    """Call ``do`` and convert its StoreError into a FetchError."""
    try:
        return do()
    except StoreError as error:
        if error.kind == "changed":
            raise FetchError("changed_since_plan", "the object is not the version that was planned") from None
        if error.kind in ("missing", "denied"):
            raise FetchError(error.kind, error.advice, retryable=error.kind == "denied") from None
        raise FetchError("store_failed", error.advice, at_once=True) from None


class _Pace:
    """Raises when almost no data arrive for ``timeout`` seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._time = asyncio.get_running_loop().time
        self._since = self._time()
        self._came = 0

    def check(self, size: int) -> None:
        self._came += size
        elapsed = self._time() - self._since
        if elapsed >= self._timeout:
            if self._came < _SLOWEST * elapsed:
                raise FetchError(
                    "timeout", f"less than {_SLOWEST} bytes per second over {self._timeout:g} s", at_once=True
                )
            self._since, self._came = self._time(), 0


def _refusal(response: aiohttp.ClientResponse, host: Host) -> FetchError:
    code = response.status
    wait = retry_after(response.headers.get("Retry-After", ""))
    if code in _BUSY and 0 < wait <= _LONGEST_PAUSE:
        host.pause(wait)
    if code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return FetchError("bad_range", "the server does not resume where we ended", at_once=True)
    return FetchError(f"http_{code}", retryable=code in _LATER, at_once=code in _AT_ONCE, wait=wait)


def retry_after(header: str) -> float:
    """Seconds that a Retry-After header requests, as a number or date; 0 if it is neither."""
    text = header.strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    date = _date(text)
    return max(0.0, (date - datetime.now(UTC)).total_seconds()) if date else 0.0


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date.replace(tzinfo=date.tzinfo or UTC)


def _head(response: aiohttp.ClientResponse, have: int) -> Head:
    headers = response.headers
    length = -1 if response.content_length is None else response.content_length
    offset = 0
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", "").strip())
        if not have or said is None or int(said[1]) != have:
            raise FetchError("http_206", "a part that was not asked for", at_once=bool(have))
        offset = have
        length = int(said[3]) if said[3] != "*" else -1
    validator = headers.get("ETag") or headers.get("Last-Modified") or ""
    return Head(offset, length, validator, _is_strong(headers), headers)


def _is_strong(headers: MultiMapping[str]) -> bool:
    """Whether the validator is strong (RFC 9110, sections 8.8.1 and 8.8.2.2)."""
    if etag := headers.get("ETag"):
        return etag.startswith('"')
    modified, date = _date(headers.get("Last-Modified", "")), _date(headers.get("Date", ""))
    return bool(modified and date and (date - modified).total_seconds() >= _STRONG_AGE)


@contextmanager
def _network(broken: str) -> Any:
    """Convert network exceptions into FetchError; ``broken`` is the reason for those without one of their own."""
    try:
        yield
    except aiohttp.ServerTimeoutError:
        raise FetchError("timeout", "no connection", at_once=True) from None
    except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError):
        raise FetchError("tls", "the certificate is not valid for the host", retryable=True) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise FetchError(broken, type(error).__name__, at_once=True) from None


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def fetch(url: str, sink: Sink, policy: Policy, headers: Mapping[str, str] | None = None) -> int:
    """:meth:`Client.fetch` for one file, called from outside an event loop."""

    async def alone() -> int:
        async with Client(policy) as client:
            return await watched(client.fetch(url, sink, headers), policy.step)

    return asyncio.run(alone())


async def watched(work: Coroutine[Any, Any, T], step: Callable[[], None]) -> T:
    """Await ``work`` and return its result; call ``step`` regularly, and cancel ``work`` if it raises."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK)
            step()
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
