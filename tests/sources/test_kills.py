"""kill -9 of a rank that downloads: an archive resumes where it was, a list of URLs loses its open partition alone."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fake_stage
import numpy as np
import pytest
import xxhash
from PIL import Image
from sources.packing import END, header
from sources.server import Server, body

from pipeline.partitions.dataset import Dataset

_SYNC = 64 << 20
_MEMBER = 1 << 20


def killed_when(reached: Callable[[], object], command: list[str]) -> None:
    """Start ``command``, and kill it when ``reached`` says so."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not reached():
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.communicate()


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- a large archive


class LargeTar:
    """A tar of 2 GiB, made while it is served; ten of its members are images, by their names."""

    members = 2048
    piece = 512 + _MEMBER
    size = members * piece + len(END)

    def __init__(self) -> None:
        self.blocks = [random.Random(seed).randbytes(_MEMBER) for seed in range(8)]
        self.names = [f"{n}.{'jpg' if n % 205 == 1 else 'bin'}" for n in range(self.members)]

    def parts(self, start: int = 0) -> Iterator[bytes]:
        for number in range(start // self.piece, self.members):
            part = header(self.names[number], _MEMBER) + self.blocks[number % 8]
            yield part[start - number * self.piece :] if start > number * self.piece else part
        yield END[max(0, start - self.members * self.piece) :]


def test_a_killed_download_of_a_large_archive_goes_on_where_it_was(tmp_path: Path) -> None:
    tar = LargeTar()
    half = tar.size // 2
    held = threading.Event()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        handler.send_response(206 if start else 200)
        handler.send_header("ETag", '"one"')
        handler.send_header("Content-Length", str(tar.size - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{tar.size - 1}/{tar.size}")
        handler.end_headers()
        sent = start
        for part in tar.parts(start):
            if sent > half and not start:
                held.set()
                handler.server.owner.stopping.wait(300)  # type: ignore[attr-defined]
                return
            handler.wfile.write(part)
            sent += len(part)

    out = tmp_path / "out"

    def synced() -> int:
        return max((int(json.loads(path.read_text())["synced"]) for path in out.glob("partial/*.json")), default=0)

    with Server() as server:
        command = [sys.executable, "-m", "pipeline.stages.download", "source=http_archive", f"output={out}"]
        command += [f"urls=[{server.put('/a.tar', reply)}]", "allow_private_hosts=true"]
        killed_when(lambda: held.is_set() and synced() > half - 2 * _SYNC, command)
        run(command)
        first, second = server.requests
    assert "Range" not in first.headers
    assert int(second.headers["Range"].removeprefix("bytes=").removesuffix("-")) > half - 2 * _SYNC
    whole = xxhash.xxh3_128()
    for part in tar.parts():
        whole.update(part)
    *rows, container = fake_stage.rows(out)
    assert (container["source_bytes"], container["source_hash"]) == (tar.size, whole.hexdigest())
    assert [row["member"] for row in rows] == [name for name in tar.names if name.endswith("jpg")]
    assert {row["source_hash"] for row in rows} == {
        xxhash.xxh3_128_hexdigest(tar.blocks[n % 8]) for n in range(1, tar.members, 205)
    }
    assert list((out / "partial").iterdir()) == []


# ---- a list of URLs

_ROWS = 30
_PARTITION = 6
_STUCK = 15  # in the third partition


def photo(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("fuse", [False, True], ids=["download", "fused filter"])
def test_a_killed_rank_of_a_list_of_urls_loses_its_open_partition_alone(memory: Path, fuse: bool) -> None:
    killed = threading.Event()

    def held(handler: BaseHTTPRequestHandler) -> None:
        if not killed.is_set():
            handler.server.owner.stopping.wait(300)  # type: ignore[attr-defined]
        body(photo(_STUCK))(handler)

    out = memory / "out"
    with Server() as server:
        urls = [server.put(f"/{number}.jpg", photo(number)) for number in range(_ROWS)]
        server.put(f"/{_STUCK}.jpg", held)
        (memory / "list.txt").write_text("\n".join(urls))
        command = [sys.executable, "-m", f"pipeline.stages.{'filter' if fuse else 'download'}", "source=url_list"]
        command += [f"input={memory / 'list.txt'}", f"output={out}", f"partition_size={_PARTITION}"]
        command += ["allow_private_hosts=true", "timeout=300", "deadline=600", "lease=0.5", "check_space=false"]
        command += ["fuse=true", "min_image_size=8", "workers=0"] if fuse else []
        last = range(_STUCK // _PARTITION * _PARTITION, _STUCK // _PARTITION * _PARTITION + _PARTITION)
        killed_when(lambda: all(server.asked(f"/{number}.jpg") for number in last), command)
        before = {path.name: path.stat().st_ino for path in out.glob("data/000/0*")}
        killed.set()
        run(command)
        asked = [server.asked(f"/{number}.jpg") for number in range(_ROWS)]
    assert sorted(before) == ["00000", "00001"]
    assert asked == [2 if number in last else 1 for number in range(_ROWS)]
    assert {name: (out / "data/000" / name).stat().st_ino for name in before} == before
    assert Dataset.open(out).require_success()["counts"]["kept"] == _ROWS
    fake_stage.assert_sound(out)
