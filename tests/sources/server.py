"""An HTTP server on the loopback interface, a thread for each request, that misbehaves where it is told to."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    path: str
    headers: dict[str, str]


class Server:
    """Answers each path in ``replies`` as it says, any other with 404; keeps what was asked. A context."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.replies: dict[str, Reply] = {}
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self._scheme = "https" if context else "http"
        if context:
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self._scheme}://{host}:{self.port}{path}"

    def put(self, path: str, reply: Reply | bytes) -> str:
        """Answer ``path`` by ``reply``, or with these bytes; its URL."""
        self.replies[path] = body(reply) if isinstance(reply, bytes) else reply
        return self.url(path)

    def asked(self, path: str) -> int:
        """How often ``path`` was asked for."""
        return sum(request.path.partition("?")[0] == path for request in self.requests)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The other side went away: that is what half of the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def do_GET(self) -> None:
        owner = self.server.owner
        owner.requests.append(Request(self.path, dict(self.headers.items())))
        owner.replies.get(self.path.partition("?")[0], status(404))(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def body(data: bytes, **headers: str) -> Reply:
    """All is well."""
    return announced(data, len(data), **headers)


def announced(data: bytes, length: int | None, **headers: str) -> Reply:
    """``data`` with this Content-Length, or none; the connection ends after them."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        if length is not None:
            handler.send_header("Content-Length", str(length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True

    return reply


def status(code: int, data: bytes = b"sorry", **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def redirect(location: str, code: int = 302) -> Reply:
    return status(code, b"", Location=location)


def in_turn(*replies: Reply) -> Reply:
    """The first time the first, the second time the second, ...; the last for ever."""
    left = list(replies)

    def reply(handler: BaseHTTPRequestHandler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return reply


def reset(data: bytes, after: int) -> Reply:
    """The connection breaks after so many bytes."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:after])
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return reply


def raw(data: bytes) -> Reply:
    """These bytes, headers and all, and the end of the connection."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return reply


def chunked(*chunks: bytes, ending: bytes = b"0\r\n\r\n") -> Reply:
    parts = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + ending)


def drip(head: bytes, piece: bytes, pause: float) -> Reply:
    """``head`` (status line and headers, or their beginning), then a piece now and then, for ever."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(head)
        while not handler.server.owner.stopping.wait(pause):  # type: ignore[attr-defined]
            handler.wfile.write(piece)

    return reply


def endless(piece: bytes = bytes(1 << 16)) -> Reply:
    """A body without a length that never ends."""
    return drip(b"HTTP/1.1 200 OK\r\n\r\n", piece, 0.0)


def ranged(data: bytes, etag: str, cut: int | None = None, **headers: str) -> Reply:
    """``data`` as servers of large files give it: with a strong ETag, and in parts to those who ask with If-Range.

    The connection breaks after ``cut`` bytes of a body.
    """

    def reply(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if handler.headers.get("If-Range") != etag:
            start = 0
        handler.send_response(206 if start else 200)
        handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(data) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data[start:] if cut is None else data[start : start + cut])
        if cut is not None:
            handler.close_connection = True

    return reply
