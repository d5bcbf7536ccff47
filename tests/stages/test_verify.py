"""What hashes cannot tell is found by looking inside, and mended; a sample's way is told and drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stages.conftest import Run, run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, VerifyConfig
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context
from pipeline.samples import content_hash
from pipeline.stages import verify
from pipeline.stages.filter import Filter
from pipeline.stages.repair import repair


@pytest.fixture
def line(tmp_path: Path, run: Run) -> Path:
    """Thirty scenes through all stages, in ten partitions; one image is too small for the filter."""
    (tmp_path / "images").mkdir()
    for number in range(30):
        edge = 20 if number == 7 else 40
        pixels = np.random.default_rng(number).integers(0, 255, (edge, edge + 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02d}.png")
        (tmp_path / f"images/{number:02d}.txt").write_text(f"picture {number}")
    settings: dict[str, Any] = {"data_dir": str(tmp_path / "data"), "dataset": "image_folder"}
    run("download", source="image_folder", input=str(tmp_path / "images"), partition_size=3, **settings)
    run("filter", min_image_size=32, **settings)
    run("shard", partition_size=10, **settings)
    run("precompute", image_resolutions=[32], **settings)
    return tmp_path / "data/image_folder/train"


def found(folder: Path, workers: int = 1) -> list[tuple[int, str, bool]]:
    _, findings = verify.findings_of(folder, deep=True, workers=workers)
    return [(finding.partition, finding.key, finding.inside) for finding in findings]


def test_what_is_sound_has_no_findings_with_any_number_of_workers(line: Path) -> None:
    for folder in sorted(line.iterdir()):
        assert found(folder) == found(folder, workers=2) == []


def make_filter_with(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """The stage has a defect: it changes what it keeps, and the hashes are those of the changed bytes."""
    process = Filter.process

    def wrong(self: Filter, partition: Partition, context: Context) -> Any:
        for outcome in process(self, partition, context):
            if outcome.row is not None:
                change(outcome)
            yield outcome

    monkeypatch.setattr(Filter, "process", wrong)


def broken(outcome: Any) -> None:
    if outcome.key == "11-png":
        outcome.row["jpg"] = outcome.row["jpg"][:-500]


def resized(outcome: Any) -> None:
    if outcome.key == "11-png":
        outcome.row["width"] += 1


@pytest.mark.parametrize(("change", "says"), [(broken, "does not decode"), (resized, "has 44x40 pixels")])
def test_a_defect_of_a_stage_is_found_by_its_sample_and_mended(
    line: Path, run: Run, monkeypatch: pytest.MonkeyPatch, change: Any, says: str
) -> None:
    folder = line.parent / "wrong"
    with monkeypatch.context() as patch:
        make_filter_with(patch, change)
        run("filter", min_image_size=32, input=str(line / "download"), output=str(folder))
    assert list(verify.findings_of(folder)[1]) == []  # its hashes are right
    (finding,) = verify.findings_of(folder, deep=True)[1]
    assert (finding.partition, finding.key) == (3, "11-png") and says in finding.what
    after = repair(folder, Rank(), deep=True)
    assert after is not None
    assert after["content_digest"] == Dataset.open(line / "filter").require_success()["content_digest"]
    assert found(folder) == []


def test_samples_of_another_partition_are_found(line: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples as there should be, but not those."""
    folder = line.parent / "wrong"
    process = Filter.process
    with monkeypatch.context() as patch:

        def swapped(self: Filter, partition: Partition, context: Context) -> Any:
            index = {4: 5, 5: 4}.get(partition.index, partition.index)
            return process(self, self._there.partition(index), context)

        patch.setattr(Filter, "process", swapped)
        patch.setattr(Filter, "_there", Dataset.open(line / "filter"), raising=False)
        run("filter", min_image_size=32, input=str(line / "download"), output=str(folder))
    assert {(index, key) for index, key, _ in found(folder, workers=2)} == {
        (index, f"{number}-png") for index in (4, 5) for number in range(12, 18)
    }


def test_everything_below_a_folder_is_checked(line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = build(VerifyConfig, {"data_dir": str(tmp_path / "data"), "workers": 1})
    assert verify.main(config) == 0
    said = capsys.readouterr().out.splitlines()
    assert [Path(text.partition(":")[0]).name for text in said] == [
        "download",
        "filter",
        "shard-mds",
        "precompute-embedded",
    ]
    ledger = line / "filter/data/000/00002/ledger.parquet"
    ledger.write_bytes(ledger.read_bytes()[:-1])
    assert verify.main(config) == 1
    assert "partition 2: ledger.parquet: has" in capsys.readouterr().out


# ---- a sample's way


def tell(line: Path, key: str, **more: str) -> subprocess.CompletedProcess[str]:
    words = [f"{name}={value}" for name, value in {"data_dir": line, "trace": key, **more}.items()]
    command = [sys.executable, "-m", "pipeline.stages.verify", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_way_of_a_sample_leads_from_its_file_to_its_latents(line: Path, tmp_path: Path) -> None:
    done = tell(line, "11-png", json="true", show=str(tmp_path / "11.png"))
    assert done.returncode == 0, done.stderr
    text, _, told = done.stdout.rpartition("image: ")
    assert told.strip() == str(tmp_path / "11.png")
    way = json.loads(text)
    assert [stop["stage"] for stop in way] == ["download", "filter", "shard", "precompute"]
    assert [stop["outcome"] for stop in way] == ["kept"] * 4
    source = tmp_path / "images/11.png"
    assert way[0]["source"] == "11.png" and way[0]["source_hash"] == content_hash(source.read_bytes())
    assert (way[1]["source"], way[1]["source_offset"]) == ("data/000/00003", 2)
    with open(Path(way[1]["folder"], way[1]["file"]), "rb") as file:
        file.seek(way[1]["offset"])
        assert source.read_bytes() in file.read(way[1]["length"])
    assert Image.open(tmp_path / "11.png").width > 4 * 256  # source, filtered, sharded, decoded


def test_the_way_of_a_dropped_sample_ends_where_it_was_dropped(line: Path) -> None:
    done = tell(line, "07-png")
    assert "filter: dropped too_small" in done.stdout and "shard" not in done.stdout
    assert tell(line, "07.png").stdout == done.stdout, "the path of the file will do"
    assert max(map(len, done.stdout.splitlines())) <= 80 or str(line) in done.stdout
    words = " ".join(done.stdout.split())
    assert re.search(r"made_with .*min_image_size=\d+.* \d+ settings at their defaults partition", words)
    done = tell(line, "nobody")
    assert done.returncode == 1 and "no dataset directory in this folder contains nobody" in done.stdout


def test_what_is_asked_for_must_be_clear(tmp_path: Path) -> None:
    for settings in ({}, {"input": "a", "data_dir": "b"}):
        with pytest.raises(ConfigError, match="give input="):
            verify.places_of(build(VerifyConfig, settings))
    with pytest.raises(ConfigError, match="show= needs trace="):
        verify.places_of(build(VerifyConfig, {"input": "a", "show": "x.png"}))
    with pytest.raises(ConfigError, match="no dataset directory below"):
        verify.places_of(build(VerifyConfig, {"data_dir": str(tmp_path)}))


def broken(tmp_path: Path) -> Path:
    """A download of a good image and of one that no decoder takes, and its filter."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images/good.png")
    (tmp_path / "images/bad.jpg").write_bytes(b"\xff\xd8\xff" + b"no image" * 9)
    data = tmp_path / "data/mine/train"
    run_stage("download", source="image_folder", input=str(tmp_path / "images"), output=str(data / "download"))
    places = {"input": str(data / "download"), "output": str(data / "filter")}
    run_stage("filter", **places, min_image_size=8, max_failed_fraction=1.0, workers="0")
    return tmp_path / "data"


def test_a_broken_image_that_came_so_is_no_finding(tmp_path: Path) -> None:
    """The ledger of stage=filter counts it as failed: nothing could ever fix it."""
    data = broken(tmp_path)
    assert verify.main(VerifyConfig(data_dir=str(data), deep=True, workers=1)) == 0
    (tmp_path / "images/bad.jpg").write_bytes(b"\xff\xd8\xff" + b"another!" * 9)  # what has changed since is one
    assert verify.main(VerifyConfig(data_dir=str(data), deep=True, workers=1)) == 1


def test_the_trace_of_an_image_that_cannot_be_decoded_shows_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = broken(tmp_path)
    drawn = tmp_path / "bad.png"
    assert verify.main(VerifyConfig(data_dir=str(data), trace="bad-jpg", show=str(drawn))) == 0
    said = capsys.readouterr().out
    assert "filter: failed" in said and f"image: {drawn}" in said
    with Image.open(drawn) as image:
        assert image.width > 2 * 256  # a panel for each of the two stages
