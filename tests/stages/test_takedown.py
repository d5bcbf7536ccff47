"""Samples that are taken down leave nothing behind in any data file, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_stage import rows
from PIL import Image
from stages.conftest import Run

from pipeline.config import ConfigError
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify
from pipeline.samples import content_hash
from pipeline.stages.repair import repair
from pipeline.stages.takedown import takedown
from pipeline.storage import StorageError

STAGES = ("download", "filter", "shard", "precompute")
KEPT = "pic03-png"
SMALL = "pic05-png"  # that filter drops


@pytest.fixture
def line(tmp_path: Path, run: Run) -> Path:
    """Twelve pictures through all stages, three to a partition, shuffled."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        edge = 24 if number == 5 else 40
        pixels = np.random.default_rng(number).integers(0, 255, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/pic{number:02d}.png")
        (tmp_path / f"images/pic{number:02d}.txt").write_text(f"caption {number}")
    settings: dict[str, Any] = {"data_dir": str(tmp_path / "data"), "dataset": "image_folder"}
    images = str(tmp_path / "images")
    run("download", source="image_folder", input=images, copy=True, partition_size=3, **settings)
    run("filter", min_image_size=32, **settings)
    run("shard", shuffle=True, partition_size=3, **settings)
    run("precompute", image_resolutions=[32], **settings)
    return tmp_path / "data/image_folder/train"


def folders(line: Path) -> dict[str, Path]:
    return {stage: next(line.glob(f"{stage}*")) for stage in STAGES}


def remove(line: Path, *lines: str, **options: Any) -> dict[str, int]:
    wanted = line.parent / "wanted.txt"
    wanted.write_text("\n".join(lines))
    removed = takedown(line, wanted, Rank(), **options)
    return {Path(path).name.partition("-")[0]: count for path, count in removed.items()}


def samples(folder: Path) -> dict[str, dict[str, Any]]:
    """Kept samples by key, as they are stored."""
    dataset = Dataset.open(folder)
    return {s.key: s.read() for i in range(dataset.partitions) for s in dataset.samples(i) if s.file}


def data_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("ledger.parquet", "record.json"):
            yield path


def outcomes(folder: Path, key: str) -> list[tuple[str, str]]:
    return [(row["outcome"], row["reason"]) for row in rows(folder) if row["key"] == key and not row["container"]]


def test_nothing_is_left_of_a_sample_and_all_else_is_as_before(line: Path) -> None:
    before = {stage: samples(folder) for stage, folder in folders(line).items()}
    traces = [before["download"][KEPT]["jpg"], before["precompute"][KEPT]["latents_32"], b"caption 3"]
    assert all(any(t in p.read_bytes() for p in data_files(line / "download")) for t in (traces[0], traces[2]))

    assert remove(line, KEPT) == dict.fromkeys(STAGES, 1)

    for stage, folder in folders(line).items():
        after = samples(folder)
        assert set(before[stage]) - set(after) == {KEPT}
        assert all(after[key] == before[stage][key] for key in after)
        assert list(verify(Dataset.open(folder))) == []
        counts = Dataset.open(folder).require_success()["counts"]
        assert counts["taken"] == 1 and counts["in"] == counts["kept"] + counts["dropped"] + counts["failed"]
        assert outcomes(folder, KEPT) == [("dropped", "takedown")]
        for path in data_files(folder):
            if "plan" not in path.parent.name and path.suffix != ".json" and path.name != "_SUCCESS":
                content = path.read_bytes()
                assert KEPT.encode() not in content and not any(trace in content for trace in traces), path


def test_it_is_found_by_the_hash_of_its_source(line: Path) -> None:
    source = (line.parents[2] / "images/pic03.png").read_bytes()
    assert remove(line, content_hash(source).upper()) == dict.fromkeys(STAGES, 1)
    assert remove(line, content_hash(source), KEPT) == dict.fromkeys(STAGES, 0)


def test_stages_find_their_work_done_and_a_new_one_reads_what_is_left(line: Path, run: Run) -> None:
    remove(line, KEPT, SMALL)
    settings: dict[str, Any] = {"data_dir": str(line.parents[1]), "dataset": "image_folder"}
    again = run("filter", min_image_size=32, **settings)
    assert again == Dataset.open(line / "filter").success
    run("shard", shuffle=True, partition_size=3, **settings)
    new = run("shard", partition_size=4, variant="new", **settings)
    assert new["counts"]["in"] == 11 and new["counts"]["kept"] == 10
    assert outcomes(line / "shard-new", KEPT) == [("dropped", "takedown_unkept")]
    assert list(verify(Dataset.open(line / "shard-new"))) == []


def test_partitions_without_a_sample_can_be_repaired(line: Path) -> None:
    """Also the places of those behind it mean what they meant, and what was dropped anyway stays so."""
    remove(line, KEPT, SMALL)
    for folder in folders(line).values():
        dataset = Dataset.open(folder)
        digest = dataset.require_success()["content_digest"]
        for index in range(dataset.partitions):
            (folder / dataset.path_of(index) / "ledger.parquet").write_bytes(b"x")
        after = repair(folder, Rank())
        assert after is not None and after["content_digest"] == digest
        assert KEPT not in samples(folder)
    assert outcomes(line / "filter", SMALL) == [("dropped", "takedown_unkept")]


def test_one_takedown_follows_another(line: Path) -> None:
    assert remove(line, KEPT) == dict.fromkeys(STAGES, 1)
    assert remove(line, KEPT, "pic04-png", "pic03-jpg") == dict.fromkeys(STAGES, 1)
    for folder in folders(line).values():
        assert not {KEPT, "pic04-png"} & set(samples(folder))
        assert list(verify(Dataset.open(folder))) == []


def test_references_to_files_are_removed_and_the_files_are_not(tmp_path: Path, line: Path, run: Run) -> None:
    run("download", source="image_folder", input=str(tmp_path / "images"), output=str(tmp_path / "references"))
    (tmp_path / "images/pic07.png").unlink()  # of no concern
    wanted = tmp_path / "wanted.txt"
    wanted.write_text(KEPT)
    takedown(tmp_path / "references", wanted, Rank())
    assert b"pic03" not in next((tmp_path / "references").rglob("samples.jsonl")).read_bytes()
    assert (tmp_path / "images/pic03.png").exists()


def test_a_rehearsal_changes_nothing(line: Path) -> None:
    before = {path: path.read_bytes() for path in line.rglob("*") if path.is_file()}
    assert remove(line, KEPT, count_only=True) == dict.fromkeys(STAGES, 1)
    assert {path: path.read_bytes() for path in line.rglob("*") if path.is_file()} == before


def test_what_is_wrong_is_said_before_anything_is_touched(line: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing in it"):
        remove(line)
    with pytest.raises(ConfigError, match="no dataset directory below"):
        remove(line / "download/data", KEPT)
    (line / "shard-mds/_SUCCESS").unlink()
    with pytest.raises(StorageError, match="shard-mds is not finished: run stage=shard"):
        remove(line, KEPT)
    assert KEPT in samples(line / "download")


def test_a_stage_whose_upstream_alone_was_taken_down_says_what_to_do(line: Path, run: Run) -> None:
    wanted = line / "wanted.txt"
    wanted.write_text(KEPT)
    takedown(line / "download", wanted, Rank())
    with pytest.raises(ConfigError, match="run stage=takedown again with the same takedown= on the whole data set"):
        run("filter", min_image_size=32, data_dir=str(line.parents[1]), dataset="image_folder")
    assert remove(line, KEPT) == {**dict.fromkeys(STAGES, 1), "download": 0}
