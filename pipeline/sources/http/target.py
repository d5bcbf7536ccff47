"""Parts of a URL, and the check that an address is public."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from pipeline import stores
from pipeline.config.schema import ConfigError
from pipeline.samples import SampleError

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[0-9A-Za-z._:%-]+")
_URL_SAFE = "/%:;=@!$&'()*+,~?"


def check(url: str) -> None:
    """Raises FetchError ``bad_url`` for what is neither a URL nor an address in an object store."""
    if not stores.is_url(url):
        Target.parse(url)
        return
    try:
        stores.canonical(url)
    except ConfigError as error:
        raise FetchError("bad_url", str(error)) from None


class FetchError(SampleError):
    """``at_once``: another try soon may help, after ``wait`` seconds if the server asks for them."""

    def __init__(
        self, reason: str, detail: str = "", *, retryable: bool = False, at_once: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(reason, detail, retryable=retryable or at_once)
        self.at_once = at_once
        self.wait = wait


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
            raise FetchError(
                "bad_url", "only http and https URLs with a host, s3://, gs://, az:// and hf:// are followed"
            )
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

    @property
    def url(self) -> str:
        """The URL without credentials, quoted as it goes over the wire."""
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def origin(self) -> tuple[str, str, int]:
        """What tells one server from another."""
        return self.scheme, self.host, self.port

    def follow(self, location: str) -> Target:
        """Where a redirect leads. Credentials go to the server that they were meant for, and to no other."""
        try:
            there = urljoin(self.url, location.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        except ValueError:
            raise FetchError("bad_url", "a redirect cannot be understood") from None
        target = Target.parse(there)
        return replace(target, credentials=self.credentials if target.origin == self.origin else b"")


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_INTERNAL = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "fec0::/10")  # the third is Azure's own
)


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
