"""Lists of URLs through the real download stage, from servers that misbehave in every way we know of."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_stage
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sources.server import Server, announced, body, drip, endless, in_turn, redirect, reset, status

from launch.monitor.watch import Watch
from pipeline.config.schema import ConfigError, DownloadConfig, FilterConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.stage import Context
from pipeline.sources.http.names import Names
from pipeline.sources.lists import open_list
from pipeline.stages.download import Download
from pipeline.stages.filter import Filter
from pipeline.telemetry.host_stats import HostStatus


def picture(seed: int, size: int = 24) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


PICTURES = [picture(seed) for seed in range(8)]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for servers takes no time, nor does waiting for other ranks."""

    async def sleep(seconds: float) -> None:
        pass

    monkeypatch.setattr("pipeline.sources.http.client._sleep", sleep)
    monkeypatch.setattr("pipeline.sources.http.manners.Host.pause", lambda self, seconds: None)
    monkeypatch.setattr("pipeline.partitions.engine._POLL", 0.02)


def config_of(memory: Path, listed: Path, **settings: Any) -> DownloadConfig:
    defaults = {
        "allow_private_hosts": True,
        "max_failed_fraction": 1.0,
        "retries": 1,
        "timeout": 100.0,
        "deadline": 200.0,
    }
    return DownloadConfig(
        source="url_list", input=str(listed), output=str(memory / "download"), **{**defaults, **settings}
    )


def download(memory: Path, listed: Path, **settings: Any) -> dict[str, Any]:
    return engine.run(Download(config_of(memory, listed, **settings), Rank()))


def kept(memory: Path) -> list[dict[str, Any]]:
    dataset = Dataset.open(memory / "download")
    return [sample.read() for index in range(dataset.partitions) for sample in dataset.samples(index)]


def newest(memory: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each URL's path."""
    return {row["member"].partition("?")[0].rpartition("/")[2]: row for row in fake_stage.rows(memory / "download")}


# ---- lists of every kind


def write_list(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"list.{kind}"
    match kind:
        case "txt":
            path.write_text("".join(f"{row['url']}\n\n" for row in rows))
        case "csv":
            import csv

            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case "tsv":
            path.write_text("".join(f"{row['url']}\t{row['caption']}\n" for row in rows))
        case "json":
            path.write_text(json.dumps(rows))
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "json", "jsonl", "parquet"])
def test_lists_of_every_kind(server: Server, memory: Path, kind: str) -> None:
    rows = [
        {"url": server.put(f"/{n}.jpg", data), "caption": f'a "{n}"' + ("\nline" if kind == "csv" else "")}
        for n, data in enumerate(PICTURES)
    ]
    success = download(memory, write_list(memory, kind, rows), partition_size=3)
    assert (success["counts"]["in"], success["counts"]["kept"], success["partitions"]) == (8, 8, 3)
    found = kept(memory)
    assert [row["jpg"] for row in found] == PICTURES
    assert [row["url"] for row in found] == [row["url"] for row in rows]
    assert [row["caption"] for row in found] == ([""] * 8 if kind == "txt" else [row["caption"] for row in rows])
    assert all(server.asked(f"/{n}.jpg") == 1 for n in range(8))
    download(memory, memory / f"list.{kind}", partition_size=3)
    assert len(server.requests) == 8
    fake_stage.assert_sound(memory / "download")


def test_columns_by_name_and_several_captions(server: Server, memory: Path) -> None:
    good = hashlib.md5(PICTURES[0]).hexdigest()
    rows = [
        {"URL": server.put("/a", PICTURES[0]), "says": ["one", "two"], "hash": good, "id": 7, "fold": 0},
        {"URL": server.put("/b", PICTURES[1]), "says": [], "hash": good, "id": 8, "fold": 1},
        {"URL": server.put("/c", PICTURES[2]), "says": ["three"], "hash": None, "id": 9, "fold": 9},
    ]
    settings = {"caption_column": "says", "hash_column": "hash", "columns": ("id",)}
    split = {"split_column": "fold", "split_values": ("0", "1")}
    download(memory, write_list(memory, "parquet", rows), **settings, **split)
    (row,) = kept(memory)
    assert (row["captions"], row["caption"], row["meta"]) == (["one", "two"], "one", {"id": 7})
    assert newest(memory)["b"]["reason"] == "wrong_hash"
    assert server.asked("/c") == 0


def test_spans_of_rows_are_the_same_rows_whatever_their_size(tmp_path: Path) -> None:
    rows = [{"url": f"http://h/{n}", "caption": "é" * (n % 5) + '\n"x",' * (n % 3)} for n in range(20)]
    for kind in ("csv", "jsonl", "json", "parquet"):
        rows_of = open_list(write_list(tmp_path, kind, rows))
        for size in (1, 3, 7, 50):
            spans = list(rows_of.spans(size))
            assert [row.values for span in spans for row in rows_of.rows(span)] == rows
            assert [span.stop - span.start for span in spans][:-1] == [size] * (len(spans) - 1)


@pytest.mark.parametrize(
    ("name", "text", "settings", "message"),
    [
        ("list.xml", "<a/>", {}, "a list of URLs is one of"),
        ("list.csv", "a,b\n1,2\n", {}, "which column"),
        ("list.csv", "url,b\nhttp://h/1,2\n", {"caption_column": "text"}, "caption_column=text"),
        ("list.json", "{", {}, "no JSON"),
        ("list.parquet", "x", {}, "no parquet file"),
        ("list.txt", "http://h/1", {"split_column": "url"}, "split_values"),
        ("list.txt", "http://h/1", {"per_host": 0}, "per_host=0"),
        ("list.txt", "http://h/1", {"contact": "a\nb"}, "contact"),
    ],
)
def test_what_makes_no_sense_is_said_before_the_work(
    memory: Path, name: str, text: str, settings: dict[str, Any], message: str
) -> None:
    (memory / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        download(memory, memory / name, **settings)


def test_a_list_that_has_changed_is_not_mixed_with_the_old_one(server: Server, memory: Path) -> None:
    listed = write_list(memory, "txt", [{"url": server.put(f"/{n}", PICTURES[n])} for n in range(2)])
    config = config_of(memory, listed)
    stage = Download(config, Rank())
    partitions = list(stage.plan())
    listed.write_text(listed.read_text() + "http://h/3\n")
    with pytest.raises(ConfigError, match="has changed since"):
        list(stage.source.samples(partitions[0], Context()))


# ---- what servers ask for


def test_opt_outs_are_dropped(server: Server, memory: Path) -> None:
    for name, value in {"a": "noai", "b": "foo, NoImageAI", "c": "otherbot: noai", "d": "latentmill: noindex"}.items():
        server.put(f"/{name}", body(PICTURES[0], X_Robots_Tag=value))
    success = download(memory, write_list(memory, "txt", [{"url": server.url(f"/{n}")} for n in "abcd"]))
    assert success["reasons"] == {"dropped:opted_out": 3}
    assert [row["url"][-1] for row in kept(memory)] == ["c"]
    assert success["counts"]["failed"] == 0


def test_robots_txt_is_heeded_and_asked_for_once(server: Server, memory: Path) -> None:
    server.put("/robots.txt", b"User-agent: *\nDisallow: /private/\n")
    urls = [server.put(path, PICTURES[0]) for path in ("/private/a", "/b", "/c")]
    listed = write_list(memory, "txt", [{"url": url} for url in urls])
    success = download(memory, listed, robots_txt=True, contact="https://lab.example/crawl")
    assert success["reasons"] == {"dropped:robots_txt": 1}
    assert (server.asked("/robots.txt"), server.asked("/private/a"), server.asked("/b")) == (1, 0, 1)
    agents = {request.headers["User-Agent"] for request in server.requests}
    assert agents == {"latentmill (+https://lab.example/crawl)"}


def test_a_host_that_does_not_answer_is_left_alone(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    urls = [{"url": f"http://127.0.0.1:{port}/{n}"} for n in range(40)]
    success = download(memory, write_list(memory, "txt", urls), retries=0, per_host=1)
    assert success["reasons"] == {"failed:connection": 10, "failed:host_down": 30}
    assert all(row["retryable"] for row in fake_stage.rows(memory / "download"))


# ---- the nasty server


def test_a_nasty_server(server: Server, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every healthy URL is kept, each bad one has its reason, and nobody is asked more often than needed."""
    real = Names.addresses

    async def addresses(self: Names, host: str) -> list[str]:
        return ["127.0.0.1"] if host == "public.example" else await real(self, host)

    monkeypatch.setattr(Names, "addresses", addresses)
    image, inside = PICTURES[0], f"http://127.0.0.1:{server.port}/secret"
    server.put("/secret", image)
    bomb = gzip.compress(bytes(80 << 20))
    # name: reply, what comes of it in the first run, after retry_failed, and how often it is asked for in all
    cases: dict[str, tuple[Any, str, str, int]] = {
        "gone": (status(404), "http_404", "http_404", 1),
        "forbidden": (status(403), "http_403", "http_403", 2),
        "signed": (in_turn(status(403), body(image)), "http_403", "", 2),
        "busy": (in_turn(status(429, Retry_After="1"), body(image)), "", "", 2),
        "busy_for_long": (in_turn(status(429, Retry_After="900"), body(image)), "http_429", "", 2),
        "heals": (in_turn(status(500), body(image)), "", "", 2),
        "heals_late": (in_turn(status(500), status(502), body(image)), "http_502", "", 3),
        "resets": (in_turn(reset(image, 100), body(image)), "", "", 2),
        "always_resets": (reset(image, 100), "truncated", "truncated", 4),
        "too_long": (in_turn(announced(image, len(image) + 9), body(image)), "", "", 2),
        "drips": (drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", 0.02), "timeout", "timeout", 4),
        "endless": (endless(), "too_many_bytes", "too_many_bytes", 2),
        "loop": (redirect("/loop"), "too_many_redirects", "too_many_redirects", 6),
        "inside": (redirect(inside), "private_address", "private_address", 2),
        "metadata": (redirect("http://169.254.169.254/latest"), "private_address", "private_address", 2),
        "file": (redirect("file:///etc/passwd"), "bad_url", "bad_url", 1),
        "page": (body(b"<!DOCTYPE html><html>no</html>"), "html", "html", 1),
        "bomb": (body(bomb, Content_Encoding="gzip"), "too_many_bytes", "too_many_bytes", 1),
        "packed": (body(gzip.compress(image), Content_Encoding="gzip"), "", "", 1),
        "empty": (body(b""), "empty", "empty", 1),
        "other": (body(PICTURES[1]), "wrong_hash", "wrong_hash", 1),
        **{f"good{n}": (body(image), "", "", 1) for n in range(30)},
        "moved": (redirect("/good0"), "", "", 1),
    }
    rows = []
    for name, (reply, *_) in cases.items():
        server.put(f"/{name}", reply)
        expected = hashlib.sha256(image).hexdigest() if name in ("other", "good0") else ""
        rows.append({"url": server.url(f"/{name}?token=hushhush", "public.example"), "sha": expected})
    rows.append({"url": "javascript:alert(1)", "sha": ""})
    random.Random(1).shuffle(rows)
    listed = write_list(memory, "jsonl", rows)
    settings = {"allow_private_hosts": False, "timeout": 3.0, "deadline": 60.0, "max_member_bytes": 4 << 20}
    settings |= {"partition_size": 20, "hash_column": "sha"}
    bad_url = {"javascript:alert(1)": "bad_url"}

    success = download(memory, listed, **settings)
    found = {name: row["reason"] for name, row in newest(memory).items()}
    assert found == {name: first for name, (_, first, _, _) in cases.items()} | bad_url
    counts = success["counts"]
    assert counts["in"] == len(rows) == counts["kept"] + counts["dropped"] + counts["failed"]

    success = download(memory, listed, **settings, retry_failed=True)
    reasons = {name: row["reason"] for name, row in newest(memory).items()}
    assert {name: reasons[name] for name in cases} == {name: second for name, (_, _, second, _) in cases.items()}
    counts = success["counts"]
    assert counts["in"] == len(rows) == counts["kept"] + counts["dropped"] + counts["failed"]
    assert counts["kept"] == sum(second == "" for _, _, second, _ in cases.values())
    asked = {name: server.asked(f"/{name}") for name in cases}
    assert asked == {name: times for name, (_, _, _, times) in cases.items()} | {"good0": 2}
    assert server.asked("/secret") == 0
    fake_stage.assert_sound(memory / "download")

    out = memory / "filter"
    settings_of = {"min_image_size": 8, "max_failed_fraction": 1.0}
    filtered = engine.run(Filter(FilterConfig(input=str(memory / "download"), output=str(out), **settings_of), Rank()))
    assert filtered["counts"]["kept"] == counts["kept"]
    for path in (memory / "download").rglob("*"):
        if path.is_file():
            text = str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
            assert b"hushhush" not in text, path


def test_what_a_retry_adds_goes_on_to_the_next_stage(server: Server, memory: Path) -> None:
    server.put("/late", in_turn(status(503), body(PICTURES[1])))
    listed = write_list(memory, "txt", [{"url": server.put("/soon", PICTURES[0])}, {"url": server.url("/late")}])
    out = memory / "filter"

    def run_filter() -> int:
        config = FilterConfig(input=str(memory / "download"), output=str(out), min_image_size=8)
        return int(engine.run(Filter(config, Rank()))["counts"]["kept"])

    download(memory, listed, retries=0)
    assert run_filter() == 1
    download(memory, listed, retries=0, retry_failed=True)
    assert run_filter() == 2
    assert (server.asked("/soon"), server.asked("/late")) == (1, 2)


def test_results_come_in_order_however_they_arrive(server: Server, memory: Path) -> None:
    """The same bytes whatever the order of arrival, also when most of what has come must wait on the disk."""
    from pipeline.sources.http import crawler

    urls = [{"url": server.put(f"/{n}", PICTURES[n])} for n in range(8)]
    listed = write_list(memory, "txt", urls)
    made: list[Any] = []
    held: Callable[[int], None] = lambda size: setattr(crawler, "_HELD", size)  # noqa: E731
    before = crawler._HELD
    try:
        for size, connections in ((before, 1), (100, 8)):
            held(size)
            download(memory, listed, overwrite=bool(made), connections=connections, run_id=str(size))
            made.append(fake_stage.committed(memory / "download"))
    finally:
        held(before)
    assert made[0] == made[1]


def test_status_and_report_say_how_hosts_did(server: Server, memory: Path) -> None:
    from pipeline.stages import report

    urls = [server.put("/a", PICTURES[0]), server.put("/b", PICTURES[1]), server.url("/gone"), "ftp://files.example/x"]
    download(memory, write_list(memory, "txt", [{"url": url} for url in urls]), retries=0)
    ours, other = report.hosts(Dataset.open(memory / "download"))
    assert ours == HostStatus("127.0.0.1", 3, 2, "http_404 1")
    assert other == HostStatus("files.example", 1, 0, "bad_url 1")
    assert "127.0.0.1" in report.page(memory / "download", 0)
    (stage,) = Watch(memory / "download").look().stages
    assert stage.hosts == [ours, other]
