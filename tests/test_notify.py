"""notify=<URL>: what is posted when work ends, what is tried again, and that no message shows the URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch import notify, submit
from pipeline.config.schema import ConfigError


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]], list[int]]]:
    """Its URL, what was posted to it, and the codes that it answers with, 204 when there are none left."""
    got: list[dict[str, Any]] = []
    codes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(codes.pop(0) if codes else 204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/T0/hush", got, codes
        running.shutdown()


Server = tuple[str, list[dict[str, Any]], list[int]]


def test_a_message_is_for_people_and_for_programs(server: Server) -> None:
    url, got, _ = server
    assert notify.send(url, notify.message("failed", "12", "filter-1a", "/data/filter", "rank 3: disk full")) == ""
    (message,) = got
    assert message["text"] == "Latentmill: filter-1a (job 12) in /data/filter failed: rank 3: disk full"
    assert message["content"] == message["text"]
    assert (message["event"], message["job"], message["work"]) == ("failed", "12", "/data/filter")


@pytest.mark.parametrize(("codes", "posts", "problem"), [
    ([500, 429], 3, ""),
    ([503, 503, 503], 3, "no message was sent: the host 127.0.0.1 of notify= answers 503 Service Unavailable"),
    ([404], 1, "no message was sent: the host 127.0.0.1 of notify= answers 404 Not Found"),
])  # fmt: skip
def test_what_may_pass_is_tried_again(server: Server, codes: list[int], posts: int, problem: str) -> None:
    url, got, answers = server
    answers += codes
    assert notify.send(url, notify.message("finished"), pause=0.0) == problem
    assert len(got) == posts


def test_a_server_that_is_not_there_ends_nothing_and_its_url_is_not_shown() -> None:
    said = notify.send("http://127.0.0.1:9/T0/hush", notify.message("finished"), pause=0.0)
    assert "127.0.0.1 of notify= cannot be reached" in said and "hush" not in said


@pytest.mark.parametrize("url", ["mailto:hush@example.org", "hush", "https://", "http://[hush", "file:///hush"])
def test_what_is_no_url_of_the_web_is_refused_unseen(url: str) -> None:
    with pytest.raises(ConfigError, match="notify=: expected a URL") as error:
        notify.require_url(url)
    assert "hush" not in str(error.value)


def test_stages_on_this_machine_tell_as_well(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url, got, _ = server
    plan = ["dataset=shapes", "count=20", f"data_dir={tmp_path}", "cluster=inline", f"notify={url}"]
    assert submit.main(["stage=download", *plan]) == 0
    with pytest.raises(SystemExit):
        submit.main(["stage=download", *plan, "image_size=16"])  # made with another size
    work = f"{tmp_path}/shapes/train/download"
    assert [(message["event"], message["work"], message["reason"]) for message in got] == [
        ("finished", work, ""),
        ("failed", work, got[-1]["reason"]),
    ]
    assert "was made with image_size=" in got[-1]["reason"]
    assert "hush" not in "".join(capfd.readouterr())
