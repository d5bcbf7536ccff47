"""Samples that are taken down leave nothing behind in any data file, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_stage import rows
from PIL import Image
from sources.server import Server
from stages.conftest import Run

from pipeline.config.schema import ConfigError, TakedownConfig
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify
from pipeline.samples import content_hash
from pipeline.stages import takedown as stage_module
from pipeline.stages.repair import repair
from pipeline.stages.takedown import main, takedown
from pipeline.storage import StorageError

STAGES = ("download", "filter", "shard", "precompute")
KEPT = "pic03-png"
SMALL = "pic05-png"  # that filter drops


@pytest.fixture
def line(tmp_path: Path, run: Run) -> Path:
    """Twelve images through all stages, three to a partition, shuffled."""
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
    removed = takedown(line, wanted, Rank(), **options).removed
    return {Path(path).name.partition("-")[0]: count for path, count in removed.items()}


def fates(line: Path, *lines: str, **options: Any) -> dict[str, str]:
    """What became of each line of a list."""
    wanted = line.parent / "wanted.txt"
    wanted.write_text("\n".join(lines))
    return {one.text: one.fate for one in takedown(line, wanted, Rank(), **options).lines}


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


def test_every_line_is_accounted_for(line: Path) -> None:
    source = content_hash((line.parents[2] / "images/pic04.png").read_bytes())
    absolute = str(line.parents[2] / "images/pic06.png")
    lines = (KEPT, "pic07.png", source, absolute, "pic99-png", "nothing.png", "0" * 32)
    rehearsed = fates(line, *lines, count_only=True)
    assert rehearsed == dict.fromkeys(lines[:4], "would be removed") | dict.fromkeys(lines[4:], "not found")
    assert fates(line, *lines) == dict.fromkeys(lines[:4], "removed") | dict.fromkeys(lines[4:], "not found")
    again = dict.fromkeys(lines[:4], "removed before")
    assert fates(line, *lines) == again | dict.fromkeys(lines[4:], "not found")
    assert fates(line, "pic03.png") == {"pic03.png": "removed before"}  # another name of what is gone
    for folder in folders(line).values():
        assert not {KEPT, "pic04-png", "pic06-png", "pic07-png"} & set(samples(folder))


def test_the_program_says_what_became_of_each_line_and_fails_if_one_names_nothing(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = line / "wanted.txt"
    wanted.write_text(f"\ufeff{KEPT}\r\n\npic04.png\n{'a' * 64}\nnothing-png\n{KEPT}\n")
    assert main(TakedownConfig(takedown=str(wanted), data_dir=str(line))) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"removed: line 1: {KEPT}" in said
    assert "removed: line 3: pic04.png (pic04-png)" in said
    assert next(text for text in said if "a" * 64 in text).startswith("not found: line 4:")
    assert "XXH3-128" in next(text for text in said if "a" * 64 in text)
    assert "not found: line 5: nothing-png" in said
    assert said[-1] == "4 lines: 2 removed, 2 not found"
    wanted.write_text(f"{KEPT}\npic05.png\n")
    assert main(TakedownConfig(takedown=str(wanted), data_dir=str(line))) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 lines: 1 removed before, 1 removed"


def test_a_file_name_may_be_the_end_of_a_path_if_there_is_only_one(tmp_path: Path, run: Run) -> None:
    for name in ("a/1.png", "b/1.png", "b/2.png", "b/deep/3.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (len(name), ord(name[-5]), ord(name[0]))).save(tmp_path / "images" / name)
    data = tmp_path / "data/mine/train"
    run("download", source="image_folder", input=str(tmp_path / "images"), copy=True, output=str(data / "download"))
    assert fates(data, "1.png", "2.png", "deep/3.png", "eep/3.png", count_only=True) == {
        "1.png": "ambiguous",
        "2.png": "would be removed",
        "deep/3.png": "would be removed",
        "eep/3.png": "not found",
    }
    assert fates(data, "1.png", "a/1.png") == {"1.png": "ambiguous", "a/1.png": "removed"}
    assert set(samples(data / "download")) == {"b/1-png", "b/2-png", "b/deep/3-png"}


def test_an_image_is_found_by_the_url_that_it_came_from(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "data/mine/train/download"
    with Server() as server:
        urls = []
        for number in range(3):
            file = BytesIO()
            Image.new("RGB", (9, 9), (number, 0, 0)).save(file, "PNG")
            urls.append(server.put(f"/{number}.png", file.getvalue()) + f"?token=s{number}")
        (tmp_path / "list.txt").write_text("\n".join(urls))
        listed = str(tmp_path / "list.txt")
        run("download", source="url_list", input=listed, allow_private_hosts=True, output=str(output))
    other = urls[1].replace("/1.png", "/7.png")
    assert fates(output, urls[1], other) == {urls[1]: "removed", other: "not found"}
    assert fates(output, urls[1]) == {urls[1]: "removed before"}
    assert len(samples(output)) == 2


def test_names_lead_to_samples_of_a_later_stage_alone(line: Path) -> None:
    """Only the first stage knows files and their hashes; the others may lie elsewhere."""
    shards = line / "shard-mds"
    assert fates(shards, "pic03.png", count_only=True) == {"pic03.png": "would be removed"}


def test_a_takedown_by_names_that_was_interrupted_goes_on(line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stages know only the key by then."""
    source = content_hash((line.parents[2] / "images/pic04.png").read_bytes())
    commit, done = stage_module.commit_takedown, []

    def commit_two(*args: Any) -> bool:
        if len(done) == 2:
            raise OSError(5, "Input/output error")
        done.append(args)
        return commit(*args)

    monkeypatch.setattr(stage_module, "commit_takedown", commit_two)
    with pytest.raises(StorageError, match="run it again with the same list"):
        fates(line, "pic03.png", source)
    monkeypatch.undo()
    assert {KEPT, "pic04-png"} <= set(samples(line / "shard-mds"))
    assert fates(line, "pic03.png", source) == {"pic03.png": "removed", source: "removed"}
    for folder in folders(line).values():
        assert not {KEPT, "pic04-png"} & set(samples(folder))


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
    with pytest.raises(ConfigError, match="the file is empty"):
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
    with pytest.raises(ConfigError, match="run stage=takedown again with the same takedown= on the whole dataset"):
        run("filter", min_image_size=32, data_dir=str(line.parents[1]), dataset="image_folder")
    assert remove(line, KEPT) == {**dict.fromkeys(STAGES, 1), "download": 0}
