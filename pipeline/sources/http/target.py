"""Parsing of URLs, and the check whether an IP address is public."""

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
    """Raise FetchError ``bad_url`` unless ``url`` is an HTTP URL or an address in an object store."""
    if not stores.is_url(url):
        Target.parse(url)
        return
    try:
        stores.canonical(url)
    except ConfigError as error:
        raise FetchError("bad_url", str(error)) from None


class FetchError(SampleError):
    """A failed download. ``at_once``: retrying soon may succeed, after ``wait`` seconds if the server asks for that."""

    def __init__(
        self, reason: str, detail: str = "", *, retryable: bool = False, at_once: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(reason, detail, retryable=retryable or at_once)
        self.at_once = at_once
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed URL; each part is encoded as it is sent."""

    scheme: str
    host: str
    port: int
    path: str
    credentials: bytes = b""

    @classmethod
    def parse(cls, url: str) -> Target:
        """Parse ``url``.

        Raises:
            FetchError: ``bad_url``.
        """
        try:
            url.encode()  # rejects lone surrogates (from a command line that is not UTF-8)
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
        """The URL without credentials, quoted as it is sent."""
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def origin(self) -> tuple[str, str, int]:
        """Identifies the server."""
        return self.scheme, self.host, self.port

    def follow(self, location: str) -> Target:
        """The target of a redirect. Credentials are kept only if the origin stays the same."""
        try:
            there = urljoin(self.url, location.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        except ValueError:
            raise FetchError("bad_url", "a redirect cannot be understood") from None
        target = Target.parse(there)
        return replace(target, credentials=self.credentials if target.origin == self.origin else b"")


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_INTERNAL = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "fec0::/10")  # the third belongs to Azure
)


def is_internal(address: str) -> bool:
    """Whether an address belongs to this host or its network, or maps to such an address; URLs must not point there."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner is not None:
            return is_internal(str(inner))
    return not ip.is_global or ip.is_multicast or ip.is_reserved or any(ip in network for network in _INTERNAL)
