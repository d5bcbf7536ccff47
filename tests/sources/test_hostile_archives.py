"""The download stage, in a process of its own, on a folder of archives that are all out for harm.

What each kind comes to in detail is in test_archives.py and test_http_archive.py.
"""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import fake_stage
import numpy as np
import pytest
from sources.packing import END, entry, header, tar_of, tar_of_entries, zip_of

_FLOOD = 1_000_000
_MOST = 400  # MiB; the stage itself takes 120
_PROGRAM = """
import re, runpy, sys
runpy.run_module("pipeline.stages.download", run_name="__main__", alter_sys=True)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def zip_flood() -> bytes:
    """A zip of a million empty members, each with a local header of its own."""
    numbers = np.arange(_FLOOD)
    name = np.char.zfill(numbers.astype("S7"), 7)
    local = np.zeros(_FLOOD, [("head", "V26"), ("name_length", "<u2"), ("rest", "<u2"), ("name", "S11")])
    local["head"] = np.void(struct.pack("<4s5H3L", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0))
    local["name_length"], local["name"] = 11, np.char.add(name, b".bin")
    central = np.zeros(
        _FLOOD, [("head", "V28"), ("name_length", "<u2"), ("rest", "V12"), ("at", "<u4"), ("name", "S11")]
    )
    central["head"] = np.void(struct.pack("<4s6H3L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0))
    central["name_length"], central["name"], central["at"] = 11, local["name"], numbers * local.itemsize
    sizes = len(central.tobytes()), len(local.tobytes())
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, _FLOOD, _FLOOD, *sizes)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, sum(sizes), 1)
    ones = 0xFFFFFFFF
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, ones, ones, 0)
    return local.tobytes() + central.tobytes() + end


def overlapping_zip() -> bytes:
    """One kernel that a thousand entries share: 10 MB that become 10 GB."""
    kernel = zlib.compress(bytes(10_000_000))[2:-4]
    crc = zlib.crc32(bytes(10_000_000))
    local = (
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(kernel), 10_000_000, 8, 0) + b"0000.jpg" + kernel
    )
    fields = (b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(kernel), 10_000_000, 8, 0, 0, 0, 0, 0, 0)
    central = b"".join(struct.pack("<4s6H3L5H2L", *fields) + b"%04d.jpg" % number for number in range(1000))
    return local + central + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1000, 1000, len(central), len(local), 0)


def corpus(folder: Path, outside: Path) -> dict[str, str]:
    """Write the archives; what becomes of each as a whole."""
    names = ["../../escape.jpg", f"{outside}/escape.jpg", "a/../../../escape.jpg", "..\\escape.jpg", "dir/escape.jpg"]
    through = [entry("dir", type=tarfile.SYMTYPE, linkname=str(outside)), entry("dir/escape.jpg", b"x")]
    through += [entry("hard.jpg", type=tarfile.LNKTYPE, linkname=f"{outside}/secret.jpg")]
    through += [entry("soft.jpg", type=tarfile.SYMTYPE, linkname=f"{outside}/secret.jpg")]
    devices = [entry(f"{kind.hex()}.jpg", type=kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)]
    inner = tar_of({"inner.jpg": b"x"})
    for _ in range(5):
        inner = gzip.compress(tar_of({"deeper.tar.gz": inner}))
    archives: dict[str, tuple[bytes, str]] = {
        "traversal.tar": (tar_of(dict.fromkeys(names, b"x")), ""),
        "traversal.zip": (zip_of(dict.fromkeys(names, b"x")), ""),
        "links.tar": (tar_of_entries(through), ""),
        "devices.tar": (tar_of_entries(devices), ""),
        "duplicates.tar": (tar_of_entries([entry("same.jpg", b"%d" % n) for n in range(100)]), ""),
        "nested.tar.gz": (inner, ""),
        "flood.tar": (header("x.bin") * _FLOOD + END, "too_many_members"),
        "flood.zip": (zip_flood(), "too_many_members"),
        "bomb.tar.gz": (gzip.compress(header("a.jpg", 2**32) + bytes((16 << 20) - 512), 1) + _zeros(), "archive_bomb"),
        "overlap.zip": (overlapping_zip(), "archive_bomb"),
        "header.tar": (header("x", 2**33, b"x") + END, "archive_bomb"),
        "claims.tar": (header("a.jpg", 2**40) + END, "truncated_archive"),
    }
    for name, (data, _) in archives.items():
        (folder / name).write_bytes(data)
    with (folder / "hole.jpg").open("wb") as hole:
        hole.truncate(2**42)
    subprocess.run(["tar", "-S", "-cf", "sparse.tar", "hole.jpg"], cwd=folder, check=True)
    (folder / "hole.jpg").unlink()
    return {name: reason for name, (_, reason) in archives.items()} | {"sparse.tar": ""}


def _zeros() -> bytes:
    """Two GiB, packed."""
    return gzip.compress(bytes(16 << 20), 1) * 128


@pytest.fixture
def outside(memory: Path) -> Path:
    place = memory / "outside"
    place.mkdir()
    (place / "secret.jpg").write_bytes(b"secret")
    return place


def test_a_corpus_of_hostile_archives_neither_gets_out_nor_blows_memory(memory: Path, outside: Path) -> None:
    given, here = memory / "given", memory / "a/b/here"
    given.mkdir()
    here.mkdir(parents=True)
    expected = corpus(given, outside)
    before = {path: path.stat().st_mtime_ns for path in outside.iterdir()}
    command = [sys.executable, "-c", _PROGRAM, "source=webdataset", f"input={given}", f"output={here / 'out'}"]
    command += [f"max_members={_FLOOD - 1}", "max_failed_fraction=1", "check_space=false"]
    repository = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env={"PYTHONPATH": repository})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < _MOST << 10

    rows = list(fake_stage.rows(here / "out"))
    assert {row["source"]: row["reason"] for row in rows if row["container"]} == expected
    reasons = Counter(f"{row['source']} {row['reason']}".strip() for row in rows if not row["container"])
    assert reasons == {
        "traversal.tar": 5,
        "traversal.zip": 5,
        "links.tar": 1,
        "links.tar not_regular": 2,
        "devices.tar not_regular": 3,
        "duplicates.tar": 100,
        "sparse.tar not_regular": 1,
    }
    fake_stage.assert_sound(here / "out")
    assert {path: path.stat().st_mtime_ns for path in outside.iterdir()} == before
    assert not [path for path in memory.rglob("*") if "escape" in path.name or path.is_symlink()]
    assert sorted(path.name for path in memory.iterdir()) == ["a", "given", "outside"]
    assert [path.name for path in here.iterdir()] == ["out"]
    assert json.loads((here / "out/manifest.json").read_text())["counts"]["kept"] == 111
