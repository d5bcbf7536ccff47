"""stage=publish to=hf://datasets/…: the whole dataset directory, with a card that the Hub's viewer and people read."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
import yaml
from fake_hub import TOKEN, FakeHub
from stages.conftest import run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, PublishConfig
from pipeline.distributed import Rank
from pipeline.partitions import publish_hub as publishing
from pipeline.partitions.dataset import SUCCESS, Dataset
from pipeline.partitions.verify import verify
from pipeline.stages.publish import publish
from pipeline.storage import StorageError

TO = "hf://datasets/someone/shapes"
REPO = "someone/shapes"


@pytest.fixture(autouse=True)
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_FILES", 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same samples in each storage format; some are dropped."""
    root = tmp_path_factory.mktemp("hub")
    drawn = {"source": "shapes", "count": 12, "image_size": 32, "holdout": False, "partition_size": 4}
    run_stage("download", **drawn, output=str(root / "raw"))
    for format in ("parquet", "tar", "mds"):
        run_stage("shard", input=str(root / "raw"), output=str(root / format), format=format, partition_size=4)
    return {format: root / format for format in ("parquet", "tar", "mds")}


def published(folder: Path, to: str = TO, **settings: object) -> str:
    return publish(build(PublishConfig, {"input": str(folder), "to": to, **settings}), Rank())


def local(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and not {"claims", "events"} & set(p.parts))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "README.md"}


def there(hub: FakeHub) -> dict[str, bytes]:
    left_out = (".gitattributes", "README.md", publishing.SHEET)
    return {path: data for path, data in hub.files[REPO].items() if path not in left_out}


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_the_repository_is_the_folder_with_a_card(
    hub: FakeHub, folders: dict[str, Path], tmp_path: Path, format: str
) -> None:
    assert "this rank sent" in published(folders[format])
    assert there(hub) == local(folders[format])
    assert len(hub.commits) > 2 and hub.commits[-1].startswith("Finished")
    for path, data in hub.files[REPO].items():
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path).write_bytes(data)
    assert list(verify(Dataset.open(tmp_path / "copy"))) == []
    assert list(verify(Dataset.open(Path(TO)))) == []
    run_stage("filter", input=TO, output=str(tmp_path / "filtered"))
    assert Dataset.open(tmp_path / "filtered").require_success()["counts"]["in"] == 12
    assert not [path for path, data in hub.files[REPO].items() if TOKEN.encode() in data]
    _, front, body = hub.files[REPO]["README.md"].decode().split("---\n", 2)
    (files,) = yaml.safe_load(front)["configs"][0]["data_files"]
    shown = [path for path in hub.files[REPO] if fnmatch.fnmatch(path, files["path"])]
    assert len(shown) == 3 and yaml.safe_load(front)["size_categories"] == ["n<1K"]
    assert "| kept | 12 |" in body and "| format | " + format in body and "samples.png" in body
    assert hub.files[REPO][publishing.SHEET].startswith(b"\x89PNG")


def test_a_second_publication_sends_nothing(hub: FakeHub, folders: dict[str, Path]) -> None:
    estimate = published(folders["parquet"], count_only=True)
    assert estimate.startswith(f"{len(local(folders['parquet'])) + 1} files") and REPO not in hub.files
    published(folders["parquet"])
    commits = list(hub.commits)
    assert "sent 0 files" in published(folders["parquet"]) and hub.commits == commits


@pytest.mark.parametrize("seed", range(4))
def test_a_publication_that_was_broken_off_goes_on(hub: FakeHub, folders: dict[str, Path], seed: int) -> None:
    left = 4 + 3 * seed

    def fault(method: str, path: str) -> int:
        nonlocal left
        left -= 1
        return 500 if left < 0 else 0

    hub.fault = fault
    with pytest.raises(StorageError, match="run the same command again"):
        published(folders["tar"])
    assert REPO not in hub.files or SUCCESS not in hub.files[REPO]
    hub.fault = lambda method, path: 0
    published(folders["tar"])
    assert there(hub) == local(folders["tar"])
    assert hub.received == len(hub.stored)  # no content was sent twice


def test_what_is_wrong_is_said(hub: FakeHub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the Hub shows Parquet, .* not mds: run stage=shard format=parquet first"):
        published(folders["mds"])
    with pytest.raises(ConfigError, match="expected hf://datasets/<owner>/<name>"):
        published(folders["tar"], "hf://datasets/name")
    published(folders["tar"])
    with pytest.raises(ConfigError, match="holds another dataset"):
        published(folders["parquet"])
    published(folders["parquet"], overwrite=True, delete=True)
    assert there(hub) == local(folders["parquet"])
    hub.files["someone/other"] = {"notes.txt": b"mine"}
    with pytest.raises(ConfigError, match=r"holds something else \(notes.txt ...\)"):
        published(folders["parquet"], "hf://datasets/someone/other")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(StorageError, match="give a token that may do this as HF_TOKEN") as caught:
        published(folders["parquet"])
    assert "hf_wrong" not in str(caught.value)
