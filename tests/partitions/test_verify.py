"""verify finds whatever is not as the records promise, and says where."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from fake_stage import Fake, run

from pipeline import storage
from pipeline.config.schema import VerifyConfig
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import Finding, verify
from pipeline.stages import verify as program
from pipeline.stages.verify import findings_of


@pytest.fixture
def output(memory: Path) -> Path:
    run(memory / "output")
    return memory / "output"


def found(output: Path) -> list[Finding]:
    return list(findings_of(output)[1])


def files(output: Path) -> list[Path]:
    ours = ("claims", "events")
    return sorted(p for p in output.rglob("*") if p.is_file() and p.relative_to(output).parts[0] not in ours)


def test_a_sound_output_has_no_findings(output: Path) -> None:
    assert found(output) == []


def test_a_flipped_byte_is_found_in_every_file(output: Path) -> None:
    chosen = random.Random(7)
    for path in files(output):
        data = path.read_bytes()
        for at in {0, len(data) - 1, *(chosen.randrange(len(data)) for _ in range(6))}:
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << chosen.randrange(8))]) + data[at + 1 :])
            assert found(output), f"{path.relative_to(output)}, byte {at}"
        path.write_bytes(data)
    assert found(output) == []


def test_a_file_that_is_gone_or_cut_or_longer_is_found(output: Path) -> None:
    for path in files(output):
        data = path.read_bytes()
        path.unlink()
        assert found(output), f"{path.relative_to(output)} removed"
        for changed in (data[:-1], data + b"\0", b""):
            path.write_bytes(changed)
            assert found(output), f"{path.relative_to(output)} with {len(changed)} of {len(data)} bytes"
        path.write_bytes(data)
    assert found(output) == []


def test_a_finding_names_partition_file_and_sample(output: Path) -> None:
    path = output / "data/000/00002/shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[data.index(b"sample00010")] ^= 1
    path.write_bytes(data)
    (finding,) = found(output)
    assert (finding.partition, finding.file) == (2, "shard.00000.mds")
    assert "sample00010" in finding.key
    assert str(finding).startswith("partition 2: shard.00000.mds: sample sample00010")
    assert "its bytes have changed in block 0" in finding.what


def test_only_samples_of_damaged_blocks_are_named(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pipeline.storage", "pipeline.partitions.verify"):
        monkeypatch.setattr(f"{module}.BLOCK", 1024)
    run(memory / "output", count=60, partition_size=60)
    path = memory / "output/data/000/00000/shard.00000.mds"
    data = bytearray(path.read_bytes())
    at = data.index(b"sample00033")
    data[at] ^= 1
    path.write_bytes(data)
    (finding,) = found(memory / "output")
    assert f"in block {at // 1024} of" in finding.what
    named = set(finding.key.replace(" and", ",").split(", "))
    assert 1 <= len(named) <= 5
    assert "sample00000" not in finding.key


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda slot: shutil.rmtree(slot), "partition 1: is not committed"),
        (lambda slot: (slot / "record.json").unlink(), "partition 1: has no record.json"),
        (lambda slot: (slot / "stray").touch(), "partition 1: stray: does not belong here"),
        (lambda slot: (slot / "ledger.parquet").unlink(), "partition 1: ledger.parquet: is missing"),
        (lambda slot: shutil.rmtree(slot) or slot.touch(), "partition 1: has no record.json"),
    ],
)
def test_what_is_wrong_is_said(output: Path, damage: object, message: str) -> None:
    damage(output / "data/000/00001")  # type: ignore[operator]
    assert message in [str(finding) for finding in found(output)]


def test_two_partitions_that_changed_places_are_found(output: Path) -> None:
    bucket = output / "data/000"
    for old, new in (("00001", "x"), ("00002", "00001"), ("x", "00002")):
        (bucket / old).rename(bucket / new)
    assert {finding.partition for finding in found(output)} == {1, 2}


def test_a_ledger_that_contradicts_its_record_is_found(output: Path) -> None:
    dataset = Dataset.open(output)
    record = dataset.record(0) or {}
    counts = {**record["counts"], "kept": 3, "dropped": 1}
    (output / "data/000/00000/record.json").write_bytes(storage.seal({**record, "counts": counts}))
    assert any("rows kept, the record says 3" in finding.what for finding in verify(dataset))


def test_partitions_that_are_sound_but_not_those_that_were_counted_are_found(output: Path, memory: Path) -> None:
    run(memory / "other", colour="blue")
    dataset = Dataset.open(output)
    mine, theirs = output / "data/000/00001", memory / "other/data/000/00001"
    record = Dataset.open(memory / "other").record(1) or {}
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    (mine / "record.json").write_bytes(storage.seal({**record, "plan": dataset.plans[0].digest}))
    assert "the partitions differ from those that were counted" in [finding.what for finding in found(output)]


def test_an_unfinished_output_is_said_to_be_unfinished(output: Path) -> None:
    (output / "_SUCCESS").unlink()
    assert [str(finding) for finding in found(output)] == ["dataset: not finished: no _SUCCESS for the current plan"]


def test_a_sample_that_does_not_decode_is_found(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are as they were written, but they were written wrong."""

    class Wrong(Fake):
        pass

    monkeypatch.setattr("pipeline.formats.mds._encode", lambda kind, value: b"\xff\xfe")
    run(memory / "wrong", Wrong)
    monkeypatch.undo()
    assert any("does not decode" in finding.what for finding in found(memory / "wrong"))


def test_the_program_prints_findings_and_says_so_by_its_exit_code(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(VerifyConfig(input=str(output))) == 0
    assert "5 partitions checked: sound" in capsys.readouterr().out
    (output / "data/000/00001/ledger.parquet").unlink()
    assert program.main(VerifyConfig(input=str(output))) == 1
    assert "partition 1: ledger.parquet: is missing" in capsys.readouterr().out
    assert program.main(VerifyConfig(input=str(output), json=True)) == 1
    assert '"partition": 1' in capsys.readouterr().out
    (output / "plan/plan.json").write_bytes(b"garbage")
    assert program.main(VerifyConfig(input=str(output))) == 1
    assert "plan.json is damaged" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        program.main(VerifyConfig(input=str(output / "nothing")))
    assert end.value.code == 2
