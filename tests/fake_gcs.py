"""What of the XML API of Google Cloud Storage a client needs to read and write objects, in memory, on loopback.

After https://cloud.google.com/storage/docs/xml-api/overview: generations and the precondition
``x-goog-if-generation-match`` (0: there is none), ETags, ranges, multipart uploads, listings in pages. Whoever does not
come with the token is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

TOKEN = "ya29.hush-hush"
_PAGE = 7  # objects that a listing shows at once, at most
_META = "x-goog-meta-"
_NAMES = {
    400: "InvalidArgument",
    401: "AuthenticationRequired",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    416: "InvalidRange",
}


@dataclass(frozen=True)
class _Object:
    data: bytes
    generation: int
    etag: str
    meta: dict[str, str]
    modified: str = field(default_factory=lambda: formatdate(usegmt=True))

    @property
    def headers(self) -> dict[str, str]:
        known = {"ETag": self.etag, "Last-Modified": self.modified, "x-goog-generation": str(self.generation)}
        return known | self.meta


@dataclass(frozen=True)
class _Upload:
    meta: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


class _Refused(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status = status
        self.code = code or _NAMES[status]


class FakeGcs:
    """One bucket."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._objects: dict[str, _Object] = {}
        self._uploads: dict[str, _Upload] = {}
        self._generations = itertools.count(1_700_000_000_000_001)
        self._lock = threading.Lock()

    def answer(self, method: str, address: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request."""
        parts = urlsplit(address)
        bucket, _, name = unquote(parts.path).lstrip("/").partition("/")
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        try:
            if headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Refused(401)
            if bucket != self._bucket:
                raise _Refused(404, "NoSuchBucket")
            with self._lock:
                if not name:
                    return 200, {}, self._listing(query).encode()
                if "uploads" in query or "uploadId" in query:
                    return self._multipart(method, name, query, headers, body)
                if method == "PUT":
                    self._check(name, headers)
                    return 200, self._stored(name, body, _meta_of(headers), f'"{hashlib.md5(body).hexdigest()}"'), b""
                found = self._found(name)
                if method == "DELETE":
                    del self._objects[name]
                    return 204, {}, b""
                return _read(found, headers)
        except _Refused as refused:
            return refused.status, {}, _xml("Error", f"<Code>{refused.code}</Code><Message>no</Message>")

    def _found(self, name: str) -> _Object:
        if name not in self._objects:
            raise _Refused(404)
        return self._objects[name]

    def _check(self, name: str, headers: Any) -> None:
        """The precondition of a write."""
        wanted = headers.get("x-goog-if-generation-match")
        now = self._objects[name].generation if name in self._objects else 0
        if wanted is not None and int(wanted) != now:
            raise _Refused(412)

    def _stored(self, name: str, data: bytes, meta: dict[str, str], etag: str) -> dict[str, str]:
        self._objects[name] = stored = _Object(data, next(self._generations), etag, meta)
        return {"ETag": stored.etag, "x-goog-generation": str(stored.generation)}

    def _multipart(
        self, method: str, name: str, query: dict[str, str], headers: Any, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if method == "POST" and "uploads" in query:
            upload = f"upload{next(self._generations)}"
            self._uploads[upload] = _Upload(_meta_of(headers))
            return 200, {}, _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        upload = query["uploadId"]
        if upload not in self._uploads:
            raise _Refused(404, "NoSuchUpload")
        held = self._uploads[upload]
        if method == "PUT":
            held.parts[int(query["partNumber"])] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
        del self._uploads[upload]
        if method == "DELETE":
            return 204, {}, b""
        named = {_inside(part, "PartNumber"): _inside(part, "ETag") for part in body.decode().split("<Part>")[1:]}
        sums = {str(n): hashlib.md5(data).hexdigest() for n, data in sorted(held.parts.items())}
        if named != {number: f'"{digest}"' for number, digest in sums.items()}:
            raise _Refused(400, "InvalidPart")
        data = b"".join(held.parts[int(number)] for number in named)
        etag = f'"{hashlib.md5("".join(sums.values()).encode()).hexdigest()}-{len(sums)}"'
        stored = self._stored(name, data, held.meta, etag)
        return 200, stored, _xml("CompleteMultipartUploadResult", f"<ETag>{escape(etag)}</ETag>")

    def _listing(self, query: dict[str, str]) -> str:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = max(query.get("start-after", ""), query.get("continuation-token", ""))
        rows: dict[str, str] = {}
        for name, held in sorted(self._objects.items()):
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest[: rest.index(delimiter) + 1]
                rows[folder] = f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            else:
                rows[name] = (
                    f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>{escape(held.etag)}</ETag><Size>{len(held.data)}</Size></Contents>"
                )
        left = [name for name in rows if name > after]
        shown = left[:_PAGE]
        more = f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if len(left) > _PAGE else ""
        return _xml("ListBucketResult", "".join(rows[name] for name in shown) + more).decode()


def _inside(text: str, name: str) -> str:
    """The text of an element of XML."""
    return unescape(text.split(f"<{name}>")[1].split(f"</{name}>")[0], {"&quot;": '"'})


def _meta_of(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith(_META)}


def _read(found: _Object, headers: Any) -> tuple[int, dict[str, str], bytes]:
    if headers.get("If-Match", found.etag) != found.etag:
        raise _Refused(412)
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
    if not span:
        return 200, found.headers, found.data
    start, stop = int(span[1]), min(int(span[2]) + 1 if span[2] else len(found.data), len(found.data))
    if start >= len(found.data):
        raise _Refused(416)
    about = {"Content-Range": f"bytes {start}-{stop - 1}/{len(found.data)}"}
    return 206, found.headers | about, found.data[start:stop]


def _xml(name: str, inside: str) -> bytes:
    return f"<?xml version='1.0' encoding='UTF-8'?><{name}>{inside}</{name}>".encode()


@contextmanager
def gcs_server(bucket: str) -> Iterator[int]:
    """A running server; its port."""
    gcs = FakeGcs(bucket)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            return

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, data = gcs.answer(self.command, self.path, self.headers, body)
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._any)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
