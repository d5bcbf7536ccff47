"""What fetch() brings, when it asks again, what it refuses, and that nothing can hold it for ever."""

from __future__ import annotations

import asyncio
import datetime
import io
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from sources.server import (
    Server,
    announced,
    body,
    chunked,
    drip,
    endless,
    in_turn,
    raw,
    redirect,
    reset,
    status,
)

from pipeline.samples import SampleError
from pipeline.sources.http import Head, Policy, Target, client, fetch, is_internal, names
from pipeline.sources.http.names import Names

DATA = bytes(range(256)) * 3000
OK = b"HTTP/1.1 200 OK\r\n"


class Sinks:
    """Keeps what each answer brings, and what it said first."""

    def __init__(self) -> None:
        self.made: list[io.BytesIO] = []
        self.heads: list[Head] = []

    def have(self) -> tuple[int, str]:
        return 0, ""

    def begin(self, head: Head) -> None:
        self.made.append(io.BytesIO())
        self.heads.append(head)

    def write(self, data: bytes) -> None:
        self.made[-1].write(data)

    @property
    def data(self) -> bytes:
        return self.made[-1].getvalue()


@pytest.fixture
def sinks() -> Sinks:
    return Sinks()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long we would have paused; no time passes."""
    made: list[float] = []

    async def sleep(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr(client, "_sleep", sleep)
    monkeypatch.setattr("pipeline.sources.http.manners.Host.pause", lambda self, seconds: None)
    return made


@pytest.fixture
def get(sinks: Sinks, pauses: list[float]) -> Callable[..., int]:
    """Fetch into ``sinks`` without really pausing; private hosts are allowed unless said otherwise."""

    def get(url: str, **settings: Any) -> int:
        return fetch(url, sinks, Policy(**{"allow_private_hosts": True, **settings}))

    return get


def reason_of(get: Callable[..., int], url: str, **settings: Any) -> tuple[str, bool]:
    """Why ``url`` cannot be obtained, and whether it may be tried again."""
    with pytest.raises(SampleError) as caught:
        get(url, **settings)
    return caught.value.reason, caught.value.retryable


# ---- what comes


@pytest.mark.parametrize(
    "reply",
    [
        body(DATA),
        announced(DATA, None),
        chunked(DATA[:1000], DATA[1000:]),
        raw(b"HTTP/1.0 200 OK\r\n\r\n" + DATA),
        raw(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"\r\n" + DATA),
    ],
    ids=["length", "until the end", "chunked", "HTTP/1.0", "100 Continue"],
)
def test_all_bytes_come_with_their_hash(server: Server, get: Callable[..., int], sinks: Sinks, reply: Any) -> None:
    assert get(server.put("/a", reply)) == len(DATA)
    assert sinks.data == DATA


def test_an_empty_body_is_a_body(server: Server, get: Callable[..., int], sinks: Sinks) -> None:
    assert get(server.put("/a", b"")) == 0
    assert sinks.data == b""


def test_the_validator_is_the_etag_or_else_the_date(server: Server, get: Callable[..., int], sinks: Sinks) -> None:
    old = "Mon, 01 Jan 2024 00:00:00 GMT"
    get(server.put("/a", body(DATA, ETag='"one"', Last_Modified=old)))
    get(server.put("/b", body(DATA, ETag='W/"one"')))
    get(server.put("/c", body(DATA, Last_Modified=old)))
    get(server.put("/d", body(DATA, Last_Modified="yesterday")))
    get(server.put("/e", body(DATA)))
    said = [(head.validator, head.strong) for head in sinks.heads]
    assert said == [('"one"', True), ('W/"one"', False), (old, True), ("yesterday", False), ("", False)]
    assert {(head.offset, head.length) for head in sinks.heads} == {(0, len(DATA))}


def test_a_server_that_keeps_the_connection_open_does_not_hold_us(server: Server, get: Callable[..., int]) -> None:
    head = OK + b"Content-Length: 3\r\n\r\nabc"
    assert get(server.put("/a", drip(head, b"", 0.05)), timeout=30.0) == 3


def test_a_length_that_is_too_small_is_a_failure(server: Server, get: Callable[..., int], sinks: Sinks) -> None:
    """Cut to it, the file could look whole. (What comes later than the rest, in another packet, nobody can see.)"""
    longer = raw(OK + b"Content-Length: 1000\r\n\r\n" + DATA[:3000])
    assert reason_of(get, server.put("/a", longer), retries=0) == ("connection", True)


def test_bodies_are_not_decoded(server: Server, get: Callable[..., int], sinks: Sinks) -> None:
    get(server.put("/a.tar.gz", body(DATA, Content_Encoding="gzip")))
    assert sinks.data == DATA
    assert server.requests[0].headers["Accept-Encoding"] == "identity"


def test_urls_go_over_the_wire_quoted(server: Server, get: Callable[..., int]) -> None:
    server.put("/a%20b/%C3%A9.tar", DATA)
    get(server.url("/a b/é.tar?x=ü&y=%20#part"))
    assert server.requests[0].path == "/a%20b/%C3%A9.tar?x=%C3%BC&y=%20"
    assert server.requests[0].headers["Host"] == f"127.0.0.1:{server.port}"


# ---- trying again


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_that_heals_is_asked_again(
    server: Server, get: Callable[..., int], sinks: Sinks, pauses: list[float], code: int
) -> None:
    url = server.put("/a", in_turn(status(code), status(code), body(DATA)))
    assert get(url, retries=2) == len(DATA)
    assert server.asked("/a") == 3
    assert pauses and sinks.data == DATA


@pytest.mark.parametrize("code", [400, 404, 410, 451, 501, 204, 206, 304, 300])
def test_a_refusal_is_final(server: Server, get: Callable[..., int], sinks: Sinks, code: int) -> None:
    assert reason_of(get, server.put("/a", status(code, b""))) == (f"http_{code}", False)
    assert server.asked("/a") == 1
    assert sinks.made == []


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_that_another_signature_may_mend_is_for_a_later_run(
    server: Server, get: Callable[..., int], code: int
) -> None:
    assert reason_of(get, server.put("/a", status(code))) == (f"http_{code}", True)
    assert server.asked("/a") == 1


def test_after_the_last_try_the_failure_is_for_a_later_run(
    server: Server, get: Callable[..., int], pauses: list[float]
) -> None:
    assert reason_of(get, server.put("/a", status(500)), retries=2) == ("http_500", True)
    assert server.asked("/a") == 3
    assert reason_of(get, server.put("/b", status(500)), retries=0) == ("http_500", True)
    assert server.asked("/b") == 1


def test_the_server_is_not_asked_again_before_it_wants_to_be(
    server: Server, get: Callable[..., int], pauses: list[float]
) -> None:
    get(server.put("/a", in_turn(status(503, Retry_After="17"), body(DATA))))
    assert sum(pauses) == 17
    pauses.clear()
    soon = format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40), usegmt=True)
    get(server.put("/b", in_turn(status(429, Retry_After=soon), body(DATA))))
    assert 30 < sum(pauses) <= 40


@pytest.mark.parametrize("after", ["soon", "-3", "Thu, 99 Foo 2000", "²", "Mon, 01 Jan 2001 00:00:00 GMT", ""])
def test_a_retry_after_that_says_nothing_leaves_our_own_pause(
    server: Server, get: Callable[..., int], pauses: list[float], after: str
) -> None:
    get(server.put("/a", in_turn(status(503, Retry_After=after), body(DATA))))
    assert 0 < sum(pauses) < 1


def test_a_server_that_wants_an_hour_is_left_to_a_later_run(
    server: Server, get: Callable[..., int], pauses: list[float]
) -> None:
    assert reason_of(get, server.put("/a", status(503, Retry_After="3600"))) == ("http_503", True)
    assert server.asked("/a") == 1
    assert pauses == []


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (reset(DATA, 1000), "truncated"),
        (announced(DATA[:1000], len(DATA)), "truncated"),
        (chunked(DATA[:1000], ending=b""), "truncated"),
        (chunked(DATA[:1000], ending=b"zz\r\n"), "truncated"),
        (raw(b""), "connection"),
        (raw(b"what?\r\n\r\n"), "connection"),
        (raw(OK + b"X: " + b"y" * 70_000 + b"\r\n\r\n"), "connection"),
        (raw(OK + b"X: y\r\n" * 200 + b"\r\n"), "connection"),
    ],
    ids=["reset", "length too long", "cut chunks", "bad chunk", "nothing", "no HTTP", "long header", "many headers"],
)
def test_a_broken_transfer_begins_again_with_an_empty_sink(
    server: Server, get: Callable[..., int], sinks: Sinks, reply: Any, reason: str
) -> None:
    assert get(server.put("/a", in_turn(reply, body(DATA)))) == len(DATA)
    assert sinks.data == DATA
    found, retryable = reason_of(get, server.put("/b", reply), retries=1)
    assert retryable and found in (reason, "connection")  # which of them depends on how the packets are cut
    assert server.asked("/b") in (2, 4)  # aiohttp asks again at once when the connection ends without a word


def test_nobody_listening_is_a_failed_connection(get: Callable[..., int], pauses: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert reason_of(get, f"http://127.0.0.1:{port}/a", retries=1) == ("connection", True)


def test_what_the_sink_raises_is_no_failure_of_the_server(server: Server) -> None:
    class Full(Sinks):
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fetch(server.put("/a", DATA), Full(), Policy(allow_private_hosts=True))
    assert server.asked("/a") == 1


def test_a_stop_is_heeded_between_pieces_and_in_pauses(server: Server, sinks: Sinks) -> None:
    class Stop(Exception):
        pass

    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stop

    with pytest.raises(Stop):
        fetch(server.put("/a", endless()), sinks, Policy(allow_private_hosts=True, step=step))
    calls = 0
    waiting = Policy(allow_private_hosts=True, step=step)
    with pytest.raises(Stop):
        fetch(server.put("/b", status(503, Retry_After="50")), sinks, waiting)
    assert server.asked("/b") == 1


# ---- limits


def test_a_body_that_announces_too_much_is_not_begun(server: Server, get: Callable[..., int], sinks: Sinks) -> None:
    assert reason_of(get, server.put("/a", body(DATA)), max_bytes=len(DATA) - 1) == ("too_many_bytes", True)
    assert sinks.made == []
    assert get(server.url("/a"), max_bytes=len(DATA)) == len(DATA)


def test_an_endless_body_is_given_up(server: Server, get: Callable[..., int], sinks: Sinks) -> None:
    assert reason_of(get, server.put("/a", endless()), max_bytes=1_000_000) == ("too_many_bytes", True)
    assert len(sinks.data) <= 1_000_000
    assert server.asked("/a") == 1


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 ", OK, OK + b"Content-Length: 99\r\n\r\nsome"],
    ids=["accepted", "status", "headers", "body"],
)
def test_a_server_that_falls_silent_is_given_up(server: Server, get: Callable[..., int], head: bytes) -> None:
    assert reason_of(get, server.put("/a", drip(head, b"", 0.05)), timeout=0.15, retries=0) == ("timeout", True)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 ", b"O"),
        (OK + b"X: ", b"y"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (OK + b"\r\n", b"z"),
        (OK + b"Content-Length: 1000000\r\n\r\n", b"z"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nz\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nf", b"0"),
    ],
    ids=["status", "header", "100 Continue", "body", "body with length", "chunks", "chunk length"],
)
def test_a_server_that_drips_is_given_up(server: Server, get: Callable[..., int], head: bytes, piece: bytes) -> None:
    """Each byte comes well within ``timeout``; both the pace and the deadline see it, wherever it happens."""
    url = server.put("/a", drip(head, piece, 0.03))
    assert reason_of(get, url, timeout=0.15, retries=0) == ("timeout", True)
    assert reason_of(get, url, timeout=30.0, deadline=0.15) == ("deadline", True)
    assert server.asked("/a") == 2


def test_the_deadline_is_for_all_tries_together(server: Server, get: Callable[..., int], pauses: list[float]) -> None:
    assert reason_of(get, server.put("/a", status(503, Retry_After="30")), deadline=20.0) == ("http_503", True)
    assert server.asked("/a") == 1
    assert pauses == []


def test_headers_and_connections_are_within_the_deadline(server: Server, get: Callable[..., int]) -> None:
    silent = drip(b"", b"", 0.05)
    assert reason_of(get, server.put("/a", silent), timeout=30.0, deadline=0.15) == ("deadline", True)
    hops = in_turn(redirect("/b"), redirect("/b"))
    server.put("/b", silent)
    assert reason_of(get, server.put("/c", hops), timeout=30.0, deadline=0.15) == ("deadline", True)


# ---- redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, get: Callable[..., int], sinks: Sinks, code: int) -> None:
    server.put("/dir/b", redirect("c?x=1", code))
    server.put("/dir/c", redirect(server.url("/d"), code))
    server.put("/d", DATA)
    get(server.put("/a", redirect("/dir/b", code)))
    assert sinks.data == DATA
    assert [request.path for request in server.requests] == ["/a", "/dir/b", "/dir/c?x=1", "/d"]


def test_a_loop_of_redirects_ends(server: Server, get: Callable[..., int]) -> None:
    server.put("/b", redirect("/a"))
    assert reason_of(get, server.put("/a", redirect("/b"))) == ("too_many_redirects", False)
    assert len(server.requests) == 6


def test_a_redirect_to_nowhere_is_a_refusal(server: Server, get: Callable[..., int]) -> None:
    assert reason_of(get, server.put("/a", status(302))) == ("http_302", False)


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/a",
        "gopher://127.0.0.1:70/_a",
        "data:text/plain,x",
        "http://[::1",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:x/",
        "http://a b/",
        "http://a..b/",
        "javascript:alert(1)",
    ],
)
def test_a_redirect_to_what_is_no_http_url_is_not_followed(
    server: Server, get: Callable[..., int], location: str
) -> None:
    url = server.put("/a", redirect(location))
    assert reason_of(get, url) == ("bad_url", False)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/a",
        "/a",
        "a.tar",
        "",
        "http://",
        "http://u:p@/a",
        "http://h\0.example/",
        "http://h:1x/",
        "http://h/\udce9",
    ],
)
def test_a_url_that_is_none_is_refused(get: Callable[..., int], url: str) -> None:
    assert reason_of(get, url) == ("bad_url", False)


def test_bytes_in_a_location_that_are_no_ascii_are_quoted(
    server: Server, get: Callable[..., int], sinks: Sinks
) -> None:
    server.put("/%C3%A9%20%FF", DATA)
    server.put("/a", raw(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /\xc3\xa9 %FF\r\n\r\n"))
    get(server.url("/a"))
    assert sinks.data == DATA


def test_a_redirect_is_checked_anew(server: Server, get: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host is as good as public; where it sends us is not."""

    real = Names.addresses

    async def addresses(self: Names, host: str) -> list[str]:
        return ["127.0.0.1"] if host == "public.example" else await real(self, host)

    monkeypatch.setattr(Names, "addresses", addresses)
    server.put("/secret", DATA)
    for there in (f"http://127.0.0.1:{server.port}/secret", "http://169.254.169.254/latest/", "http://[::1]/"):
        server.put("/a", redirect(there))
        url = server.url("/a", "public.example")
        assert reason_of(get, url, allow_private_hosts=False) == ("private_address", True)
    assert server.asked("/secret") == 0


# ---- addresses


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "017700000001",
        "0.0.0.0",
        "0",
        "localhost",
        "LOCALHOST",
        "10.0.0.1",
        "172.16.3.4",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "169.254.169.254",
        "0xa9fea9fe",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:a9fe:a9fe]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[fe80::1]",
        "[fec0::1]",
        "[ff02::1]",
    ],
)
def test_internal_addresses_are_refused(get: Callable[..., int], host: str) -> None:
    assert reason_of(get, f"http://{host}/a", allow_private_hosts=False) == ("private_address", True)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_public_addresses_are_not(address: str) -> None:
    assert not is_internal(address)
    (found,) = asyncio.run(Names(allow_private=False).addresses(address))
    assert ipaddress.ip_address(found) == ipaddress.ip_address(address)


def test_one_internal_address_of_a_name_is_enough_to_refuse_it(
    server: Server, get: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert reason_of(get, server.url("/a", "rebound.example"), allow_private_hosts=False) == ("private_address", True)


def test_a_name_is_looked_up_once_and_the_other_addresses_are_tried(
    server: Server, get: Callable[..., int], sinks: Sinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo
    asked: list[str] = []

    def lookup(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host in ("127.0.0.1", "127.0.0.9"):
            return real(host, port, *rest, **named)  # what create_connection does with a number
        asked.append(host)
        return [*real("127.0.0.9", port, *rest, **named), *real("127.0.0.1", port, *rest, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    server.put("/a", DATA)
    get(server.url("/a", "data.example"))
    assert asked == ["data.example"]
    assert sinks.data == DATA
    assert server.requests[0].headers["Host"] == f"data.example:{server.port}"


def test_a_host_that_is_not_known_may_be_known_later(
    get: Callable[..., int], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookup(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert reason_of(get, "http://unknown.example/a", retries=2) == ("dns", True)
    assert len(pauses) >= 2


# ---- secrets


def test_credentials_go_to_their_own_server_only(server: Server, get: Callable[..., int]) -> None:
    with Server() as other:
        other.put("/d", DATA)
        server.put("/b", redirect(other.url("/d")))
        server.put("/a", redirect("/b"))
        get(f"http://us%40er:pa%3Ass@127.0.0.1:{server.port}/a")
        said = [request.headers.get("Authorization") for request in server.requests]
        assert said == ["Basic dXNAZXI6cGE6c3M="] * 2  # us@er:pa:ss
        assert "Authorization" not in other.requests[0].headers
        server.put("/a", redirect(other.url("/d").replace("://", "://evil:word@")))
        get(server.url("/a"))
        assert "evil" not in str([request.headers for request in other.requests])


def test_failures_do_not_repeat_the_url(server: Server, get: Callable[..., int]) -> None:
    server.put("/reset", reset(DATA, 10))
    server.put("/away", redirect("http://me:hushhush@127.0.0.1:1/?sig=hushhush"))
    for path in ("/gone", "/reset", "/away"):
        with pytest.raises(SampleError) as caught:
            get(server.url(path).replace("://", "://me:hushhush@") + "?token=hushhush", retries=0)
        assert "hushhush" not in f"{caught.value} {caught.value.detail}"


# ---- TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Key and certificate of data.example, signed by itself."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "data.example")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.DNSName("data.example")])
    builder = builder.add_extension(names, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "certificate.pem"
    path.write_bytes(private + signed.public_bytes(pem))
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Server(context) as running:
        yield running


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The certificate is one that this machine trusts, and any name is that of the loopback interface."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(names, "_lookup", lambda host: ["127.0.0.1"])
    client._tls.cache_clear()
    yield
    client._tls.cache_clear()


@pytest.mark.usefixtures("trusted")
def test_https_checks_the_name_though_the_address_is_pinned(
    secure: Server, get: Callable[..., int], sinks: Sinks
) -> None:
    secure.put("/a", DATA)
    get(secure.url("/a", "data.example"))
    assert sinks.data == DATA
    assert reason_of(get, secure.url("/a", "other.example")) == ("tls", True)
    assert secure.asked("/a") == 1


def test_https_refuses_a_certificate_that_nobody_vouches_for(
    secure: Server, get: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_lookup", lambda host: ["127.0.0.1"])
    secure.put("/a", DATA)
    assert reason_of(get, secure.url("/a", "data.example")) == ("tls", True)


@pytest.mark.usefixtures("trusted")
def test_https_has_the_same_pace(secure: Server, get: Callable[..., int]) -> None:
    url = secure.url("/a", "data.example")
    secure.put("/a", drip(OK + b"\r\n", b"z", 0.03))
    assert reason_of(get, url, timeout=0.15, retries=0) == ("timeout", True)
    assert reason_of(get, url, timeout=30.0, deadline=0.15) == ("deadline", True)


def test_targets_name_their_host_as_servers_expect_it() -> None:
    assert Target.parse("http://[::1]:8080/x").netloc == "[::1]:8080"
    assert Target.parse("https://Data.Example:443/x").netloc == "data.example"
    assert Target.parse("http://bücher.example/x").netloc == "xn--bcher-kva.example"
