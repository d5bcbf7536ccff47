"""Real pictures: Debian's Tux Paint stamps, through download, filter and shard."""

from __future__ import annotations

from pathlib import Path

import pytest
from stages.conftest import run_stage

from pipeline.partitions.dataset import Dataset
from pipeline.partitions.ledger import read_ledger
from pipeline.storage import Folder

STAMPS = Path("/usr/share/tuxpaint/stamps")
pytestmark = pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Debian's tuxpaint-stamps-default (make slurm)")


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("stamps")
    run_stage("download", source="image_folder", input=str(STAMPS), output=str(data / "download"))
    run_stage("filter", input=str(data / "download"), output=str(data / "filter"), min_image_size=64)
    run_stage("shard", input=str(data / "filter"), output=str(data / "shard"))
    return data


def test_every_file_is_accounted_for(stamps: Path) -> None:
    found = {suffix: len(list(STAMPS.rglob(f"*.{suffix}"))) for suffix in ("png", "svg")}
    success = Dataset.open(stamps / "filter").require_success()
    counts = success["counts"]
    assert counts["in"] == sum(found.values())
    assert counts["in"] == counts["kept"] + counts["dropped"] + counts["failed"]
    assert success["reasons"]["dropped:svg"] == found["svg"]
    assert counts["failed"] == 0
    assert Dataset.open(stamps / "shard").require_success()["counts"]["in"] == counts["kept"]


def test_captions_are_the_english_first_lines(stamps: Path) -> None:
    dataset = Dataset.open(stamps / "shard")
    rows = {stored.key: stored.read() for index in range(dataset.partitions) for stored in dataset.samples(index)}
    checked = 0
    for key, row in rows.items():
        text = (STAMPS / key.removesuffix("-png")).with_suffix(".txt")
        if "=" not in key and text.is_file():
            first = text.read_text(encoding="utf-8").strip().splitlines()[0]
            assert row["caption"] == " ".join(first.split())
            checked += 1
    assert checked > 500
    assert {row["min_side"] >= 64 for row in rows.values()} == {True}
    assert {min(row["width"], row["height"]) <= 512 for row in rows.values()} == {True}


def test_nothing_was_copied_and_every_row_has_its_hash(stamps: Path) -> None:
    dataset = Dataset.open(stamps / "download")
    assert not list(stamps.glob("download/data/*/*/*.png"))
    with Folder.open(stamps / "download") as root:
        for index in range(dataset.partitions):
            with root.folder(dataset.path_of(index)) as folder:
                rows = read_ledger(folder).to_pylist()
            assert all(len(row["source_hash"]) == 32 and (STAMPS / row["source"]).is_file() for row in rows)
