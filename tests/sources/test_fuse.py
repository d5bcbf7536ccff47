"""fuse=true: what filter makes of the bytes as they arrive is what it makes of them after a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_stage
import pytest
from sources.packing import tar_of
from sources.server import Server, body, in_turn, status
from sources.test_datasets import photo, rows_of, run

from launch import request, submit
from pipeline.config import cli

KIND = {"width", "height", "min_side", "jpg", "format", "captions", "key"}


def arguments_of(memory: Path, *own: str) -> list[str]:
    common = ["allow_private_hosts=true", "retries=0", "max_failed_fraction=0.9", "workers=0", "min_image_size=100"]
    return [*common, *own]


def picked(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name in KIND} for row in rows_of(folder)]


@pytest.fixture
def listed(server: Server, memory: Path) -> Path:
    """Four good images, one too small, one that heals, one that is none."""
    urls = [server.put(f"/{n}.jpg", photo(n)) for n in range(4)]
    urls += [server.put("/page.jpg", b"<html></html>"), server.put("/late.jpg", in_turn(status(503), body(photo(5))))]
    path = memory / "list.txt"
    path.write_text("\n".join(urls))
    return path


def test_fused_is_the_same_as_one_after_the_other(server: Server, memory: Path, listed: Path) -> None:
    given = arguments_of(memory, "source=url_list", f"input={listed}", "partition_size=4")
    run("download", *given, f"output={memory / 'download'}")
    rest = [argument for argument in given if not argument.startswith("input=")]
    run("filter", *rest, f"input={memory / 'download'}", f"output={memory / 'two'}")
    server.put("/late.jpg", in_turn(status(503), body(photo(5))))
    success = run("filter", *given, "fuse=true", f"output={memory / 'one'}")
    assert picked(memory / "one") == picked(memory / "two")
    assert success["reasons"] == {"failed:html": 1, "failed:http_503": 1}
    assert (success["counts"]["in"], success["counts"]["kept"]) == (6, 4)
    again = run("filter", *given, "fuse=true", f"output={memory / 'one'}", "retry_failed=true")
    assert (again["counts"]["in"], again["counts"]["kept"]) == (6, 5)
    fake_stage.assert_sound(memory / "one")
    row = next(iter(fake_stage.rows(memory / "one")))
    assert (row["source"], row["source_offset"], row["member"]) == ("list.txt", 0, server.url("/0.jpg"))
    assert run("shard", f"input={memory / 'one'}", f"output={memory / 'mds'}")["counts"]["kept"] == 5


def test_archives_are_read_as_they_are(server: Server, memory: Path) -> None:
    good = server.put("/good.tar", tar_of({f"{n}.jpg": photo(n) for n in range(3)} | {"bad.jpg": b"no image"}))
    cut = server.put("/cut.tar", tar_of({"x.jpg": photo(1)})[:5000])
    given = arguments_of(memory, "source=http_archive", f"urls=[{good},{cut}]", "fuse=true", f"output={memory / 'one'}")
    success = run("filter", *given)
    counts = success["counts"]
    assert (counts["kept"], counts["failed"], counts["containers"], counts["containers_failed"]) == (3, 1, 2, 1)
    server.put("/cut.tar", tar_of({"x.jpg": photo(1)}))
    assert run("filter", *given, "retry_failed=true")["counts"]["kept"] == 4
    fake_stage.assert_sound(memory / "one")


def test_a_folder_is_copied_when_it_is_fused(memory: Path) -> None:
    folder = memory / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(photo(0))
    given = arguments_of(memory, "source=image_folder", f"input={folder}", "fuse=true", f"output={memory / 'one'}")
    run("filter", *given)
    assert [row["jpg"] for row in rows_of(memory / "one")] == [photo(0)]


def test_the_launcher_leaves_the_download_out(memory: Path) -> None:
    command = ["stage=download,filter,shard", "dataset=cc12m", f"data_dir={memory}", "fuse=true"]
    launch = request.read(command)
    jobs = submit.jobs_of(launch.config, launch.settings)
    assert [job.stage for job in jobs] == ["filter", "shard"]
    assert jobs[1].config.input == str(memory / "cc12m/train/filter")


def test_sources_do_not_count_for_a_filter_that_reads_a_download() -> None:
    from pipeline.config.schema import identity

    shared = ["dataset=cc12m", "data_dir=x"]
    assert "repo" not in identity(cli.load("filter", shared))
    assert identity(cli.load("filter", [*shared, "fuse=true"]))["repo"] == "pixparse/cc12m-wds"
