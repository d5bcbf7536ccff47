"""stage=publish: whole or not at all, resumed, extended, reduced, and read where it lies as if it lay here."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fake_stage
import pytest
from object_stores import Proxy, random_faults
from stages.conftest import run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, PublishConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine, publish
from pipeline.partitions.dataset import SUCCESS, Dataset, RandomAccess, Unfinished
from pipeline.partitions.verify import verify
from pipeline.stages.publish import publish as run_publish
from pipeline.stages.repair import repair
from pipeline.stages.takedown import takedown
from pipeline.stages.verify import findings_of
from pipeline.storage import StorageError
from pipeline.stores import Store

COUNT = 40


def made(place: Path, stage: type = fake_stage.Fake, **settings: Any) -> Path:
    """A finished dataset directory of 10 partitions."""
    engine.run(stage(fake_stage.FakeConfig(output=str(place), count=COUNT, **settings), Rank()))
    return place


@pytest.fixture
def folder(memory: Path) -> Path:
    return made(memory / "made")


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "UNIT", 3)
    monkeypatch.setattr(publish, "_POLL", 0.02)


def published(folder: Path, place: str, **settings: Any) -> str:
    return run_publish(build(PublishConfig, {"input": str(folder), "to": place, **settings}), Rank())


def contents(place: str) -> dict[str, bytes]:
    store = Store(place)
    return {o.path: store.read(o.path) for o in store.objects() if not o.path.startswith(".publish/")}


def local(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and not {"claims", "events"} & set(p.parts))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def writes(s3: Proxy) -> list[str]:
    return [line for line in s3.paths if line.startswith(("PUT", "POST"))]


def test_what_is_published_is_the_folder_and_is_sound(s3: Proxy, place: str, folder: Path) -> None:
    assert "this rank sent" in published(folder, place)
    assert contents(place) == local(folder)
    assert writes(s3)[-1].endswith(SUCCESS)
    there, here = Dataset.open(place), Dataset.open(folder)
    assert there.require_success() == here.require_success()
    assert not list(verify(there))
    assert rows(place) == rows(folder)


def test_any_store_takes_a_publication_and_its_changes(any_place: str, folder: Path) -> None:
    """Broken off several times, then extended: what is there is the folder, and is read as such."""
    for life in range(4):
        left = 12 * (life + 1)

        def step() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        publication = publish.Publication(Dataset.open(folder), Store(any_place), 2, step)
        publication.claim_target()
        claims = publish.Claims(publication.dataset.root, 60)
        with suppress(KeyboardInterrupt):
            publication.run(claims, life, 4)
        claims.close()
    published(folder, any_place)
    assert contents(any_place) == local(folder)
    assert "sent 0 files" in published(folder, any_place)
    engine.run(fake_stage.Fake(fake_stage.FakeConfig(output=str(folder), count=COUNT, retry_failed=True), Rank()))
    published(folder, any_place)
    assert contents(any_place) == local(folder) and rows(any_place) == rows(folder)
    assert not list(verify(Dataset.open(any_place)))


def rows(place: str | Path) -> Any:
    access = RandomAccess(Dataset.open(place))
    return access.rows(range(len(access)))


def test_a_second_publication_sends_no_data(s3: Proxy, place: str, folder: Path) -> None:
    published(folder, place)
    s3.paths.clear()
    assert "sent 0 files" in published(folder, place)
    assert not [line for line in writes(s3) if ".publish/target" not in line]


def test_the_estimate_is_what_is_sent(s3: Proxy, place: str, folder: Path) -> None:
    said = published(folder, place, count_only=True)
    assert said.startswith(f"{len(local(folder))} files with") and not writes(s3) and "cost" not in said
    requests = int(re.search(r"about (\d+) requests", said)[1])  # type: ignore[index]
    size = sum(map(len, local(folder).values())) / 1e9
    prices = {"request_price": 500, "storage_price": 1e6}
    priced = published(folder, place, count_only=True, **prices)
    costs = f"; the requests cost about {requests / 2:,.2f}; storing what is sent costs about {size * 1e6:,.2f} a month"
    assert priced == said + costs
    published(folder, place)
    assert published(folder, place, count_only=True).startswith("0 files with 0.000 GB")


@pytest.mark.parametrize("seed", range(int(os.environ.get("PUBLISH_SEEDS", "2"))))
def test_kills_and_faults_anywhere_give_the_same_objects(s3: Proxy, place: str, folder: Path, seed: int) -> None:
    """Eight lives that end at a random request, with answers that fail or get lost, then one that comes to its end."""
    rng = random.Random(seed)
    faults = random_faults(seed, 0.05, ("busy", "reset", "lost", "truncated"))
    for _ in range(8):
        left = rng.randrange(1, 40)

        def step() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        s3.fault = faults
        publication = publish.Publication(Dataset.open(folder), Store(place), 2, step)
        try:
            publication.claim_target()
            claims = publish.Claims(publication.dataset.root, 60)
            try:
                publication.run(claims, rng.randrange(4), 4)
            finally:
                claims.close()
        except KeyboardInterrupt:
            s3.fault = lambda method, path: ""
            objects = {o.path for o in Store(place).objects()}
            if SUCCESS in objects:  # then all is there
                assert local(folder).keys() <= objects
    s3.fault = lambda method, path: ""
    published(folder, place)
    assert contents(place) == local(folder)
    assert not list(verify(Dataset.open(place)))


def test_a_unit_that_another_rank_has_sent_meanwhile_is_not_looked_at(
    s3: Proxy, place: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(folder, place)
    late = publish.Publication(Dataset.open(folder), Store(place))
    now = late.done
    answers = iter([set[int]()])  # what it saw before the other began
    monkeypatch.setattr(late, "done", lambda: next(answers, None) or now())
    s3.paths.clear()
    claims = publish.Claims(late.dataset.root, 60)
    try:
        late.run(claims, 1, 2)
    finally:
        claims.close()
    assert not late.there and not late.sent
    assert s3.paths and not [line for line in s3.paths if "data" in line]


def test_several_ranks_share_the_work(s3: Proxy, place: str, folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def rank(number: int) -> int:
        publication = publish.Publication(Dataset.open(folder), Store(place), 2)
        publication.claim_target()
        claims = publish.Claims(publication.dataset.root, 60)
        try:
            publication.run(claims, number, 3)
        finally:
            claims.close()
        return publication.sent["files"]

    with ThreadPoolExecutor(3) as pool:
        sent = list(pool.map(rank, range(3)))
    assert contents(place) == local(folder)
    assert sum(count > 0 for count in sent) >= 2


def test_what_was_added_is_sent_alone(s3: Proxy, place: str, folder: Path) -> None:
    published(folder, place)
    before = {o.path: o.etag for o in Store(place).objects("data")}
    engine.run(fake_stage.Fake(fake_stage.FakeConfig(output=str(folder), count=COUNT, retry_failed=True), Rank()))
    published(folder, place)
    after = {o.path: o.etag for o in Store(place).objects("data")}
    assert contents(place) == local(folder)
    assert before.items() < after.items()
    assert not list(verify(Dataset.open(place)))


def test_a_takedown_is_published_as_such(s3: Proxy, place: str, memory: Path, tmp_path: Path) -> None:
    folder = made(memory / "data/set/train/fake")
    published(folder, place)
    (tmp_path / "keys.txt").write_text("sample00012\n")
    takedown(memory / "data", tmp_path / "keys.txt", Rank())
    assert any(b"red 12 " in data for data in contents(place).values())
    assert "objects were deleted" in published(folder, place)
    assert not any(b"red 12 " in data for data in contents(place).values())
    assert not list(verify(Dataset.open(place)))


def test_a_place_that_holds_something_else_is_refused(s3: Proxy, place: str, folder: Path, memory: Path) -> None:
    Store(place).put("mine.txt", b"precious")
    with pytest.raises(ConfigError, match=r"holds something else \(mine.txt"):
        published(folder, place)
    other = made(memory / "other", colour="blue")
    published(folder, f"{place}/x")
    with pytest.raises(ConfigError, match="another dataset"):
        published(other, f"{place}/x")
    published(other, f"{place}/x", overwrite=True, delete=True)
    assert contents(f"{place}/x") == local(other)


def test_damaged_and_unfinished_data_are_not_published(s3: Proxy, place: str, folder: Path) -> None:
    victim = next(folder.glob("data/000/00005/*.mds"))
    data = bytearray(victim.read_bytes())
    data[40] ^= 1
    victim.write_bytes(data)
    with pytest.raises(StorageError, match="damaged, and was not published: run stage=repair"):
        published(folder, place)
    assert not any(
        o.path == SUCCESS or ("00005" in o.path and o.path.endswith((".mds", "record.json")))
        for o in Store(place).objects()
    )
    (folder / SUCCESS).unlink()
    with pytest.raises(Unfinished):
        published(folder, place)


def test_verify_names_what_was_changed_or_removed_in_the_store(s3: Proxy, place: str, folder: Path) -> None:
    published(folder, place)
    store = Store(place)
    name = next(o.path for o in store.objects("data/000/00003") if o.path.endswith(".mds"))
    data = bytearray(store.read(name))
    data[-1] ^= 1
    store.put(name, bytes(data))
    gone = next(o.path for o in store.objects("data/000/00005") if o.path.endswith(".mds"))
    store.delete([gone])
    _, findings = findings_of(place)
    assert {finding.partition for finding in findings} == {3, 5}


def test_a_published_dataset_is_the_input_of_a_stage(s3: Proxy, place: str, folder: Path, memory: Path) -> None:
    published(folder, place)
    run: Callable[[str, Path], Any] = lambda source, output: engine.run(  # noqa: E731
        fake_stage.FakeFilter(fake_stage.FakeConfig(input=source, output=str(output)), Rank())
    )
    far, near = run(place, memory / "far"), run(str(folder), memory / "near")
    assert far["content_digest"] == near["content_digest"]
    secrets = [p for p in (memory / "far").rglob("*") if p.is_file() and b"hush-hush" in p.read_bytes()]
    assert not secrets


def test_what_is_published_is_read_by_streaming(
    s3: Proxy, place: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streaming = pytest.importorskip("streaming")
    published(folder, place)
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    data = streaming.StreamingDataset(remote=place, local=str(tmp_path / "local"), batch_size=1, shuffle=False)
    wanted = rows(place)
    assert data.num_samples == len(wanted)
    at = 0
    for number, shard in enumerate(data.shards):
        data.prepare_shard(number)
        for inside in range(shard.samples):
            assert wanted[at]["jpg"] in shard.get_sample_data(inside)
            at += 1
    assert at == len(wanted)


def test_what_is_published_is_read_by_webdataset(s3: Proxy, place: str, memory: Path) -> None:
    """It opens URLs by curl, here such as are signed."""
    webdataset = pytest.importorskip("webdataset")
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens URLs by curl, which is not installed")
    drawn = {"source": "shapes", "count": 12, "image_size": 32, "holdout": False, "partition_size": 4}
    run_stage("download", **drawn, output=str(memory / "tars"))
    tars = memory / "tars"
    published(tars, place)
    names = [o.path for o in Store(place).objects("data") if o.path.endswith(".tar")]
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    sign = pytest.importorskip("boto3").client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}").generate_presigned_url
    urls = [sign("get_object", {"Bucket": bucket, "Key": f"{prefix}/{name}"}) for name in names]
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    wanted = rows(tars)
    assert len(urls) == 3 and len(found) == len(wanted) == 12
    assert all(row["jpg"] in found[row["key"]].values() for row in wanted)


def test_a_repair_is_published_as_such(s3: Proxy, place: str, folder: Path) -> None:
    """It writes a partition under a new name and leaves the content digest as it was."""
    published(folder, place)
    before = {o.path: o.etag for o in Store(place).objects("data")}
    victim = next(folder.glob("data/000/00005/*.mds"))
    data = bytearray(victim.read_bytes())
    data[40] ^= 1
    victim.write_bytes(data)
    config = fake_stage.FakeConfig(output=str(folder), count=COUNT)
    repaired = repair(folder, Rank(), make=lambda dataset, rank, lenient: fake_stage.Fake(config, rank))
    assert repaired and repaired["content_digest"] == json.loads(contents(place)[SUCCESS])["content_digest"]
    published(folder, place)
    after = {o.path: o.etag for o in Store(place).objects("data")}
    added = after.keys() - before.keys()
    assert added and all(path.startswith("data/000/00005.1/") for path in added)
    assert before.items() <= after.items()
    assert Dataset.open(place).require_success() == repaired
    assert not list(verify(Dataset.open(place)))
    assert rows(place) == rows(folder)
    assert "objects were deleted" in published(folder, place, delete=True)
    assert not [path for path in contents(place) if path.startswith("data/000/00005/")]
    assert rows(place) == rows(folder)
