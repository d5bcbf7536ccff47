"""Archives by URL through the real download stage: what the ledger says, and what never gets in."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_stage
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sources.packing import END, PACKED, entry, header, padded, tar_of, tar_of_entries, zip_of
from sources.server import Server, body, drip, endless, in_turn, ranged, redirect, reset, status

from pipeline.config import cli
from pipeline.config.schema import ConfigError, DownloadConfig, FilterConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.finalize import Unbalanced
from pipeline.partitions.stage import Context
from pipeline.samples import Outcome, content_hash, make_key
from pipeline.sources import archives
from pipeline.sources.http_archive import HttpArchive
from pipeline.stages.download import Download
from pipeline.stages.filter import Filter

NOISE = random.Random(0).randbytes(3000)
FILES = {
    "a/one.jpg": b"1" * 1000,
    "a/one.json": b"{}",
    "a/one.txt": b" A small cat. \n",
    "a/two.png": NOISE,
    "a/three.txt": "größer\nals zuvor".encode(),
    "a/three.webp": b"3",
    "readme.md": b"not an image",
    "four.jpeg": b"",
}
CAPTIONS = {"one": "A small cat.", "two": "", "three": "größer\nals zuvor", "four": ""}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for servers takes no time, nor does waiting for other ranks."""

    async def sleep(seconds: float) -> None:
        pass

    monkeypatch.setattr("pipeline.sources.http.client._sleep", sleep)
    monkeypatch.setattr("pipeline.sources.http.manners.Host.pause", lambda self, seconds: None)
    monkeypatch.setattr("pipeline.partitions.engine._POLL", 0.02)


@pytest.fixture
def output(memory: Path) -> Path:
    return memory / "download"


@pytest.fixture
def run(output: Path) -> Run:
    """Download these URLs; what ``_SUCCESS`` says."""

    def run(*urls: str, **settings: Any) -> dict[str, Any]:
        return engine.run(Download(config_of(output, *urls, **settings), Rank()))

    return run


def config_of(output: Path, *urls: str, **settings: Any) -> DownloadConfig:
    return DownloadConfig(
        source="http_archive",
        urls=urls,
        output=str(output),
        **{"allow_private_hosts": True, "max_failed_fraction": 1.0, "retries": 1, **settings},
    )


def containers(output: Path) -> list[dict[str, Any]]:
    return [row for row in fake_stage.rows(output) if row["container"]]


def samples(output: Path) -> list[dict[str, Any]]:
    return [row for row in fake_stage.rows(output) if not row["container"]]


def stored(output: Path) -> dict[str, dict[str, Any]]:
    """What readers get: key → row."""
    dataset = Dataset.open(output)
    rows = [sample.read() for index in range(dataset.partitions) for sample in dataset.samples(index)]
    return {row["key"]: row for row in rows}


def failure(output: Path) -> tuple[str, bool]:
    """Why the only archive failed and whether it is retryable; nothing of it is kept, and the books balance."""
    (row,) = containers(output)[-1:]
    assert (row["outcome"], row["complete"], row["count"]) == ("failed", False, 0)
    assert stored(output) == {}
    success = fake_stage.assert_sound(output)
    assert (success["counts"]["in"], success["counts"]["containers_failed"]) == (0, 1)
    return row["reason"], row["retryable"]


def clean(output: Path) -> None:
    """Nothing but a dataset directory is left, and nothing next to it."""
    assert fake_stage.leftovers(output) == []
    assert sorted(path.name for path in output.parent.iterdir()) == ["download"]
    files = {path.name for path in output.glob("data/*/*/*")}
    assert all(name.endswith((".tar", ".parquet", ".json")) for name in files), files


# ---- what comes in


@pytest.mark.parametrize("name", ["all.tar", "all.tar.gz", "all.tgz", "all.tar.bz2", "all.tar.xz", "all.zip"])
def test_archives_by_url_become_samples(server: Server, run: Run, output: Path, name: str) -> None:
    packed = {"tgz": "gz", "tar": "plain"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
    data = zip_of(FILES) if packed == "zip" else PACKED[packed](tar_of(FILES))
    success = run(server.put(f"/data/{name}", data))
    assert (success["counts"]["in"], success["counts"]["kept"], success["counts"]["containers"]) == (4, 4, 1)

    (container,) = containers(output)
    assert (container["outcome"], container["complete"], container["count"]) == ("kept", True, 4)
    assert (container["source_bytes"], container["source_hash"]) == (len(data), content_hash(data))

    rows = samples(output)
    assert [row["member"] for row in rows] == ["a/one.jpg", "a/two.png", "a/three.webp", "four.jpeg"]
    for row in rows:
        assert (row["key"], row["source"]) == (make_key(f"{name}/{row['member']}"), name)
        assert row["source_hash"] == content_hash(FILES[row["member"]])
        assert row["source_bytes"] == len(FILES[row["member"]])
    if packed == "plain":
        assert all(data[row["source_offset"] :].startswith(FILES[row["member"]]) for row in rows)

    kept = stored(output)
    assert {key.rpartition("/")[2].partition("-")[0]: row["caption"] for key, row in kept.items()} == CAPTIONS
    assert [row["jpg"] for row in kept.values()] == [FILES[row["member"]] for row in rows]
    assert [row["format"] for row in kept.values()] == ["jpeg", "png", "webp", "jpeg"]
    assert kept[make_key(f"{name}/a/one.jpg")]["captions"] == ["A small cat."]
    fake_stage.assert_sound(output)
    clean(output)


def test_the_order_beside_an_image_does_not_matter(server: Server, run: Run, output: Path) -> None:
    files = {}
    for number, order in enumerate((("jpg", "json", "txt"), ("txt", "jpg", "cls"), ("json", "txt", "jpg"))):
        files |= {f"{number}.{kind}": f"{kind} {number}".encode() for kind in order}
    run(server.put("/wds.tar", tar_of(files)))
    assert {row["jpg"]: row["caption"] for row in stored(output).values()} == {
        f"jpg {number}".encode(): f"txt {number}" for number in range(3)
    }


def test_captions_belong_to_their_own_neighbours(server: Server, run: Run, output: Path) -> None:
    entries = [
        ("x.jpg", b"1"),
        ("folder/x.txt", b"of another folder"),
        ("x.txt", b"too far away"),
        ("y.jpg", b"2"),
        ("y.png", b"3"),
        ("y.txt", b"of both"),
        ("._z.jpg", b"macOS"),
        ("z.jpg", b"4"),
        ("._z.txt", b"macOS"),
        ("__MACOSX/._z.jpg", b"macOS"),
        ("other.bin", b"nothing"),
        ("z.txt", b"of z"),
        ("v.1.jpg", b"5"),
        ("v.2.jpg", b"6"),
        ("v.txt", b"of all v"),
        ("w.txt", b"\xff\xff not \x00 utf-8"),
        ("w.jpg", b"7"),
    ]
    run(server.put("/a.tar", tar_of_entries([entry(name, data) for name, data in entries])))
    assert [(row["jpg"], row["caption"]) for row in stored(output).values()] == [
        (b"1", ""),
        (b"2", "of both"),
        (b"3", "of both"),
        (b"4", "of z"),
        (b"5", "of all v"),
        (b"6", "of all v"),
        (b"7", "\ufffd\ufffd not \x00 utf-8"),
    ]


def test_a_name_that_comes_again_is_another_sample(server: Server, run: Run, output: Path) -> None:
    names = ["x.jpg", "x.txt", "x.jpg", "x.txt", "y.jpg", "x.jpg"]
    run(server.put("/a.tar", tar_of_entries([entry(name, b"%d" % n) for n, name in enumerate(names)])))
    found = [(row["key"], row["jpg"], row["caption"]) for row in stored(output).values()]
    first, second = make_key("a.tar/x.jpg"), make_key("a.tar/y.jpg")
    assert found == [
        (first, b"0", "1"),
        (f"{first}==2", b"2", "3"),
        (second, b"4", ""),
        (f"{first}==3", b"5", ""),
    ]
    fake_stage.assert_sound(output)


def test_the_filter_stage_reads_it(server: Server, run: Run, output: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(3):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        files |= {f"{number}.png": file.getvalue(), f"{number}.txt": f"picture {number}".encode()}
    files["broken.jpg"] = b"no image"
    run(server.put("/pictures.tar", tar_of(files)))
    config = FilterConfig(
        input=str(output), output=str(output.with_name("filter")), min_image_size=8, max_failed_fraction=1.0
    )
    success = engine.run(Filter(config, Rank()))
    assert {name: success["counts"][name] for name in ("in", "kept", "failed")} == {"in": 4, "kept": 3, "failed": 1}
    kept = stored(output.with_name("filter"))
    assert [row["caption"] for row in kept.values()] == [f"picture {number}" for number in range(3)]
    assert [row["width"] for row in kept.values()] == [30, 30, 30]


def test_urls_with_the_same_file_name_are_told_apart(server: Server, run: Run, output: Path) -> None:
    urls = [
        server.put("/x/a.tar", tar_of({"1.jpg": b"1"})),
        server.put("/y/a.tar", tar_of({"1.jpg": b"2"})),
        server.put("/0001-a.tar", tar_of({"1.jpg": b"3"})),
        server.put("/query", tar_of({"1.jpg": b"4"})) + "?file=a.tar",
    ]
    success = run(*urls)
    assert (success["counts"]["kept"], success["counts"]["containers"]) == (4, 4)
    assert [row["source"] for row in containers(output)] == [
        "0000-a.tar",
        "0001-a.tar",
        "0002-0001-a.tar",
        "0003-query",
    ]
    assert len(stored(output)) == 4


def test_any_number_of_ranks_makes_the_same_files(server: Server, memory: Path) -> None:
    urls = [server.put(f"/{number}.tar", tar_of({f"{n}.jpg": b"%d" % n for n in range(number)})) for number in range(5)]
    made = []
    for world_size in (1, 2):
        output = memory / str(world_size)
        for number in range(world_size):  # the first does it all; the second finds it finished
            engine.run(Download(config_of(output, *urls), fake_stage.rank_of(number, world_size)))
        made.append(fake_stage.committed(output))
    assert made[0] == made[1]


def test_a_finished_output_asks_for_nothing_again(server: Server, run: Run) -> None:
    url = server.put("/a.tar", tar_of(FILES))
    assert run(url) == run(url)
    assert server.asked("/a.tar") == 1


# ---- whole or not at all

WHOLE = {f"{number}.jpg": NOISE[number : number + 1000] for number in range(3)}


def cut_archives() -> dict[str, tuple[str, bytes]]:
    tar = tar_of(WHOLE, "ustar")
    size = len(tar.rstrip(b"\0")) // 512 * 512 + 512
    packed, zipped = gzip.compress(tar, mtime=0), zip_of(WHOLE)
    noise = random.Random(1).randbytes(300)
    return {
        "at a member's boundary": ("a.tar", tar[: size // 3 * 2]),
        "without an end marker": ("a.tar", tar[:size]),
        "inside a header": ("a.tar", tar[: size // 3 + 100]),
        "inside data": ("a.tar", tar[: size // 3 + 700]),
        "inside the first header": ("a.tar", tar[:200]),
        "a header is damaged": ("a.tar", tar[: size // 3] + noise + tar[size // 3 + 300 :]),
        "gzip without its check sum": ("a.tgz", packed[:-5]),
        "gzip in the middle": ("a.tgz", packed[: len(packed) // 2]),
        "gzip damaged": ("a.tgz", packed[:800] + noise + packed[1100:]),
        "zip without its directory": ("a.zip", zipped[: zipped.index(b"PK\1\2")]),
        "zip without its end": ("a.zip", zipped[: zipped.index(b"PK\5\6") + 10]),
        "nothing": ("a.tar", b""),
        "a page instead": ("a.tar", b"<html>log in first</html>" * 50),
    }


@pytest.mark.parametrize("case", cut_archives())
def test_a_broken_archive_counts_for_nothing_until_the_server_heals(
    server: Server, run: Run, output: Path, case: str
) -> None:
    name, broken = cut_archives()[case]
    good = server.put("/good.tar", tar_of({"good.jpg": b"good"}))
    bad = server.put(f"/{name}", broken)
    success = run(good, bad)
    assert {row["source"]: row["outcome"] for row in containers(output)} == {"good.tar": "kept", name: "failed"}
    row = containers(output)[1]
    assert row["reason"] in ("truncated_archive", "damaged_archive", "not_an_archive", "empty")
    assert (row["retryable"], row["complete"], row["count"], row["source_bytes"]) == (True, False, 0, len(broken))
    assert list(stored(output)) == [make_key("good.tar/good.jpg")]
    counts = success["counts"]
    assert (counts["in"], counts["kept"], counts["containers"], counts["containers_failed"]) == (1, 1, 2, 1)
    clean(output)

    whole = {"a.tar": tar_of(WHOLE), "a.tgz": gzip.compress(tar_of(WHOLE)), "a.zip": zip_of(WHOLE)}[name]
    server.put(f"/{name}", whole)
    counts = run(good, bad, retry_failed=True)["counts"]
    assert (counts["in"], counts["kept"], counts["containers"], counts["containers_failed"]) == (4, 4, 2, 0)
    assert sorted(row["jpg"] for row in stored(output).values()) == sorted([b"good", *WHOLE.values()])
    fake_stage.assert_sound(output)
    assert (server.asked("/good.tar"), server.asked(f"/{name}")) == (1, 2)
    clean(output)


def test_gc_takes_away_what_nobody_will_go_on_with(server: Server, run: Run, output: Path) -> None:
    from pipeline.partitions.gc import collect

    run(server.put("/a.tar", ranged(NOISE, '"one"', cut=1000)), retries=0)
    left = sorted((output / "partial").iterdir())
    assert len(left) == 2
    assert list(collect(Dataset.open(output), 3600.0)) == []
    assert sorted(collect(Dataset.open(output), -1.0)) == left
    assert list((output / "partial").iterdir()) == []


def test_most_archives_failing_is_an_error_that_a_retry_mends(server: Server, run: Run, output: Path) -> None:
    url = server.put("/a.tar", status(503))
    with pytest.raises(Unbalanced, match="1 of 1 archives failed"):
        run(url, max_failed_fraction=0.1)
    server.put("/a.tar", tar_of(WHOLE))
    assert run(url, max_failed_fraction=0.1, retry_failed=True)["counts"]["kept"] == 3
    fake_stage.assert_sound(output)


def test_hashes_are_checked(server: Server, run: Run, output: Path) -> None:
    data = tar_of(WHOLE)
    right, wrong = sha256(data).hexdigest(), sha256(b"else").hexdigest()
    urls = [server.put(f"/{number}.tar", data) for number in range(3)]
    counts = run(*urls, sha256=(right.upper(), wrong, ""))["counts"]
    assert (counts["kept"], counts["containers_failed"]) == (6, 1)
    row = containers(output)[1]
    assert (row["reason"], row["retryable"], row["detail"]) == ("wrong_hash", True, f"sha256 is {right}")
    assert row["source_bytes"] == len(data)
    server.put("/1.tar", b"else")
    run(*urls, sha256=(right.upper(), wrong, ""), retry_failed=True)
    assert containers(output)[-1]["reason"] == "not_an_archive"


# ---- servers


def test_a_server_that_heals_between_tries(server: Server, run: Run, output: Path) -> None:
    data = tar_of(WHOLE)
    url = server.put("/a.tar", in_turn(status(500), status(503, Retry_After="7"), reset(data, 2000), body(data)))
    assert run(url, retries=3)["counts"]["kept"] == 3
    assert containers(output)[0]["source_hash"] == content_hash(data)
    assert server.asked("/a.tar") == 4


@pytest.mark.parametrize(
    ("reply", "reason", "retryable"),
    [
        (status(404), "http_404", False),
        (status(403), "http_403", True),
        (status(500), "http_500", True),
        (reset(NOISE, 1000), "truncated", True),
        (redirect("/a.tar"), "too_many_redirects", False),
        (redirect("file:///etc/passwd"), "bad_url", False),
        (drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.05), "deadline", True),
        (endless(), "too_many_bytes", True),
    ],
    ids=["404", "403", "500", "reset", "loop", "file", "drip", "endless"],
)
def test_an_archive_that_does_not_come(
    server: Server, run: Run, output: Path, reply: Any, reason: str, retryable: bool
) -> None:
    run(server.put("/a.tar", reply), deadline=0.5 if reason == "deadline" else 60.0, max_archive_bytes=10_000_000)
    assert failure(output) == (reason, retryable)
    clean(output)
    asked = len(server.requests)
    run(server.url("/a.tar"), deadline=0.5 if reason == "deadline" else 60.0, max_archive_bytes=10_000_000)
    assert len(server.requests) == asked


def test_only_what_may_heal_is_asked_for_again(server: Server, run: Run, output: Path) -> None:
    urls = [server.put("/gone.tar", status(404)), server.put("/busy.tar", status(503))]
    run(*urls, retries=0)
    server.put("/busy.tar", tar_of(WHOLE))
    assert run(*urls, retries=0, retry_failed=True)["counts"]["kept"] == 3
    assert (server.asked("/gone.tar"), server.asked("/busy.tar")) == (1, 2)
    fake_stage.assert_sound(output)


def test_private_hosts_must_be_allowed(server: Server, run: Run, output: Path) -> None:
    url = server.put("/a.tar", tar_of(WHOLE))
    run(url, allow_private_hosts=False)
    assert failure(output) == ("private_address", True)
    assert server.requests == []
    assert run(url, retry_failed=True)["counts"]["kept"] == 3


def test_a_stop_is_heeded_while_an_archive_comes(server: Server, output: Path) -> None:
    class Stop(Exception):
        pass

    source = HttpArchive(config_of(output, server.put("/a.tar", endless())))
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise Stop

    source.check_stop = stop
    (partition,) = source.plan()
    with pytest.raises(Stop):
        list(source.samples(partition, Context()))


def test_a_full_disk_is_no_failure_of_the_archive(
    server: Server, run: Run, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.sources.partial import Partial
    from pipeline.storage import StorageError

    def write(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "write", write)
        with pytest.raises(StorageError, match="No space left"):
            run(server.put("/a.tar", tar_of(WHOLE)))
    assert run(server.url("/a.tar"))["counts"]["kept"] == 3
    clean(output)


def test_what_does_not_fit_is_not_begun(
    server: Server, run: Run, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.put("/a.tar", tar_of(WHOLE))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(ConfigError, match="data_dir=, a subset=, or stage=filter with fuse=true.*check_space=false"):
        run(url, expected_gb=0.00001)
    assert server.requests == []  # the dataset's own word
    with pytest.raises(ConfigError, match="are free"):
        run(url)  # the server's
    assert stored_bytes(output) == 0
    assert run(url, check_space=False)["counts"]["kept"] == 3


def stored_bytes(output: Path) -> int:
    return sum(path.stat().st_size for path in output.glob("partial/*"))


# ---- secrets


def test_secrets_appear_nowhere(
    server: Server, run: Run, output: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hushhush"
    server.put("/good.tar", tar_of(WHOLE))
    server.put("/cut.tar", tar_of(WHOLE)[:2000])
    server.put("/reset.tar", reset(NOISE, 10))
    server.put("/moved.tar", redirect(f"http://me:{secret}@127.0.0.1:{server.port}/good.tar?sig={secret}"))
    server.put("/away.tar", redirect(f"ftp://me:{secret}@127.0.0.1/?sig={secret}"))
    names = ("good", "cut", "reset", "moved", "away", "gone")
    parameters = f"?X-Amz-Signature={secret}&part=7&Expires=9{secret}&token={secret}#{secret}"
    urls = [f"http://user:{secret}@127.0.0.1:{server.port}/{name}.tar{parameters}" for name in names]
    config = config_of(output, *urls)
    with caplog.at_level("DEBUG"):
        engine.main(Download, config, Rank())
        engine.main(Download, config_of(output, *urls, retry_failed=True), Rank())
        with pytest.raises(ConfigError) as stale:
            run(*urls, max_member_bytes=5)
        with pytest.raises(ConfigError) as wrong:
            run(*urls, f"ftp://me:{secret}@host/?token={secret}")
    assert len(stored(output)) == 6
    said = [*capfd.readouterr(), caplog.text, cli.dump(config), json.dumps(cli.to_json(config))]
    assert "part=7" in caplog.text
    assert secret not in "".join([*said, str(stale.value), str(wrong.value)])
    for path in output.rglob("*"):
        assert secret not in path.name
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
            if path.suffix == ".parquet":  # compressed
                assert secret not in str(pq.read_table(path).to_pylist()), path
    assert all(secret in request.path for request in server.requests)  # but the server was shown them


def test_a_url_that_is_signed_anew_is_the_same(server: Server, run: Run, output: Path) -> None:
    server.put("/a.tar", status(403))
    run(server.url("/a.tar?Expires=1&Signature=old"))
    server.put("/a.tar", tar_of(WHOLE))
    assert run(server.url("/a.tar?Expires=2&Signature=new"), retry_failed=True)["counts"]["kept"] == 3
    with pytest.raises(ConfigError, match="urls="):
        run(server.url("/b.tar?Expires=2&Signature=new"))


# ---- hostile members

HOSTILE = ["../../../escape.jpg", "/etc/escape.jpg", "a/../../escape.jpg", "C:\\escape.jpg", "..\\..\\escape.jpg"]


@pytest.mark.parametrize("make", [tar_of, zip_of], ids=["tar", "zip"])
def test_names_that_lead_outside_are_names_like_any_other(
    server: Server, run: Run, output: Path, make: Callable[[dict[str, bytes]], bytes]
) -> None:
    run(server.put("/a", make({name: name.encode() for name in HOSTILE})))
    assert [row["member"] for row in samples(output)] == HOSTILE
    assert {row["jpg"].decode() for row in stored(output).values()} == set(HOSTILE)
    for path in output.glob("data/*/*/*.tar"):
        with tarfile.open(path) as archive:
            assert all("/../" not in f"/{name}/" and name[0] == "a" for name in archive.getnames())
    assert not list(output.parent.rglob("*escape*"))
    clean(output)


def test_links_and_devices_are_rows_that_say_so(server: Server, run: Run, output: Path) -> None:
    kinds = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "chr": tarfile.CHRTYPE, "blk": tarfile.BLKTYPE}
    kinds |= {"fifo": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE}
    entries = [entry(f"{name}.jpg", type=kind, linkname="/etc/passwd") for name, kind in kinds.items()]
    entries += [entry("real.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), entry("real.jpg", b"real")]
    run(server.put("/a.tar", tar_of_entries(entries)))
    assert {row["member"]: f"{row['outcome']}:{row['reason']}" for row in samples(output)} == {
        **{f"{name}.jpg": "failed:not_regular" for name in kinds if name != "folder"},
        "real.jpg": "kept:",
    }
    (row,) = stored(output).values()
    assert (row["jpg"], row["caption"]) == (b"real", "")
    fake_stage.assert_sound(output)


def test_members_that_are_too_large_are_not_read(server: Server, run: Run, output: Path) -> None:
    files = {"a.jpg": bytes(1001), "a.txt": b"x" * 100_000, "b.jpg": b"y" * 1000, "b.txt": b"z" * 100_000}
    for name, data in {"a.tar": tar_of(files), "a.zip": zip_of(files)}.items():
        server.put(f"/{name}", data)
    run(server.url("/a.tar"), server.url("/a.zip"), max_member_bytes=1000)
    assert [(row["reason"], row["retryable"]) for row in samples(output)] == [
        ("too_many_bytes", False),
        ("", False),
    ] * 2
    assert all(row["jpg"] == b"y" * 1000 and len(row["caption"]) <= 65536 for row in stored(output).values())


def test_names_that_are_no_text_are_made_text(server: Server, run: Run, output: Path) -> None:
    names = [
        b"caf\xe9.jpg",
        b"caf\xe8.jpg",
        b"\xff\xfe\x80.jpg",
        b"tab\tnew\nline.jpg",
        b"\xed\xa0\x80.jpg",
        "é.jpg".encode(),
    ]
    data = b"".join(header(name, 2) + padded(b"%02d" % number) for number, name in enumerate(names)) + END
    nul = b"26 path=nul\0in\0the\0name.jpg\n"
    nul = b"%d%s" % (len(nul), nul[2:])
    run(server.put("/a.tar", header("x", len(nul), b"x") + padded(nul) + header("x", 2) + padded(b"99") + data))
    rows = samples(output)
    assert [row["member"] for row in rows] == [
        "nul\0in\0the\0name.jpg",
        "%:caf%E9.jpg",
        "%:caf%E8.jpg",
        "%:%FF%FE%80.jpg",
        "tab\tnew\nline.jpg",
        "%:%ED%A0%80.jpg",
        "é.jpg",
    ]
    assert rows[1]["key"] == make_key("a.tar/caf\udce9.jpg") == "a=2Etar/caf=E9-jpg"
    assert len(stored(output)) == 7
    fake_stage.assert_sound(output)


def test_very_long_names_are_told_apart_and_refused_beyond_reason(server: Server, run: Run, output: Path) -> None:
    names = [f"{'n' * 4000}{number}.jpg" for number in range(3)] + ["n" * 5000 + ".jpg", "é" * 100_000 + ".jpg"]
    run(server.put("/a.tar", tar_of({name: name[-5:].encode() for name in names})))
    rows = samples(output)
    assert [row["reason"] for row in rows] == ["", "", "", "name_too_long", "name_too_long"]
    assert [row["member"] for row in rows[:3]] == names[:3]
    assert all(len(row["member"]) < 300 for row in rows[3:])
    assert len({row["key"] for row in rows}) == 5 and all(len(row["key"]) <= 200 for row in rows)


def test_nested_archives_are_not_entered(server: Server, run: Run, output: Path) -> None:
    inner = tar_of({"inner.jpg": b"x"})
    run(server.put("/a.tar", tar_of({"inner.tar": inner, "inner.zip": zip_of({"y.jpg": b"y"}), "outer.jpg": b"z"})))
    assert [row["member"] for row in samples(output)] == ["outer.jpg"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header("bomb", 2**31, b"x") + END, "archive_bomb"),
        (gzip.compress(header("bomb", 2**31, b"L") + END), "archive_bomb"),
        (gzip.compress(tar_of({"a.jpg": bytes(3 << 20)})), "archive_bomb"),
        (zip_of({f"{n}.jpg": bytes(1 << 20) for n in range(3)}), "archive_bomb"),
        (header("a.jpg", b"\x80" + b"\x7f" * 11) + END, "truncated_archive"),
        (b"".join(header(f"{n}.jpg") for n in range(101)) + END, "too_many_members"),
    ],
    ids=["pax", "long name", "gzip", "zip", "claimed size", "members"],
)
def test_bombs_fail_as_a_whole(
    server: Server, run: Run, output: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: str
) -> None:
    monkeypatch.setattr(archives, "_HONEST", 1 << 20)
    monkeypatch.setattr(archives, "_RATIO", 10)
    run(server.put("/a", data), max_members=100)
    assert failure(output)[0] == reason
    clean(output)


def test_broken_members_of_a_zip_are_rows_of_their_own(server: Server, run: Run, output: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("flipped.jpg", "locked.jpg", "good.jpg"):
            archive.writestr(name, name * 100)
    data = bytearray(file.getvalue())
    data[data.index(b"flipped.jpg" * 5) + 50] ^= 1
    data[data.rindex(b"locked.jpg") - 46 + 8] |= 1
    counts = run(server.put("/a.zip", bytes(data)))["counts"]
    assert (counts["in"], counts["kept"], counts["failed"], counts["containers_failed"]) == (3, 1, 2, 0)
    assert [(row["member"], row["reason"]) for row in samples(output)] == [
        ("flipped.jpg", "damaged_member"),
        ("locked.jpg", "encrypted"),
        ("good.jpg", ""),
    ]
    assert all(not row["retryable"] for row in samples(output))
    fake_stage.assert_sound(output)


def outcomes_of(server: Server, output: Path, data: bytes, **settings: Any) -> Iterator[Outcome]:
    source = HttpArchive(config_of(output, server.put("/a.tar", data), **settings))
    (partition,) = source.plan()
    return source.samples(partition, Context())


def test_a_group_of_one_stem_stays_small(server: Server, output: Path) -> None:
    """Members that belong together are held in memory together: not so any number of them, or of bytes."""
    same = b"".join(header(f"x.{number}.jpg", 100) + padded(bytes(100)) for number in range(200)) + END
    found = list(outcomes_of(server, output, same))
    assert len([outcome for outcome in found if outcome.status == "kept" and not outcome.container]) == 200
    large = b"".join(header(f"x.{number}.jpg", 900) + padded(bytes(900)) for number in range(5)) + header("x.txt", 4)
    *rows, container = outcomes_of(server, output, large + padded(b"late") + END, max_member_bytes=1000)
    assert container.status == "kept"
    assert [outcome.row["caption"] for outcome in rows if outcome.row] == ["", "", "", "", "late"]


def test_a_flood_of_members_that_are_no_images_leaves_nothing_behind(server: Server, output: Path) -> None:
    data = b"".join(header(f"{number}.bin") for number in range(20_000)) + header("a.jpg", 1) + padded(b"x") + END
    image, container = outcomes_of(server, output, data)
    assert (image.status, container.status, container.count) == ("kept", "kept", 1)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ()}, "needs urls"),
        ({"urls": ("/local/a.tar",)}, "only http and https"),
        ({"urls": ("http://host:port/a.tar",)}, "cannot be understood"),
        ({"sha256": ("0" * 64, "1" * 64)}, "2 hashes for 1 urls"),
        ({"sha256": ("abc",)}, "not a SHA-256"),
        ({"timeout": -1.0}, "timeout=-1.0"),
        ({"deadline": -1.0}, "deadline=-1.0"),
        ({"max_members": 0}, "max_members=0"),
    ],
)
def test_settings_that_make_no_sense_are_said_before_the_work(
    output: Path, settings: dict[str, Any], message: str
) -> None:
    config = {"urls": ("http://host.example/a.tar",), **settings}
    with pytest.raises(ConfigError, match=message):
        list(HttpArchive(DownloadConfig(source="http_archive", **config)).plan())
