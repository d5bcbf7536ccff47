"""What of the Hugging Face Hub's protocol its own client needs to fill and to read a dataset repository, on loopback.

Files are kept under the hash of their content as the Hub keeps them: large ones are sent before the commit that names
them, and not again if they are there. Those are read from another server, as from the Hub's CDN, which must not get the
token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_hushhush"
_REGULAR = 200  # bytes up to which a file is part of its commit
STALL = -1
"""A fault: the Hub never answers."""
_ERRORS = (401, 403, 404)


@dataclass(frozen=True)
class _Blob:
    """A file that is asked for."""

    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def _send_part(handler: BaseHTTPRequestHandler, data: bytes, cut: bool = False) -> None:
    """The bytes that a request asks for; with ``cut`` half of them."""
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    start, stop = (int(span[1]), int(span[2]) + 1 if span[2] else len(data)) if span else (0, len(data))
    handler.send_response(206 if span else 200)
    if span:
        handler.send_header("Content-Range", f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}")
    part = data[start:stop]
    handler.send_header("Content-Length", str(len(part)))
    handler.end_headers()
    handler.wfile.write(part[: len(part) // 2] if cut else part)
    handler.close_connection = cut


class FakeHub:
    """A context; ``fault`` of a method and a path is the status that the Hub answers with, 0 for what it should,
    :data:`STALL` for none.

    Attributes:
        files: of each repository, path → content, as of the last commit.
        history: of each repository, its commits and the files of each, oldest first; the last is ``main``.
        commits: the messages, oldest first.
        gated: repositories whose files nobody may read.
        requests: method and path of each, those of the CDN too.
        leaked: tokens that came to the CDN.
        cuts: which of the next answers of the CDN end in the middle.
        stored: large contents by SHA-256; ``received`` counts those that were sent.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.history: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: list[str] = []
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.leaked: list[str] = []
        self.cuts: Iterator[bool] = iter(())
        self.stored: dict[str, bytes] = {}
        self.received = 0
        self.fault: Callable[[str, str], int] = lambda method, path: 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                return

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append(f"{self.command} {unquote(self.path)}")
                token = self.headers.get("Authorization", "")
                if self.server is hub._servers[1]:
                    hub.leaked += [token] if token else []
                    _send_part(self, hub.stored[self.path[1:]], next(hub.cuts, False))
                    return
                status, answer = hub.answer(self.command, self.path, body, token)
                if isinstance(answer, _Blob):
                    if len(answer.data) > _REGULAR:
                        self.send_response(302)
                        self.send_header("Location", f"{hub.cdn}/{answer.sha256}")
                        self.send_header("Content-Length", "0")
                        self.end_headers()
                    else:
                        _send_part(self, answer.data)
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if status in _ERRORS:
                    self.send_header("X-Error-Code", answer["error"])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        for method in ("GET", "POST", "PUT"):
            setattr(Handler, f"do_{method}", Handler._any)
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """Commit a repository with just these files; the commit."""
        self.stored.update({hashlib.sha256(data).hexdigest(): data for data in files.values()})
        self.files[repo] = dict(files)
        return self._committed(repo)

    def _committed(self, repo: str) -> str:
        commit = uuid.uuid4().hex + "0" * 8
        self.history.setdefault(repo, {})[commit] = self.files[repo]
        return commit

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def answer(self, method: str, address: str, body: bytes, authorization: str) -> tuple[int, Any]:
        path = unquote(urlsplit(address).path)
        if status := self.fault(method, path):
            if status == STALL:
                self._over.wait()
            return status, {"error": "broken"}
        if method == "PUT":
            with self._lock:
                self.stored[hashlib.sha256(body).hexdigest()] = body
                self.received += 1
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "RepoNotFound"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in self.files else 200
            self.files.setdefault(repo, {".gitattributes": b"* text\n"})
            return status, {"url": f"{self.url}/datasets/{repo}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        path = re.sub(r"^(/api/datasets/[^/]+/[^/]+)$", r"\1/revision/main", path)
        found = re.match(r"/(?:api/)?datasets/([^/]+/[^/.]+)(?:\.git)?/(.*)", path)
        if found is None or found[1] not in self.files:
            return 404, {"error": "RepoNotFound"}
        read = re.match(r"(revision|tree|paths-info|resolve)/((?:refs/(?:convert|pr)/)?[^/]+)/?(.*)", found[2])
        if read:
            recursive = "recursive=true" in urlsplit(address).query.lower()
            return self._read(found[1], read, [unquote(p) for p in parse_qs(body.decode()).get("paths", [])], recursive)
        return self._of_repository(found[1], found[2], body)

    def _read(self, repo: str, asked: re.Match[str], paths: list[str], recursive: bool) -> tuple[int, Any]:
        """What there is of one revision."""
        kind, revision, path = asked.groups()
        history = self.history.get(repo, {})
        commit = next(reversed(history), "0" * 40) if revision == "main" else revision
        files = self.files[repo] if revision == "main" else history.get(revision)
        if files is None:
            return 404, {"error": "RevisionNotFound"}
        if kind == "revision":
            return 200, {"id": repo, "sha": commit, "siblings": [], "private": False, "tags": [], "downloads": 0}
        if kind == "paths-info":
            return 200, [self._entry(path, files[path]) for path in paths if path in files]
        if kind == "resolve":
            if repo in self.gated:
                return 403, {"error": "GatedRepo"}
            return (200, _Blob(files[path])) if path in files else (404, {"error": "EntryNotFound"})
        inside = {p: data for p, data in files.items() if p.startswith(f"{path}/" if path else "")}
        if path and not inside:
            return 404, {"error": "EntryNotFound"}
        entries = [self._entry(p, data) for p, data in sorted(inside.items())]
        if recursive:
            return 200, entries
        start = len(path) + 1 if path else 0
        folders = sorted({p[: p.index("/", start)] for p in inside if "/" in p[start:]})
        found = [{"type": "directory", "path": p, "oid": uuid.uuid4().hex} for p in folders]
        return 200, found + [entry for entry in entries if "/" not in entry["path"][start:]]

    def _of_repository(self, repo: str, what: str, body: bytes) -> tuple[int, Any]:
        if what.startswith("preupload/"):
            asked = json.loads(body)["files"]
            modes = [("lfs" if file["size"] > _REGULAR else "regular", file["path"]) for file in asked]
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for m, p in modes]}
        if what == "info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self._slot(o) for o in json.loads(body)["objects"]]}
        if what.startswith("commit/"):
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": "EntryNotFound"}

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git}
        if len(data) > _REGULAR:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entry["oid"] = uuid.uuid4().hex + "0" * 8  # of the pointer
        return entry

    def _slot(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.stored:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.url}/upload/{asked['oid']}"}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        """All or nothing; a large file must have been sent before."""
        files = dict(self.files[repo])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    return 400, {"error": "it was not sent"}
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        with self._lock:
            self.files[repo] = files
            self.commits.append(lines[0]["value"]["summary"])
            sha = self._committed(repo)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/datasets/{repo}/commit/{sha}"}
