"""Dataset directories that earlier versions have written stay readable; those of other format versions are refused.

``tests/data/golden_v1`` was written by format version 1 and must never be written again: what cannot read it any more
needs a new format version. (It was made by ``python -m partitions.golden`` in ``tests``.)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_stage import assert_sound, kept_keys, run

from pipeline import storage
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.plan import FORMAT_VERSION
from pipeline.storage import StorageError

GOLDEN = Path(__file__).parent.parent / "data" / "golden_v1"
DATASETS = ("download", "filter", "shard", "fake")


@pytest.fixture(params=DATASETS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / request.param))


def test_the_present_format_version_is_that_of_the_golden_directories() -> None:
    assert GOLDEN.name == f"golden_v{FORMAT_VERSION}"


def test_a_golden_directory_is_sound(golden: Path) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())[golden.name]
    success = assert_sound(golden)
    assert success["content_digest"] == expected["content_digest"]
    assert kept_keys(golden) == expected["keys"]


def test_rows_of_a_golden_directory_are_read_as_they_were_written(golden: Path) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())[golden.name]
    dataset = Dataset.open(golden)
    for index in range(dataset.partitions):
        for stored in dataset.samples(index):
            row = stored.read()
            assert storage.digest(row.pop("jpg")) == expected["images"][stored.key]
            assert row == expected["rows"][stored.key]


def test_a_golden_directory_can_be_retried_and_repaired_today(tmp_path: Path) -> None:
    from pipeline.distributed import Rank
    from pipeline.stages.repair import repair

    golden = Path(shutil.copytree(GOLDEN / "fake", tmp_path / "fake"))
    before = Dataset.open(golden).require_success()
    (golden / "data/000/00001/ledger.parquet").write_bytes(b"x")
    after = repair(golden, Rank())
    assert after is not None
    assert after["counts"] | {"bytes": 0} == before["counts"] | {"bytes": 0}
    run(golden, count=20, partition_size=4, retry_failed=True)
    assert_sound(golden)


@pytest.mark.parametrize("version", [999, 0, None])
def test_another_format_version_is_refused_with_what_to_do(tmp_path: Path, version: int | None) -> None:
    golden = Path(shutil.copytree(GOLDEN / "fake", tmp_path / "fake"))
    path = golden / "plan/plan.json"
    header = json.loads(path.read_bytes())
    header.pop("digest")
    for text in (storage.seal({**header, "format_version": version}), json.dumps({"format_version": version}).encode()):
        path.write_bytes(text)
        message = rf"plan: format_version {version}, this program reads 1; use the version of Latentmill that wrote it"
        with pytest.raises(StorageError, match=message):
            Dataset.open(golden)
        with pytest.raises(StorageError, match=message):
            run(golden)
