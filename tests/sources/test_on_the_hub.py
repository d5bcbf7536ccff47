"""Sources in a dataset repository of the Hugging Face Hub: as in a store, of the commit that was planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import STALL, TOKEN, FakeHub
from sources import found
from sources.found import LAYOUTS, photo
from sources.packing import tar_of
from sources.test_secrets import texts

from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.planning import Stale
from pipeline.stages.download import Download
from pipeline.storage import StorageError
from pipeline.stores import Store, StoreError
from pipeline.stores.bucket_client import forget_clients

REPO = "owner/photos"
PLACE = f"hf://datasets/{REPO}"
SAMPLES = [(photo(number), f"a caption of {number}") for number in range(3)]
ALL = [caption for _, caption in SAMPLES]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(hub: FakeHub, memory: Path) -> Run:
    """Download with these settings as a new process does; what ``_SUCCESS`` says."""

    def do(**settings: Any) -> dict[str, Any]:
        forget_clients()
        return found.download(memory, {"check_space": False, **settings})

    return do


def captions(memory: Path) -> list[str]:
    return [row["captions"][0] for row in found.kept(memory)]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "ipc file", "mds"])
def test_a_folder_on_the_hub_is_the_same_as_one_here(
    hub: FakeHub, run: Run, memory: Path, tmp_path: Path, layout: str
) -> None:
    settings = LAYOUTS[layout](tmp_path, SAMPLES)
    files = {f"some data/{name}": data for name, data in files_below(tmp_path / "i").items()}
    commit = hub.put(REPO, {**files, "README.md": b"a card"})
    local = run(**settings, output=str(memory / "local"))
    there = run(**{**settings, "input": f"{PLACE}/some data"})
    assert captions(memory) == ALL
    assert there["content_digest"] == local["content_digest"]
    header = Dataset.open(memory / "download").header
    assert header["extra"]["commits"] == {PLACE: commit}
    (planned,) = Dataset.open(memory / "download").partition(0).inputs
    assert planned.etag.startswith("sha256:") and planned.size == len(files[f"some data/{planned.path}"])
    assert TOKEN not in texts(memory) and not hub.leaked


def test_patterns_lists_and_captions(hub: FakeHub, run: Run, memory: Path, tmp_path: Path) -> None:
    archives = {f"a/b-{n}.tar": tar_of({f"{n}.jpg": photo(n), f"{n}.txt": ALL[n].encode()}) for n in range(3)}
    rows = [{"url": f"{PLACE}/images/{n}.jpg", "caption": said} for n, said in enumerate([*ALL, "none"])]
    listed = "".join(json.dumps(row) + "\n" for row in rows).encode()
    coco = LAYOUTS["coco"](tmp_path, SAMPLES)
    images = {f"images/{n}.jpg": data for n, (data, _) in enumerate(SAMPLES)}
    hub.put(REPO, {**archives, **images, "list.jsonl": listed, "notes/m.json": (tmp_path / "m.json").read_bytes()})
    hub.history[REPO]["v 2"] = hub.files[REPO]
    for number, given in enumerate(
        [
            {"source": "webdataset", "input": f"{PLACE}/a/*.tar"},
            {"source": "webdataset", "urls": (f"{PLACE}@main/a/b-{{0..2}}.tar",)},
            {"source": "http_archive", "urls": (f"{PLACE}@v%202/**/b-?.tar",)},
            {"source": "url_list", "input": f"{PLACE}/list.jsonl"},
            {**coco, "metadata": (f"{PLACE}/notes/*.json",)},
        ]
    ):
        place = memory / str(number)
        summary = run(**given, output=str(place / "download"))
        assert captions(place) == ALL, given
        assert summary["reasons"] == ({"failed:missing": 1} if given["source"] == "url_list" else {})


def test_all_ranks_read_the_commit_of_the_plan(hub: FakeHub, run: Run, memory: Path) -> None:
    """What is committed meanwhile is noticed by the next run, unless a revision is named."""
    files = {f"{name}.tar": tar_of({f"{name}.jpg": photo(1), f"{name}.txt": b"old"}) for name in "ab"}
    first = hub.put(REPO, files)
    settings = {"source": "webdataset", "output": str(memory / "download")}
    stage = Download(DownloadConfig(input=PLACE, check_space=False, **settings), Rank())  # type: ignore[arg-type]
    plan = stage.source.plan

    def then_changed() -> Any:
        yield from plan()
        hub.put(REPO, {**files, "b.tar": tar_of({"b.jpg": photo(2), "b.txt": b"new"})})
        forget_clients()  # as another rank, which sees the newer commit

    stage.source.plan = then_changed  # type: ignore[method-assign]
    engine.run(stage)
    assert captions(memory) == ["old", "old"]
    with pytest.raises(Stale, match=r"b\.tar was modified"):
        run(source="webdataset", input=PLACE)
    pinned = {"source": "webdataset", "input": f"{PLACE}@{first}", "output": str(memory / "pinned")}
    for _ in range(2):
        run(**pinned)
    hub.put(REPO, {**files, "README.md": b"another card"})
    run(source="webdataset", input=PLACE)  # a commit that leaves the files as they were


def test_a_file_that_is_cut_off_goes_on_where_it_ended(hub: FakeHub, run: Run, memory: Path) -> None:
    data = tar_of({"1.jpg": photo(1), "1.txt": b"one", "more.bin": bytes(5 << 20)})
    hub.put(REPO, {"a.tar": data})
    hub.cuts = iter([True, True])
    statuses = iter([503, 429])
    hub.fault = lambda method, path: next(statuses, 0) if "/tree/" in path else 0
    run(source="webdataset", input=f"{PLACE}/")
    assert captions(memory) == ["one"]
    assert sum("resolve" in request for request in hub.requests) == 3 and next(statuses, 0) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{place}/none", "input={place}/none: {place}/none/: no objects match"),
        ("{place}/*.zip", r"input={place}/\*.zip: .*no objects match"),
        ("hf://datasets/owner/other/a.tar", "input=.*: there is no such repository, or it is private: .*HF_TOKEN"),
        ("{place}@v9/a.tar", "input=.*: the repository has no such revision"),
        ("hf://datasets/photos", "input=.*: expected hf://datasets/owner/name/prefix"),
        ("hf://owner/photos/a.tar", "input=.*: expected hf://datasets/owner/name/prefix"),
    ],
)
def test_what_is_wrong_is_said_with_the_setting(hub: FakeHub, run: Run, given: str, said: str) -> None:
    hub.put(REPO, {"a.tar": tar_of({"1.jpg": photo(1)})})
    with pytest.raises(ConfigError, match=said.replace("{place}", PLACE)):
        run(source="webdataset", input=given.replace("{place}", PLACE))


def test_who_may_not_read_is_told_how(
    hub: FakeHub, run: Run, memory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Private, gated, offline, and a Hub that does not answer."""
    hub.put(REPO, {"a.tar": tar_of({"1.jpg": photo(1)})})
    settings: dict[str, Any] = {"source": "webdataset", "input": PLACE, "max_failed_fraction": 1.0}
    hub.gated.add(REPO)
    assert run(**settings)["reasons"] == {"failed:denied": 1}
    (row,) = SlotReader(Dataset.open(memory / "download"), 0).ledger().to_pylist()
    assert "accept the terms of the dataset there" in row["detail"] and row["retryable"]
    hub.gated.clear()
    assert run(**settings, retry_failed=True)["counts"]["kept"] == 1
    settings["output"] = str(memory / "fresh")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="input=.*: HF_HUB_OFFLINE=1 forbids to ask the Hub: unset it"):
        run(**settings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="no such repository, or it is private") as caught:
        run(**settings)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setattr("pipeline.stores.errors.CUTS", 2)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="the Hub does not answer .*: check the network and HF_ENDPOINT"):
        run(**settings)


@pytest.mark.parametrize("source", ["webdataset", "huggingface"])
def test_a_hub_that_never_answers_is_an_error(
    hub: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """It is asked once: each request waits as long as is allowed."""
    monkeypatch.setattr("pipeline.stores.hub._ANSWER_SECONDS", 0.3)
    hub.put("o/d", {"a.tar": b""})
    hub.fault = lambda method, path: STALL if "/tree/" in path else 0
    given = {"repo": "o/d", "files": ("*.tar",)} if source == "huggingface" else {"input": "hf://datasets/o/d"}
    with pytest.raises((ConfigError, StoreError), match=r"o/d.*the Hub does not answer .*HF_ENDPOINT"):
        run(source=source, **given)
    assert len([asked for asked in hub.requests if "/tree/" in asked]) == 1


def test_the_hub_is_only_read(hub: FakeHub, memory: Path, run: Run) -> None:
    hub.put(REPO, {"a/b.txt": b"x" * 500, "c.txt": b"one"})
    store = Store(PLACE)
    assert [(o.path, o.size) for o in store.objects()] == [("a/b.txt", 500), ("c.txt", 3)]
    assert [o.path for o in store.children("a")[1]] == ["a/b.txt"] and store.children()[0] == ["a"]
    assert store.exists("c.txt") and not store.exists("a") and not list(store.objects("nothing"))
    assert b"".join(store.chunks("a/b.txt", start=490)) == b"x" * 10
    with pytest.raises(StoreError, match="not the version"):
        list(store.chunks("a/b.txt", etag="other"))
    with pytest.raises(StorageError, match=f"can only be read: .* run stage=publish to={PLACE}"):
        store.put("new", b"data")
    with pytest.raises(StorageError, match="can only be read"):
        store.delete(["c.txt"])
