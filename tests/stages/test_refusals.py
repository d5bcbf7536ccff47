"""What cannot work says so in one line, and nothing that was done is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stages.conftest import digests, run_stage

from pipeline.distributed import EXIT_STORAGE
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
SHAPES = {"source": "shapes", "count": 60, "image_size": 64, "partition_size": 10}


def stage(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"pipeline.stages.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What was said last, in a run that must not have ended in a traceback."""
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_missing_or_unfinished_upstream(tmp_path: Path) -> None:
    done = stage("filter", f"input={tmp_path / 'nothing'}", f"output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "stage filter cannot start" in said(done)
    assert "does not exist" in said(done)
    run_stage("download", output=str(tmp_path / "download"), **SHAPES)
    (tmp_path / "download/_SUCCESS").unlink()
    done = stage("filter", f"input={tmp_path / 'download'}", f"output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "run stage=download again" in said(done)


def test_a_changed_setting_is_named(tmp_path: Path) -> None:
    output = tmp_path / "download"
    run_stage("download", output=str(output), **SHAPES)
    before = digests(output)
    done = stage("download", f"output={output}", "source=shapes", "count=61", "image_size=64", "partition_size=10")
    assert done.returncode == 2
    assert "count=60, now count=61" in said(done)
    assert digests(output) == before


def test_what_is_no_dataset_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = stage("download", f"output={tmp_path}", "source=shapes", "count=5", "overwrite=true")
    assert done.returncode == 2
    assert "not empty" in said(done)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    settings = {**SHAPES, "count": 400, "image_size": 256}
    arguments = [f"{key}={value}" for key, value in settings.items()]
    done = stage("download", f"output={small_disk / 'download'}", *arguments)
    assert done.returncode == EXIT_STORAGE
    assert "No space left on device" in said(done)
    assert "run the same command again" in said(done)
    dataset = Dataset.open(small_disk / "download")
    assert dataset.success is None
    assert all("not committed" in f.what or f.partition == -1 for f in verify(dataset))  # what is there is whole
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = stage("download", f"output={small_disk / 'download'}", *arguments)
    assert done.returncode == 0
    run_stage("download", output=str(tmp_path / "download"), **settings)
    assert digests(small_disk / "download") == digests(tmp_path / "download")


def test_a_read_only_output(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = stage("download", f"output={small_disk / 'download'}", "source=shapes", "count=5")
    assert done.returncode == EXIT_STORAGE
    assert "cannot be made: Read-only file system" in said(done)
