"""Getting a file by HTTP from hosts that nobody vouches for: addresses checked and pinned, sizes and times capped."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import ipaddress
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from itertools import count
from typing import Protocol
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from pipeline.samples import SampleError

_REDIRECTS = 5
_REDIRECT_CODES = (301, 302, 303, 307, 308)
_CHUNK = 1 << 18
_CONNECT = 30.0  # seconds to wait for a connection, at most
_ADDRESSES = 4  # most addresses of a host to try
_SLOWEST = 1000  # bytes per second, on average over ``timeout`` seconds
_AT_ONCE = (408, 425, 429, 500, 502, 503, 504)  # worth another try soon
_LATER = (401, 403)  # worth another try with other credentials, or a URL that is signed anew
_LONGEST_PAUSE = 60.0
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[0-9A-Za-z._:%-]+")
_URL_SAFE = "/%:;=@!$&'()*+,~?"


@dataclass(frozen=True, slots=True)
class Policy:
    """What a file may cost and where it may come from.

    ``timeout`` is seconds with (almost) no byte, ``deadline`` seconds in all; ``retries`` come on top of the first try.
    ``step`` is called often, and may raise; ``pause`` sleeps.
    """

    timeout: float = 60.0
    deadline: float = 86400.0
    retries: int = 3
    max_bytes: int = 2**40
    allow_private_hosts: bool = False
    step: Callable[[], None] = lambda: None
    pause: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came: size in bytes, SHA-256, and the server's validator (ETag, else Last-Modified)."""

    bytes: int
    sha256: str
    validator: str


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> object: ...


class FetchError(SampleError):
    """``at_once``: another try soon may help, after ``wait`` seconds if the server asks for them."""

    def __init__(
        self, reason: str, detail: str = "", *, retryable: bool = False, at_once: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(reason, detail, retryable=retryable or at_once)
        self.at_once = at_once
        self.wait = wait


def fetch(url: str, make: Callable[[], Sink], policy: Policy) -> Fetched:
    """Bring ``url`` into a sink, trying again where that may help; each try starts with a new sink from ``make()``.

    Raises:
        FetchError: ``bad_url``, ``dns``, ``private_address``, ``too_many_redirects``, ``http_404`` and the like,
            ``tls``, ``too_many_bytes``, ``truncated``, ``connection``, ``timeout`` or ``deadline``. Retryable is what
            the server, a new signature or another setting may mend.
        OSError: the sink's own.
    """
    end = time.monotonic() + policy.deadline
    for attempt in count():
        try:
            return _fetch_once(url, make, policy, end)
        except FetchError as error:
            wait = max(error.wait, min(_LONGEST_PAUSE, 0.5 * 2**attempt * random.uniform(0.5, 1.5)))
            patient = wait <= _LONGEST_PAUSE and time.monotonic() + wait < end
            if not (error.at_once and attempt < policy.retries and patient):
                raise
        _sleep(wait, policy)
    raise AssertionError("unreachable")


def _sleep(seconds: float, policy: Policy) -> None:
    while seconds > 0:
        policy.step()
        policy.pause(min(seconds, 1.0))
        seconds -= 1.0


def _fetch_once(url: str, make: Callable[[], Sink], policy: Policy, end: float) -> Fetched:
    """Follow redirects by hand, checking each address, until there is a body."""
    target = Target.parse(url)
    for _ in range(_REDIRECTS + 1):
        policy.step()
        with _response(target, policy, end) as response:
            location = response.headers.get("Location")
            if response.status in _REDIRECT_CODES and location:
                target = target.follow(location)
            elif response.status == HTTPStatus.OK:
                return _copy(response, make(), policy, end)
            else:
                raise _refusal(response)
    raise FetchError("too_many_redirects", f"more than {_REDIRECTS}")


def _refusal(response: http.client.HTTPResponse) -> FetchError:
    code = response.status
    wait = _seconds(response.headers.get("Retry-After", ""))
    return FetchError(f"http_{code}", retryable=code in _LATER, at_once=code in _AT_ONCE, wait=wait)


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for, as a number of seconds or as a date."""
    text = retry_after.strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _copy(response: http.client.HTTPResponse, sink: Sink, policy: Policy, end: float) -> Fetched:
    expected = response.length
    if expected is not None and expected > policy.max_bytes:
        raise FetchError("too_many_bytes", f"{expected}, more than {policy.max_bytes}", retryable=True)
    digest = hashlib.sha256()
    size = 0
    while expected is None or size < expected:
        policy.step()
        with _network(policy, end):
            data = response.read1(_CHUNK if expected is None else min(_CHUNK, expected - size))
        if not data:
            break
        size += len(data)
        if size > policy.max_bytes:
            raise FetchError("too_many_bytes", f"more than {policy.max_bytes}", retryable=True)
        digest.update(data)
        sink.write(data)
    if expected is not None and size < expected:
        raise FetchError("truncated", f"{size} bytes came, {expected} were announced", at_once=True)
    validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return Fetched(size, digest.hexdigest(), validator)


# ---- where to


@dataclass(frozen=True, slots=True)
class Target:
    """A URL in parts, each as it goes over the wire."""

    scheme: str
    host: str
    port: int
    path: str
    credentials: bytes = b""

    @classmethod
    def parse(cls, url: str) -> Target:
        """The parts of ``url``.

        Raises:
            FetchError: ``bad_url``.
        """
        try:
            url.encode()  # no lone surrogates, from a command line that is not UTF-8: they could not be stored
            parts = urlsplit(url)
            scheme, port = parts.scheme, parts.port
            host = (parts.hostname or "").encode("idna").decode("ascii") if parts.hostname else ""
        except ValueError:
            raise FetchError("bad_url", "it cannot be understood") from None
        if scheme not in _PORTS or not _HOST.fullmatch(host):
            raise FetchError("bad_url", "only http and https URLs with a host are followed")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        user = parts.netloc.rpartition("@")[0]
        return cls(
            scheme,
            host,
            port or _PORTS[scheme],
            quote(path, safe=_URL_SAFE),
            unquote_to_bytes(user),
        )

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def follow(self, location: str) -> Target:
        """Where a redirect leads. Credentials go to the server that they were meant for, and to no other."""
        try:
            there = urljoin(
                f"{self.scheme}://{self.netloc}{self.path}", location.encode("latin-1").decode("utf-8", "replace")
            )
        except ValueError:
            raise FetchError("bad_url", "a redirect cannot be understood") from None
        target = Target.parse(there)
        same = (target.scheme, target.host, target.port) == (self.scheme, self.host, self.port)
        return replace(target, credentials=self.credentials if same else b"")


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_INTERNAL = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "fec0::/10")  # the third is Azure's own
)


def resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """The addresses of ``host``, to be used for the connection as they are: looking up again could give others.

    Raises:
        FetchError: ``dns`` if there is none, ``private_address`` if one is not globally routable.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError("dns", host, at_once=True) from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and any(is_internal(address) for address in addresses):
        raise FetchError("private_address", "allow_private_hosts=true would allow it", retryable=True)
    return addresses


def is_internal(address: str) -> bool:
    """Whether an address is of this host or its network, or leads there: not what a URL from outside may point to."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner is not None:
            return is_internal(str(inner))
    return not ip.is_global or ip.is_multicast or ip.is_reserved or any(ip in network for network in _INTERNAL)


# ---- the connection


@contextlib.contextmanager
def _network(policy: Policy, end: float) -> Iterator[None]:
    """What goes wrong with the network, as what becomes of the file."""
    try:
        yield
    except TimeoutError:
        if time.monotonic() >= end:
            raise _too_late(policy) from None
        raise FetchError("timeout", f"no byte within {policy.timeout:g} s", at_once=True) from None
    except http.client.IncompleteRead:
        raise FetchError("truncated", "the connection ended before the whole body came", at_once=True) from None
    except ssl.SSLCertVerificationError:
        raise FetchError("tls", "the certificate is not valid for the host", retryable=True) from None
    except (http.client.HTTPException, OSError) as error:
        raise FetchError("connection", type(error).__name__, at_once=True) from None


def _too_late(policy: Policy) -> FetchError:
    return FetchError("deadline", f"more than {policy.deadline:g} s", retryable=True)


@contextlib.contextmanager
def _response(target: Target, policy: Policy, end: float) -> Iterator[http.client.HTTPResponse]:
    """Ask for ``target`` and read the headers of the answer."""
    headers = {"Host": target.netloc, "User-Agent": "latentmill", "Accept-Encoding": "identity", "Connection": "close"}
    if target.credentials:
        headers["Authorization"] = f"Basic {base64.b64encode(target.credentials).decode()}"
    addresses = resolve(target.host, target.port, policy.allow_private_hosts)
    with _network(policy, end):
        sock = _connect(target, addresses, policy, end)
    with sock:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = _Wire(sock, policy, end)  # type: ignore[assignment]
        with _network(policy, end):
            connection.request("GET", target.path, headers=headers)
            response = connection.getresponse()
        with response:
            yield response


def _connect(target: Target, addresses: list[str], policy: Policy, end: float) -> socket.socket:
    last: OSError = ConnectionRefusedError()
    for address in addresses[:_ADDRESSES]:
        try:
            sock = socket.create_connection(
                (address, target.port), _patience(min(policy.timeout, _CONNECT), policy, end)
            )
        except OSError as error:
            last = error
        else:
            return _tls().wrap_socket(sock, server_hostname=target.host) if target.scheme == "https" else sock
    raise last


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _patience(seconds: float, policy: Policy, end: float) -> float:
    """``seconds``, or what is left until ``end``."""
    left = end - time.monotonic()
    if left <= 0:
        raise _too_late(policy)
    return min(seconds, left)


class _Wire:
    """A socket as http.client uses it, whose other end must keep a pace, in headers as in bodies."""

    def __init__(self, sock: socket.socket, policy: Policy, end: float) -> None:
        self._sock = sock
        self._policy = policy
        self._end = end

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_patience(self._policy.timeout, self._policy, self._end))
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Paced(self._sock, self._policy, self._end))

    def close(self) -> None:
        """The socket is closed by whoever opened it: the response still reads from it."""


class _Paced(io.RawIOBase):
    """The reading side of a socket; raises when nothing comes for ``timeout`` seconds, or hardly anything."""

    def __init__(self, sock: socket.socket, policy: Policy, end: float) -> None:
        self._sock = sock
        self._policy = policy
        self._end = end
        self._since = time.monotonic()
        self._came = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        timeout = self._policy.timeout
        self._sock.settimeout(_patience(timeout, self._policy, self._end))
        size = self._sock.recv_into(buffer)
        self._came += size
        elapsed = time.monotonic() - self._since
        if elapsed >= timeout:
            if size and self._came < _SLOWEST * elapsed:
                raise FetchError("timeout", f"less than {_SLOWEST} bytes per second over {timeout:g} s", at_once=True)
            self._since, self._came = time.monotonic(), 0
        return size
