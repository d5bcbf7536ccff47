"""What an interrupted download leaves, and what the next one makes of it."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from sources.server import Server, body, ranged

from pipeline.samples import SampleError, content_hash
from pipeline.sources import partial
from pipeline.sources.http import Policy, fetch
from pipeline.sources.partial import Partial

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "_SYNC", 1000)


@pytest.fixture
def get(tmp_path: Path) -> Callable[..., bytes]:
    """Fetch a file once, by way of ``partial/``."""

    def get(url: str, **expected: str) -> bytes:
        with Partial(tmp_path / "partial", tmp_path, "name", **expected) as sink:
            size = fetch(url, sink, Policy(allow_private_hosts=True, retries=0))
            file, digest = sink.whole()
            data = file.read()
            assert (len(data), content_hash(data)) == (size, digest)
            sink.done()
        return data

    return get


def left(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "partial"
    return sorted(folder.iterdir()) if folder.exists() else []


def ranges(server: Server) -> list[str]:
    return [request.headers.get("Range", "") for request in server.requests]


def test_an_interrupted_file_goes_on_where_it_was(server: Server, tmp_path: Path, get: Callable[..., bytes]) -> None:
    url = server.put("/a", ranged(DATA, '"one"', cut=100_000))
    for _ in range(2):
        with pytest.raises(SampleError, match="truncated"):
            get(url)
    assert [path.stat().st_size for path in left(tmp_path) if path.suffix != ".json"] == [200_000]
    assert get(url) == DATA
    assert ranges(server) == ["", "bytes=100000-", "bytes=200000-"]
    assert left(tmp_path) == []


def test_another_version_begins_anew(server: Server, tmp_path: Path, get: Callable[..., bytes]) -> None:
    url = server.put("/a", ranged(DATA, '"one"', cut=100_000))
    with pytest.raises(SampleError):
        get(url)
    other = DATA[::-1]
    server.put("/a", ranged(other, '"two"'))
    assert get(url) == other
    assert ranges(server) == ["", "bytes=100000-"]


@pytest.mark.parametrize("etag", ['W/"weak"', ""])
def test_without_a_strong_validator_nothing_is_left(
    server: Server, tmp_path: Path, get: Callable[..., bytes], etag: str
) -> None:
    url = server.put("/a", ranged(DATA, etag, cut=100_000))
    with pytest.raises(SampleError):
        get(url)
    assert left(tmp_path) == []
    server.put("/a", body(DATA))
    assert get(url) == DATA
    assert ranges(server) == ["", ""]


def test_what_has_not_reached_the_disk_is_asked_for_again(
    server: Server, tmp_path: Path, get: Callable[..., bytes]
) -> None:
    """A mark says what is safe; a file that lost its end, or a damaged mark, is believed no further."""
    url = server.put("/a", ranged(DATA, '"one"', cut=100_000))
    with pytest.raises(SampleError):
        get(url)
    (mark,) = [path for path in left(tmp_path) if path.suffix == ".json"]
    (data,) = [path for path in left(tmp_path) if path.suffix != ".json"]
    said = json.loads(mark.read_text())
    mark.write_text(json.dumps({**said, "synced": 50_000}))
    os.truncate(data, 60_000)
    server.put("/a", ranged(DATA, '"one"'))
    assert get(url) == DATA
    assert ranges(server)[-1] == "bytes=50000-"


@pytest.mark.parametrize("damage", [lambda mark: mark.write_text("{"), lambda mark: mark.unlink()])
def test_a_damaged_mark_is_none(
    server: Server, tmp_path: Path, get: Callable[..., bytes], damage: Callable[[Path], None]
) -> None:
    url = server.put("/a", ranged(DATA, '"one"', cut=100_000))
    with pytest.raises(SampleError):
        get(url)
    damage(next(path for path in left(tmp_path) if path.suffix == ".json"))
    server.put("/a", ranged(DATA, '"one"'))
    assert get(url) == DATA
    assert ranges(server)[-1] == ""


def test_a_whole_file_that_was_not_used_yet_costs_one_byte(
    server: Server, tmp_path: Path, get: Callable[..., bytes]
) -> None:
    url = server.put("/a", ranged(DATA, '"one"'))
    with Partial(tmp_path / "partial", tmp_path, "name") as sink:
        fetch(url, sink, Policy(allow_private_hosts=True))
    assert get(url) == DATA
    assert ranges(server)[-1] == f"bytes={len(DATA) - 1}-"


def test_a_wrong_hash_is_found_in_what_was_resumed(server: Server, tmp_path: Path, get: Callable[..., bytes]) -> None:
    """A server that lies about its versions: the hash is that of the whole file, and it begins again the next time."""
    url = server.put("/a", ranged(bytes(300_000), '"one"', cut=100_000))
    import hashlib

    expected = hashlib.sha256(DATA).hexdigest()
    with pytest.raises(SampleError):
        get(url, sha256=expected)
    server.put("/a", ranged(DATA, '"one"'))
    with pytest.raises(SampleError, match="wrong_hash"):
        get(url, sha256=expected)
    assert left(tmp_path) == []
    assert get(url, sha256=expected) == DATA


def test_a_server_that_ignores_the_range_or_gives_another_one(
    server: Server, tmp_path: Path, get: Callable[..., bytes]
) -> None:
    def other(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(206)
        handler.send_header("ETag", '"one"')
        handler.send_header("Content-Range", f"bytes 5-{len(DATA) - 1}/{len(DATA)}")
        handler.send_header("Content-Length", str(len(DATA) - 5))
        handler.end_headers()
        handler.wfile.write(DATA[5:])

    url = server.put("/a", ranged(DATA, '"one"', cut=100_000))
    with pytest.raises(SampleError):
        get(url)
    server.put("/a", other)
    with pytest.raises(SampleError, match="http_206"):
        get(url)
    server.put("/a", body(DATA, ETag='"one"'))
    assert get(url) == DATA


def test_two_processes_at_one_file_do_no_harm(server: Server, tmp_path: Path) -> None:
    """One that was believed dead goes on writing while its successor does."""
    url = server.put("/a", ranged(DATA, '"one"'))
    found = []

    def run() -> None:
        with Partial(tmp_path / "partial", tmp_path, "name") as sink:
            fetch(url, sink, Policy(allow_private_hosts=True))
            found.append(sink.whole()[1])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content_hash(DATA)] * 4
