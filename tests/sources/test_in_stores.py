"""Sources in an object store: listed, read whole or on from where they ended, of the version that was planned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from object_stores import Proxy
from sources import found
from sources.found import LAYOUTS, photo
from sources.packing import tar_of
from sources.test_secrets import texts

from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.planning import Stale
from pipeline.sources.http import FetchError, Policy, fetch
from pipeline.sources.partial import Partial
from pipeline.stages.download import Download
from pipeline.stores import Store

SAMPLES = [(photo(number), f"a caption of {number}") for number in range(3)]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(s3: Proxy, memory: Path) -> Run:
    """Download with these settings; what ``_SUCCESS`` says."""
    return lambda **settings: found.download(memory, {"check_space": False, **settings})


def sent(folder: Path, place: str) -> None:
    """Put all files below a folder into the store."""
    store = Store(place)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(folder)), path.read_bytes())


def inputs_of(memory: Path) -> list[Any]:
    dataset = Dataset.open(memory / "download")
    return [file for index in range(dataset.partitions) for file in dataset.partition(index).inputs]


def captions(memory: Path) -> list[str]:
    return [row["captions"][0] for row in found.kept(memory)]


ALL = [caption for _, caption in SAMPLES]


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "ipc file", "mds"])
def test_a_folder_in_a_store_is_the_same_as_one_here(
    s3: Proxy, place: str, run: Run, memory: Path, tmp_path: Path, layout: str
) -> None:
    settings = LAYOUTS[layout](tmp_path, SAMPLES)
    sent(tmp_path / "i", place)
    Store(place).put("notes.md", b"no data")
    local = run(**settings, output=str(memory / "local"))
    there = run(**{**settings, "input": place})
    assert captions(memory) == ALL
    assert there["content_digest"] == local["content_digest"]
    (planned,) = inputs_of(memory)
    held = next(o for o in Store(place).objects() if o.path == planned.path)
    assert (planned.etag, planned.size) == (held.etag, held.size)
    secrets = texts(memory)
    assert "hush-hush" not in secrets and "AKIAEXAMPLE" not in secrets


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("input", "{place}/a-*.tar"),
        ("input", "{place}/a-{{0..2}}.tar"),
        ("urls", "{place}/a-{{0..2}}.tar"),
        ("urls", "{place}/**/a-?.tar"),
    ],
)
@pytest.mark.parametrize("source", ["webdataset", "http_archive"])
def test_patterns_and_ranges(
    s3: Proxy, place: str, run: Run, memory: Path, source: str, setting: str, given: str
) -> None:
    for number in range(3):
        Store(place).put(f"a-{number}.tar", tar_of({f"{number}.jpg": photo(number)}))
    Store(place).put("b.tar", b"another")
    named = given.format(place=place)
    run(source=source, **{setting: named if setting == "input" else (named,)})
    assert [file.path for file in inputs_of(memory)] == ["a-0.tar", "a-1.tar", "a-2.tar"]
    assert all(file.etag and file.size > 0 for file in inputs_of(memory))
    assert len(found.kept(memory)) == 3


def test_a_list_of_archives(s3: Proxy, place: str, run: Run, memory: Path) -> None:
    Store(place).put("one.tar", tar_of({"1.jpg": photo(1), "1.txt": b"one"}))
    Store(place).put("list.txt", f"first\t{place}/one.tar\n".encode())
    run(source="http_archive", input=f"{place}/list.txt")
    assert captions(memory) == ["one"]
    assert [(file.path, bool(file.etag)) for file in inputs_of(memory)] == [("first", True)]


@pytest.mark.parametrize("setting", ["input", "urls", "folder"])
def test_a_list_of_images(s3: Proxy, place: str, run: Run, memory: Path, setting: str) -> None:
    store = Store(place)
    for number, (data, _) in enumerate(SAMPLES):
        store.put(f"images/{number}.jpg", data)
    rows = [{"url": f"{place}/images/{number}.jpg", "caption": said} for number, said in enumerate([*ALL, "none"])]
    store.put("lists/a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    given = {"input": f"{place}/lists/a.jsonl", "folder": f"{place}/lists", "urls": (f"{place}/lists/a.jsonl",)}
    settings = {"input" if setting == "folder" else setting: given[setting]}
    summary = run(source="url_list", robots_txt=True, **settings)
    assert captions(memory) == ALL
    assert summary["reasons"] == {"failed:missing": 1}
    store.put("lists/a.jsonl", b'{"url": "s3://b/c.jpg"}\n')
    with pytest.raises(Stale, match=r"a\.jsonl was modified since it was planned"):
        run(source="url_list", robots_txt=True, **settings)


def test_annotations(s3: Proxy, place: str, run: Run, memory: Path, tmp_path: Path) -> None:
    settings = LAYOUTS["coco"](tmp_path, SAMPLES)
    Store(place).put("notes/m.json", (tmp_path / "m.json").read_bytes())
    there = {**settings, "metadata": (f"{place}/notes/*.json",)}
    run(**there)
    assert captions(memory) == ALL
    Store(place).put("notes/m.json", (tmp_path / "m.json").read_bytes() + b"\n")
    with pytest.raises(Stale, match=r"notes/m\.json was modified since it was planned"):
        run(**there)


def test_an_object_that_changes_is_noticed(s3: Proxy, place: str, run: Run, memory: Path) -> None:
    """While it is worked on, in the ledger; after that by the next run."""
    store = Store(place)
    for name in "ab":
        store.put(f"{name}.tar", tar_of({f"{name}.jpg": photo(1)}))
    settings = {"source": "webdataset", "output": str(memory / "download"), "max_failed_fraction": 1.0}
    stage = Download(DownloadConfig(input=f"{place}/", check_space=False, **settings), Rank())  # type: ignore[arg-type]
    plan = stage.source.plan

    def then_changed() -> Iterator[Any]:
        yield from plan()
        store.put("b.tar", tar_of({"b.jpg": photo(2)}))

    stage.source.plan = then_changed  # type: ignore[method-assign]
    assert engine.run(stage)["reasons"] == {"failed:changed_since_plan": 1}
    assert len(found.kept(memory)) == 1
    with pytest.raises(Stale, match=r"b\.tar was modified"):
        run(source="webdataset", input=f"{place}/")


def test_an_object_that_changes_after_a_retry_is_noticed(s3: Proxy, place: str, run: Run, memory: Path) -> None:
    store = Store(place)
    for name in "ab":
        store.put(f"{name}.tar", tar_of({f"{name}.jpg": photo(1)}))
    settings = {"source": "webdataset", "input": f"{place}/", "output": str(memory / "download")}
    found.download_by_retry(memory, {"check_space": False, **settings})
    store.put("b.tar", tar_of({"b.jpg": photo(2)}))
    with pytest.raises(Stale, match=r"b\.tar was modified"):
        run(**settings)


def test_an_object_that_is_cut_off_goes_on_where_it_ended(s3: Proxy, place: str, run: Run, memory: Path) -> None:
    data = tar_of({"1.jpg": photo(1), "1.txt": b"one", "more.bin": bytes(9 << 20)})
    Store(place).put("a.tar", data)
    faults = iter(["busy", "truncated", "reset", "truncated"])
    s3.fault = lambda method, path: next(faults, "") if method == "GET" and path.endswith("a.tar") else ""
    run(source="webdataset", input=f"{place}/a.tar")
    assert captions(memory) == ["one"]
    assert +s3.broken == {"busy": 1, "truncated": 2, "reset": 1}


def test_what_the_last_run_has_fetched_is_not_fetched_again(s3: Proxy, place: str, run: Run, memory: Path) -> None:
    data = tar_of({"1.jpg": photo(1), "1.txt": b"one", "more.bin": bytes(9 << 20)})
    Store(place).put("a.tar", data)
    faults = iter(["truncated", "denied"])
    s3.fault = lambda method, path: next(faults, "") if method == "GET" and path.endswith("a.tar") else ""
    assert run(source="webdataset", input=f"{place}/a.tar")["reasons"] == {"failed:denied": 1}
    sizes: list[int] = []
    s3.heard = sizes.append
    run(source="webdataset", input=f"{place}/a.tar", retry_failed=True)
    assert captions(memory) == ["one"]
    assert 0 < sum(sizes) < len(data) * 2 // 3


def test_a_part_of_another_version_is_not_gone_on_with(s3: Proxy, place: str, tmp_path: Path) -> None:
    data = {name: name.encode() * (3 << 20) for name in "ab"}
    faults = iter(["truncated", "denied"])
    s3.fault = lambda method, path: next(faults, "") if method == "GET" else ""
    Store(place).put("object", data["a"])
    url = f"{place}/object"
    with pytest.raises(FetchError, match="denied"), Partial(tmp_path, None, url) as partial:
        fetch(url, partial, Policy())
    assert partial.have()[0] > 0
    Store(place).put("object", data["b"])
    with Partial(tmp_path, None, url) as partial:
        assert fetch(url, partial, Policy()) == len(data["b"])
        assert partial.whole()[0].read() == data["b"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "webdataset", "input": "{place}/none"}, "input={place}/none: {place}/none/: no objects match"),
        ({"source": "webdataset", "urls": ("{place}/*.zip",)}, r"urls: {place}/\*.zip: no objects match"),
        ({"source": "webdataset", "urls": ("{place}/none.tar",)}, "urls: {place}/none.tar: not there"),
        ({"source": "http_archive", "input": "{place}"}, "input={place}: no .tar, .*files in it"),
        ({"source": "parquet", "input": "{place}"}, "input={place}: no .parquet files in it"),
        ({"source": "mds", "input": "{place}"}, "input={place}: no index.json in it or below"),
        ({"source": "webdataset", "input": "s3://nowhere-at-all/x"}, "input=s3://nowhere-at-all/x: .*no such bucket"),
        ({"source": "image_folder", "input": "{place}"}, r"in a store, read archives \(source=webdataset\)"),
        ({"source": "webdataset", "urls": ("s3://me:hush@b/a.tar",)}, "s3://b/a.tar: an address holds no credentials"),
    ],
)
def test_what_is_wrong_is_said_with_the_setting(
    s3: Proxy, place: str, run: Run, settings: dict[str, Any], said: str
) -> None:
    Store(place).put("other.md", b"no data")

    def filled(value: Any) -> Any:
        return tuple(map(filled, value)) if isinstance(value, tuple) else value.replace("{place}", place)

    with pytest.raises(ConfigError, match=filled(said)) as caught:
        run(**{name: filled(value) for name, value in settings.items()})
    assert "hush" not in str(caught.value)


def test_credentials_that_do_not_suffice_name_the_setting(s3: Proxy, place: str, run: Run) -> None:
    s3.fault = lambda method, path: "denied"
    with pytest.raises(ConfigError, match=f"input={place}.*do not allow this: check the bucket's policy"):
        run(source="webdataset", input=f"{place}/*.tar")
