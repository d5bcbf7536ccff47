"""Downloads files by HTTP from untrusted hosts: addresses are checked and pinned, sizes and times are limited.

One event loop, aiohttp below; a file goes to a :class:`Sink`, which may have a part of it from before. Objects of
stores come the same way and within the same limits; threads wait for :mod:`pipeline.stores` then.
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
_CONNECT = 30.0  # seconds to wait for a connection, at most
_SLOWEST = 1000  # bytes per second, on average over ``timeout`` seconds
_AT_ONCE = (408, 425, 429, 500, 502, 503, 504)  # worth another try soon
_LATER = (401, 403)  # worth another try with other credentials, or a URL that is signed again
_BUSY = (429, 503)  # what a whole host says of itself, not of one file
_LONGEST_PAUSE = 60.0
_LOOK = 0.5  # seconds between looks whether we are to stop
_LARGE = 1 << 20  # bytes; of larger bodies only _LARGE_AT_ONCE come at a time
_LARGE_AT_ONCE = 8
_THREADS = 32  # requests to object stores at a time
_STRONG_AGE = 60.0  # seconds between Last-Modified and Date that make the former tell one version from another

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a file may cost and where it may come from.

    ``timeout`` is seconds with (almost) no byte, ``deadline`` seconds of work in all, waiting for one's turn left out;
    ``retries`` come on top of the first try; ``per_second`` 0 is any. ``step`` is called often, and may raise.
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
    """What an answer says before its body.

    ``offset``: where the body begins in the file; ``length``: bytes of the whole file, -1 if not said; ``validator``:
    ETag or else Last-Modified; ``strong``: it is never the same for two versions of the file.
    """

    offset: int
    length: int
    validator: str
    strong: bool
    headers: MultiMapping[str] = field(repr=False)


class Sink(Protocol):
    """Where a file goes."""

    def have(self) -> tuple[int, str]:
        """How many bytes are there from an earlier try, and of which (strong) version; 0 for none."""

    def begin(self, head: Head) -> None:
        """An answer begins, ``head.offset`` being 0 or what :meth:`have` said."""

    def write(self, data: bytes, /) -> object:
        """The next bytes."""


@dataclass(slots=True)
class _Budget:
    """Seconds that are left for a file; only those in :meth:`spending` and :meth:`spend` count."""

    left: float
    deadline: float

    @asynccontextmanager
    async def spending(self, most: float) -> AsyncIterator[None]:
        """Raises FetchError ``timeout`` after ``most`` seconds, ``deadline`` when no time is left at all."""
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
    """Fetches any number of files at a time. An async context, within one event loop."""

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
        """Bring ``url`` into ``sink``, trying again where that may help; its size in bytes.

        ``headers`` are for the server of ``url`` alone, as credentials in the URL are. Of an object in a store
        ``If-Match`` counts: the version that it must have.

        Raises:
            FetchError: ``bad_url``, ``dns``, ``private_address``, ``too_many_redirects``, ``http_404`` and the like,
                ``tls``, ``too_many_bytes``, ``truncated``, ``connection``, ``timeout``, ``deadline`` or ``host_down``;
                of stores ``missing``, ``denied``, ``changed_since_plan`` or ``store_failed``.
                Retryable is what the server, a new signature or another setting may mend.
            OSError: the sink's own.
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
        """Follow redirects by hand, checking each address, until there is a body."""
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
        """Ask for ``target``; the response once its headers are there."""
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
        """The next bytes of a body; none at its end."""
        async with budget.spending(self.policy.timeout):
            with _network("truncated"):
                return await response.content.readany()

    async def _object(self, store: Store, sink: Sink, wanted: str, budget: _Budget) -> int:
        """An object into the sink, of the version ``wanted`` (empty: any); its size."""

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
                have = 0  # what is there is of another version
                found, pieces = await asked(lambda: store.get("", 0, ""))
            host.answered()
            head = Head(have, found.size, found.etag, bool(found.etag), CIMultiDict())
            return await self._copy(head, lambda: asked(lambda: next(pieces, b"")), sink)

    async def _copy(self, head: Head, read: Callable[[], Awaitable[bytes]], sink: Sink) -> int:
        """The body, which ``read`` gives piece by piece, into the sink; the size of the whole file."""
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
    """What ``do`` returns; what a store refuses becomes a FetchError."""
    try:
        return do()
    except StoreError as error:
        if error.kind == "changed":
            raise FetchError("changed_since_plan", "the object is not the version that was planned") from None
        if error.kind in ("missing", "denied"):
            raise FetchError(error.kind, error.advice, retryable=error.kind == "denied") from None
        raise FetchError("store_failed", error.advice, at_once=True) from None


class _Pace:
    """Raises when hardly anything comes for ``timeout`` seconds."""

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
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 if it is empty or neither."""
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
    """RFC 9110, 8.8.1 and 8.8.2.2."""
    if etag := headers.get("ETag"):
        return etag.startswith('"')
    modified, date = _date(headers.get("Last-Modified", "")), _date(headers.get("Date", ""))
    return bool(modified and date and (date - modified).total_seconds() >= _STRONG_AGE)


@contextmanager
def _network(broken: str) -> Any:
    """What goes wrong with the network, as what becomes of the file; ``broken`` is the reason when it just ends."""
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
    """:meth:`Client.fetch`, of one file, from outside of any event loop."""

    async def alone() -> int:
        async with Client(policy) as client:
            return await watched(client.fetch(url, sink, headers), policy.step)

    return asyncio.run(alone())


async def watched(work: Coroutine[Any, Any, T], step: Callable[[], None]) -> T:
    """The result of ``work``, which is cancelled when ``step``, called now and then, raises."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK)
            step()
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
