"""Outputs written in an object store, by ranks that share no file system: the same as a local one, or refused."""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fake_stage
import pytest
from fake_stage import make, rank_of, run
from object_stores import Proxy, random_faults
from stages.conftest import run_stage

from pipeline import storage
from pipeline.config.schema import ConfigError
from pipeline.partitions import engine
from pipeline.partitions.dataset import SUCCESS, Dataset, RandomAccess
from pipeline.partitions.gc import collect
from pipeline.partitions.verify import verify
from pipeline.storage import StorageError
from pipeline.stores import Store, output

SMALL = {"count": 20, "partition_size": 4}


def rows(place: str | Path) -> list[dict[str, Any]]:
    access = RandomAccess(Dataset.open(place))
    return access.rows(range(len(access)))


def test_the_content_is_that_of_a_local_output_and_feeds_the_next_stage(s3: Proxy, place: str, memory: Path) -> None:
    first, second = f"{place}/a", f"{place}/b"
    near = run(memory / "a", **SMALL)
    far = run(Path(first), **SMALL)
    assert far["content_digest"] == near["content_digest"] and far["counts"] == near["counts"]
    assert list(verify(Dataset.open(first))) == [] and rows(first) == rows(memory / "a")
    assert not list(memory.glob("*/s3:*")) and not Path("s3:").exists()
    after = run(memory / "b", fake_stage.FakeFilter, input=str(memory / "a"))
    there = run(Path(second), fake_stage.FakeFilter, input=first)
    assert there["content_digest"] == after["content_digest"]
    again = run(Path(first), **SMALL, retry_failed=True, run_id="again")
    assert again["content_digest"] == run(memory / "a", **SMALL, retry_failed=True, run_id="again")["content_digest"]
    appended = run(Path(second), fake_stage.FakeFilter, input=first)  # takes in what the retry has added
    assert (
        appended["content_digest"]
        == run(memory / "b", fake_stage.FakeFilter, input=str(memory / "a"))["content_digest"]
    )
    assert list(verify(Dataset.open(second))) == []
    text = b"".join(Store(place).read(o.path) for o in Store(place).objects())
    assert b"hush-hush" not in text and b"AKIAEXAMPLE" not in text


def test_any_store_takes_an_output(any_place: str, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which one ends amid its work; a further generation; what lost is deleted."""
    near = run(memory / "a", **SMALL)
    left = 25

    def interpose(operation: str, path: str, do: Any) -> Any:
        nonlocal left
        if threading.current_thread() is not threading.main_thread():
            return do()  # a heartbeat
        left -= "://" in path
        if left < 0:
            raise Killed
        return do()

    monkeypatch.setattr(storage, "interpose", interpose)
    with suppress(Killed):
        run(Path(any_place), rank=rank_of(0, 2), **SMALL, lease=0.5)
    assert left < 0
    monkeypatch.setattr(storage, "interpose", None)
    with ThreadPoolExecutor(2) as ranks:
        made = [make(Path(any_place), rank=rank_of(number, 2), **SMALL, lease=0.5) for number in range(2)]
        digests = {success["content_digest"] for success in ranks.map(engine.run, made)}
    assert digests == {near["content_digest"]}
    for where in (memory / "a", Path(any_place)):
        digests.add(run(where, **SMALL, retry_failed=True, run_id="again")["content_digest"])
    assert len(digests) == 2 and rows(any_place) == rows(memory / "a")
    list(collect(Dataset.open(any_place), 0.0))
    assert list(verify(Dataset.open(any_place))) == []


def test_ranks_share_the_work(s3: Proxy, place: str, memory: Path) -> None:
    with ThreadPoolExecutor(3) as ranks:
        made = [make(Path(place), rank=rank_of(number, 3), **SMALL) for number in range(3)]
        digests = {success["content_digest"] for success in ranks.map(engine.run, made)}
    assert digests == {run(memory / "a", **SMALL)["content_digest"]}
    records = [line for line in s3.paths if line.startswith("PUT") and line.endswith("/record.json")]
    assert len(records) == 5  # claims kept them from doing anything twice


@pytest.mark.parametrize("when", ["made", "opened"])
def test_a_folder_that_another_process_takes_for_abandoned_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Ranks of a node start together: one may look for abandoned folders before another has locked its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owner, name = (tempfile, "mkdtemp") if when == "made" else (os, "open")
    original, calls = getattr(owner, name), []

    def disturbed(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        calls.append(result)
        if len(calls) == 1:
            for folder in tmp_path.iterdir():
                output._delete_abandoned(folder)
        return result

    monkeypatch.setattr(owner, name, disturbed)
    home, fd = output._locked_folder()
    monkeypatch.undo()
    assert len(calls) > 1 and list(tmp_path.iterdir()) == [home]
    output._delete_abandoned(home)
    assert home.is_dir()
    os.close(fd)


class Killed(BaseException):
    """The process is no more."""


@pytest.mark.parametrize("seed", range(int(os.environ.get("DIRECT_SEEDS", "2"))))
def test_kills_and_faults_anywhere_give_the_same_content(
    s3: Proxy, place: str, memory: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lives that end before a random request, with answers that fail or get lost, then one that comes to its end."""
    rng = random.Random(seed)
    wanted = run(memory / "a", **SMALL)
    s3.fault = random_faults(seed, 0.05, ("busy", "reset", "lost", "truncated"))
    for life in range(6):
        left = rng.randrange(5, 120)

        def interpose(operation: str, path: str, do: Any) -> Any:
            nonlocal left
            if threading.current_thread() is not threading.main_thread():
                return do()  # a heartbeat
            left -= path.startswith("s3://")
            if left < 0:
                raise Killed
            return do()

        monkeypatch.setattr(storage, "interpose", interpose)
        with suppress(Killed):
            run(Path(place), rank=rank_of(life % 2, 2), **SMALL, lease=0.5)
    monkeypatch.setattr(storage, "interpose", None)
    s3.fault = lambda method, path: ""
    assert run(Path(place), **SMALL, lease=0.5)["content_digest"] == wanted["content_digest"]
    assert list(verify(Dataset.open(place))) == []
    list(collect(Dataset.open(place), 0.0))
    assert list(verify(Dataset.open(place))) == [] and rows(place) == rows(memory / "a")
    attempts = {o.path.split("/")[2] for o in Store(place).objects("data") if o.path.split("/")[2].startswith(".")}
    assert len(attempts) == 5  # those that count


def test_gc_leaves_what_may_still_win(s3: Proxy, place: str) -> None:
    run(Path(place), **SMALL)
    store = Store(place)
    lost, open_ = f"data/000/.00002.{'a' * 32}", f"data/000/.00009.{'b' * 32}"
    for folder in (lost, open_):
        store.put(f"{folder}/shard.00000.mds", b"bytes")
    assert [str(path).rpartition("/")[2] for path in collect(Dataset.open(place), 0.0)] == [lost.rpartition("/")[2]]
    assert store.exists(f"{open_}/shard.00000.mds") and list(verify(Dataset.open(place))) == []


def test_what_cannot_be_done_in_a_store_is_refused(s3: Proxy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("overwrite", "compact"):
        with pytest.raises(ConfigError, match=f"{name}=true does not work with an output in an object store"):
            run(Path(place), **SMALL, **{name: True})
    with pytest.raises(
        ConfigError, match="the Hub is only read here: choose a local output=, and stage=publish to=hf:"
    ):
        run(Path("hf://datasets/owner/name"), **SMALL)
    monkeypatch.setattr(fake_stage.Fake, "writes_to_stores", False)
    with pytest.raises(ConfigError, match="stage=fake needs a local folder; stage=publish to=s3://"):
        run(Path(place), **SMALL)
    monkeypatch.setattr(fake_stage.Fake, "writes_to_stores", True)
    Store(place).put("notes.txt", b"something else")
    with pytest.raises(ConfigError, match=r"is not empty \(notes.txt ...\) and no dataset directory"):
        run(Path(place), **SMALL)
    monkeypatch.setattr(Store, "put_new", lambda store, path, data: bool(store.put(path, data)) or True)
    with pytest.raises(StorageError, match="does not support conditional writes"):
        run(Path(f"{place}/other"), **SMALL)


def test_a_damaged_record_is_found(s3: Proxy, place: str) -> None:
    run(Path(place), **SMALL)
    store = Store(place)
    record = json.loads(store.read("data/000/00001/record.json"))
    name = f"data/000/.00001.{record['attempt']}/{record['files'][-1]['name']}"
    data = bytearray(store.read(name))
    data[-1] ^= 1
    store.put(name, bytes(data))
    assert {finding.partition for finding in verify(Dataset.open(place))} == {1}
    store.delete([name])
    assert {finding.partition for finding in verify(Dataset.open(place))} == {1}


def test_the_main_line_from_raw_images_to_latents(
    s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = str(tmp_path / "raw")
    drawn = {"source": "shapes", "count": 24, "image_size": 64, "holdout": False, "partition_size": 8}
    run_stage("download", **drawn, output=raw)
    stages: dict[str, dict[str, Any]] = {
        "filter": {"min_image_size": 32},
        "shard": {"format": "mds"},
        "precompute": {"image_resolutions": (32, 64), "vae": "embedded16"},
    }
    near, far = raw, raw
    for name, settings in stages.items():
        wanted = run_stage(name, **settings, input=near, output=str(tmp_path / name))
        got = run_stage(name, **settings, input=far, output=f"{place}/{name}")
        assert got["content_digest"] == wanted["content_digest"], name
        near, far = str(tmp_path / name), f"{place}/{name}"
    assert list(verify(Dataset.open(far))) == []
    streaming = pytest.importorskip("streaming")
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    data = streaming.StreamingDataset(remote=far, local=str(tmp_path / "local"), batch_size=1, shuffle=False)
    assert [sample["key"] for sample in data] == [row["key"] for row in rows(near)]
    assert Store(far).exists(SUCCESS)
