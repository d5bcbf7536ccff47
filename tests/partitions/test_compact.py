"""Packed outputs: few files, the same content, and everything that works on others works on them."""

from __future__ import annotations

import os
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stage import FakeFilter, assert_sound, committed, kept_keys, leftovers, outcomes, rank_of, run

from pipeline import storage
from pipeline.config.schema import ConfigError
from pipeline.distributed import Rank
from pipeline.partitions import compact as module
from pipeline.partitions.compact import compact, uncompacted
from pipeline.partitions.dataset import Dataset, RandomAccess, SlotReader, Unfinished
from pipeline.partitions.gc import collect
from pipeline.partitions.packs import Pack, PackName, list_packs
from pipeline.partitions.verify import verify
from pipeline.stages.release import release
from pipeline.stages.repair import repair
from pipeline.stages.takedown import takedown
from pipeline.stages.trace import stations
from pipeline.storage import StorageError


@pytest.fixture
def output(memory: Path) -> Path:
    return memory / "output"


def pack(output: Path) -> int:
    dataset = Dataset.open(output)
    return compact(dataset, module.buckets_of(dataset))


def files(output: Path) -> list[str]:
    return sorted(str(path.relative_to(output)) for path in output.glob("data/*/*/*"))


def test_ledgers_and_records_go_into_one_file_and_nothing_else_changes(output: Path) -> None:
    before = run(output)
    content, keys, told = committed(output), kept_keys(output), outcomes(output)
    opened = RandomAccess(Dataset.open(output))  # by a reader that knows of no pack
    assert pack(output) == 9
    # the last partition kept nothing: a late attempt could be renamed onto an empty folder
    assert files(output) == [*(f"data/000/{n:05d}/shard.00000.mds" for n in range(4)), "data/000/00004/record.json"]
    assert [path.name for path in (output / "packed").iterdir()] == ["000.0.zip"]
    assert assert_sound(output) == before
    assert (committed(output), kept_keys(output), outcomes(output)) == (content, keys, told)
    assert [opened.row(position)["key"] for position in range(len(opened))] == keys
    assert leftovers(output) == []
    assert pack(output) == 0


def test_any_zip_program_reads_a_pack(output: Path) -> None:
    run(output)
    ledger = (output / "data/000/00003/ledger.parquet").read_bytes()
    pack(output)
    with zipfile.ZipFile(output / "packed/000.0.zip") as archive:
        assert archive.testzip() is None
        assert archive.read("00003/ledger.parquet") == ledger


@pytest.mark.parametrize("count", [20, 7])
def test_a_stage_packs_at_its_end_when_it_is_asked_to(output: Path, memory: Path, count: int) -> None:
    reference = run(memory / "reference", count=count)
    assert run(output, count=count, compact=True)["content_digest"] == reference["content_digest"]
    assert uncompacted(Dataset.open(output)) == []
    assert not any(name.endswith(".parquet") for name in files(output))


def test_a_finished_stage_is_packed_by_the_same_command_with_compact(output: Path) -> None:
    run(output)
    run(output, compact=True, rank=rank_of(1, 2))  # only rank 0 of several does
    assert uncompacted(Dataset.open(output)) == [0]
    run(output, compact=True)
    assert uncompacted(Dataset.open(output)) == []
    packed = (output / "packed/000.0.zip").stat()
    run(output)
    run(output, compact=True)
    assert (output / "packed/000.0.zip").stat() == packed


def test_ranks_share_the_buckets(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pipeline.partitions.compact.BUCKET", "pipeline.partitions.plan.BUCKET",
                 "pipeline.partitions.dataset.BUCKET", "pipeline.partitions.engine.BUCKET"):  # fmt: skip
        monkeypatch.setattr(name, 2)
    ranks = [threading.Thread(target=run, args=(output,), kwargs={"rank": rank_of(n, 2), "compact": True, "lease": 1.0})
             for n in range(2)]  # fmt: skip
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [str(name) for name in list_packs(Dataset.open(output).root)] == ["000.0.zip", "001.0.zip", "002.0.zip"]
    assert_sound(output)


def test_an_unfinished_output_is_not_packed(output: Path) -> None:
    run(output)
    (output / "_SUCCESS").unlink()
    with pytest.raises(Unfinished):
        pack(output)
    assert not (output / "packed").exists()


@pytest.mark.parametrize("name", ["ledger.parquet", "record.json"])
def test_what_is_damaged_is_not_packed_but_said(output: Path, name: str) -> None:
    run(output)
    path = output / "data/000/00002" / name
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(StorageError, match="00002.* damaged"):
        pack(output)
    assert len(files(output)) == 14
    assert list_packs(Dataset.open(output).root) == []
    assert repair(output, Rank()) is not None
    pack(output)
    assert_sound(output)


# ---- everything goes on


def test_a_stage_reads_a_packed_upstream(memory: Path, output: Path) -> None:
    run(memory / "upstream")
    reference = run(memory / "reference", FakeFilter, input=str(memory / "upstream"))
    pack(memory / "upstream")
    assert run(output, FakeFilter, input=str(memory / "upstream"))["content_digest"] == reference["content_digest"]


def test_failures_are_tried_again_and_further_generations_packed(output: Path, memory: Path) -> None:
    for place in (output, memory / "reference"):
        run(place)
    pack(output)
    expected = run(memory / "reference", retry_failed=True, run_id="1")
    assert run(output, retry_failed=True, run_id="1")["content_digest"] == expected["content_digest"]
    assert_sound(output)
    assert uncompacted(Dataset.open(output)) == [0]
    pack(output)
    assert [path.name for path in (output / "packed").iterdir()] == ["000.1.zip"]
    assert_sound(output)


def test_a_takedown_leaves_nothing_in_packs(memory: Path) -> None:
    run(memory / "upstream")
    run(memory / "output", FakeFilter, input=str(memory / "upstream"))
    for name in ("upstream", "output"):
        pack(memory / name)
    taken = memory / "taken.txt"
    taken.write_text("sample00001\nsample00012\n")
    removed = takedown(memory, taken, Rank()).removed
    assert sum(removed.values()) == 4
    for name in ("upstream", "output"):
        assert_sound(memory / name)
        dataset = Dataset.open(memory / name)
        for found in list_packs(dataset.root):
            slots = {member.partition("/")[0] for member in Pack(dataset.root, found).members}
            assert slots == {dataset.slot(index) for index in range(dataset.partitions)}
        assert leftovers(memory / name) == []


def test_a_sample_is_traced_through_packed_outputs(memory: Path) -> None:
    run(memory / "upstream")
    run(memory / "output", FakeFilter, input=str(memory / "upstream"))

    def way() -> list[dict[str, Any]]:
        places = [Dataset.open(memory / name) for name in ("upstream", "output")]
        return [station.facts() for station in stations(places, "sample00012")]

    before = way()
    for name in ("upstream", "output"):
        pack(memory / name)
    assert way() == before and len(before) == 2


def test_released_partitions_keep_their_record_so_that_no_late_attempt_takes_their_place(output: Path) -> None:
    run(output)
    release(output, Rank())
    pack(output)
    assert files(output) == [f"data/000/{n:05d}.1/record.json" for n in range(5)]
    assert list(verify(Dataset.open(output))) == []
    run(output, restore=True)
    assert_sound(output)


def test_a_packed_output_is_released(output: Path) -> None:
    run(output)
    pack(output)
    release(output, Rank())
    assert list(verify(Dataset.open(output))) == [] and leftovers(output) == []


# ---- damage


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("member", ["00002/ledger.parquet", "00002/record.json"])
def test_a_flipped_byte_in_a_pack_is_found_and_only_its_partition_done_again(output: Path, member: str) -> None:
    before = run(output)
    pack(output)
    path = output / "packed/000.0.zip"
    with zipfile.ZipFile(path) as archive:
        damage(path, archive.getinfo(member).header_offset + 30 + len(member) + 20)
    assert [finding.partition for finding in verify(Dataset.open(output))] == [2]
    after = repair(output, Rank())
    assert after is not None and after["content_digest"] == before["content_digest"]
    assert list(verify(Dataset.open(output))) == []
    list(collect(Dataset.open(output), 0.0))
    assert [path.name for path in (output / "packed").iterdir()] == ["000.1.zip"]
    assert_sound(output)


@pytest.mark.parametrize("how", ["cut", "gone", "directory"])
def test_a_lost_pack_is_found_and_its_partitions_done_again(output: Path, how: str) -> None:
    before = run(output)
    pack(output)
    path = output / "packed/000.0.zip"
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40] if how == "cut" else path.read_bytes()[:-30] + b"x" * 30)
    assert {finding.partition for finding in verify(Dataset.open(output))} >= set(range(5))
    after = repair(output, Rank())
    assert after is not None and after["content_digest"] == before["content_digest"]
    list(collect(Dataset.open(output), 0.0))
    pack(output)
    assert_sound(output)
    assert leftovers(output) == []


# ---- others at work


def test_one_that_slept_through_a_later_generation_leaves_no_old_pack(output: Path) -> None:
    run(output)
    known = Dataset.open(output)
    known.require_success()
    (output / "data/000/00001/shard.00000.mds").write_bytes(b"x")
    repair(output, Rank())
    pack(output)
    assert compact(known, [0]) == 0
    assert [path.name for path in (output / "packed").iterdir()] == ["000.1.zip"]
    assert_sound(output)


def test_gc_packs_again_what_it_frees_of_replaced_partitions(output: Path) -> None:
    run(output)
    pack(output)
    (output / "data/000/00001/shard.00000.mds").write_bytes(b"x")
    repair(output, Rank())
    assert list(collect(Dataset.open(output), 1000.0)) == []
    assert {path.name for path in collect(Dataset.open(output), 0.0)} == {"00001", "000.0.zip"}
    assert [path.name for path in (output / "packed").iterdir()] == ["000.1.zip"]
    assert_sound(output)


def test_reading_a_packed_output_opens_its_packs_once(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(output)
    pack(output)
    seen: Counter[str] = Counter()

    def interpose(operation: str, path: str, do: Callable[[], Any]) -> Any:
        seen[f"{operation} {'packed' if 'packed' in path else 'slot' if '/data/' in path else 'root'}"] += 1
        return do()

    monkeypatch.setattr(storage, "interpose", interpose)
    dataset = Dataset.open(output)
    for index in range(dataset.partitions):
        SlotReader(dataset, index).ledger()
    assert seen["read packed"] == seen["listdir packed"] == 1 and seen["read slot"] == 0


def test_a_pack_survives_a_fork_and_threads(output: Path) -> None:
    run(output)
    pack(output)
    opened = Pack(Dataset.open(output).root, PackName(0, 0))
    expected = {member: opened.read(member) for member in opened.members}
    child = os.fork()
    if child == 0:
        os._exit(int(any(opened.read(member) != data for member, data in expected.items())))
    assert all(opened.read(member) == data for member, data in expected.items())
    assert os.waitpid(child, 0)[1] == 0


def test_the_program_packs_everything_below_a_folder(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.config.schema import CompactConfig
    from pipeline.stages.compact import main

    run(memory / "d/one")
    run(memory / "d/two")
    (memory / "d/two/_SUCCESS").unlink()
    main(CompactConfig(input=str(memory / "d")))
    said = capsys.readouterr().out
    assert "one: 9 files fewer" in said and "two: not finished, left as it is" in said
    with pytest.raises((ConfigError, SystemExit)):
        main(CompactConfig(input=str(memory / "nothing")))
