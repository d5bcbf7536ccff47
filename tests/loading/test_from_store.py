"""Training data in an object store: the samples of a local folder, in a cache of bounded size, fetched once."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latents.conftest import COUNT, Make, make  # noqa: F401 - a fixture
from object_stores import Proxy
from stages.conftest import run_stage

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, PublishConfig, TrainConfig
from pipeline.distributed import Rank
from pipeline.loading import Loader, Sampler, ShardLocal, epoch_slots, latent_loader
from pipeline.loading.latents import LatentLoader, build_streaming_latents_dataloader
from pipeline.loading.reader import Reader
from pipeline.loading.sampler import Epochs
from pipeline.stages import train
from pipeline.stages.publish import publish
from pipeline.storage import StorageError
from pipeline.stores import Store


@pytest.fixture
def folder(make: Make) -> Path:  # noqa: F811
    """One sample in each shard."""
    return make("small_shards", shard_bytes=4_096).root.path


def published(folder: Path, place: str) -> str:
    publish(build(PublishConfig, {"input": str(folder), "to": place}), Rank())
    return place


def loader(place: str | Path, cache: Path, **options: Any) -> LatentLoader:
    settings = {"cap_seq_size": 16, "cap_emb_dim": 64, "drop_last": False, "cache": cache, **options}
    return build_streaming_latents_dataloader(place, 4, 64, **settings)


def samples(batches: Any) -> list[bytes]:
    return [image.numpy().tobytes() for batch in batches for image in batch["image_latents"]]


def shards(folder: Path) -> dict[str, int]:
    index = json.loads((folder / "index.json").read_text())
    return {shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in index["shards"]}


def fetched(s3: Proxy, place: str) -> list[str]:
    """Shards that were fetched from ``place``: a loader of another test may still be fetching ahead."""
    return [line for line in s3.paths if line.startswith(f"GET /{place[5:]}/") and line.endswith(".mds")]


def test_a_store_gives_the_samples_of_the_folder(s3: Proxy, place: str, folder: Path, tmp_path: Path) -> None:
    published(folder, place)
    local = samples(loader(folder, tmp_path, shuffle=False))
    assert samples(loader(place, tmp_path / "cache", shuffle=False)) == local
    shuffled = samples(loader(place, tmp_path / "cache", seed=3))
    assert shuffled != local and sorted(shuffled) == sorted(local)


def test_the_cache_never_holds_more_than_it_may(
    s3: Proxy, place: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (epoch_slots, latent_loader):
        monkeypatch.setattr(module, "MIXED", 4)
    published(folder, place)
    sizes = shards(folder)
    largest = max(sizes.values())
    assert len(sizes) > 36
    with pytest.raises(ConfigError, match=rf"cache_limit={20 * largest}: .*shuffled within 8 shards.*needs \d+ bytes"):
        loader(place, tmp_path / "cache", cache_limit=20 * largest)
    limit = 28 * largest
    near = sorted(samples(loader(folder, tmp_path)))
    held: list[int] = []
    mine = loader(place, tmp_path / "cache", cache_limit=limit)
    for _ in range(2):
        seen = []
        for batch in mine:
            seen += samples([batch])
            held.append(sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file()))
        assert sorted(seen) == near
    assert max(held) <= limit < sum(sizes.values())
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert sum(".mds (deleted)" in line for line in maps) <= 8  # evicted shards are let go


def test_ranks_of_a_node_fetch_each_shard_once(s3: Proxy, place: str, folder: Path, tmp_path: Path) -> None:
    published(folder, place)
    s3.paths.clear()
    ranks = [loader(place, tmp_path / "cache", rank=rank, world_size=3, seed=1) for rank in range(3)]
    with ThreadPoolExecutor(3) as threads:
        seen = [sample for some in threads.map(samples, ranks) for sample in some]
    assert sorted(seen) == sorted(samples(loader(folder, tmp_path)))
    assert len(fetched(s3, place)) == len(set(fetched(s3, place))) == len(shards(folder))


def test_a_state_is_gone_on_with_exactly_by_other_ranks(s3: Proxy, place: str, folder: Path, tmp_path: Path) -> None:
    published(folder, place)
    whole = samples(loader(place, tmp_path / "cache", seed=5))
    first = loader(place, tmp_path / "cache", seed=5)
    batches = iter(first)
    before = [next(batches) for _ in range(3)]
    state = first.state_dict()
    rest = []
    for rank in range(2):
        other = loader(place, tmp_path / "other", seed=5, rank=rank, world_size=2)
        other.load_state_dict(state)
        rest += samples(other)
    assert samples(before) == whole[:12] and sorted(rest) == sorted(whole[12:])
    with pytest.raises(ValueError, match="this loader order="):
        loader(folder, tmp_path, seed=5).load_state_dict(state)


def test_shards_are_there_before_they_are_needed_and_the_log_tells_of_waits(
    s3: Proxy, place: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published(folder, place)
    mine = loader(place, tmp_path / "cache")
    batches = iter(mine)
    next(batches)
    deadline = time.monotonic() + 60
    while len(set(fetched(s3, place))) < len(shards(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(fetched(s3, place)) >= {
        f"GET /{place[5:]}/{name}" for name in shards(folder)
    }  # after one batch of twelve
    with caplog.at_level(logging.INFO, "pipeline"):
        list(batches)
    assert mine.waited > 0 and any("s waited for data" in record.message for record in caplog.records)


@pytest.mark.parametrize("kind", ["busy", "reset", "truncated"])
def test_faults_on_the_way_lose_nothing(s3: Proxy, place: str, folder: Path, tmp_path: Path, kind: str) -> None:
    from object_stores import random_faults

    published(folder, place)
    s3.fault = random_faults(2, 0.2, (kind,))
    assert sorted(samples(loader(place, tmp_path / "cache"))) == sorted(samples(loader(folder, tmp_path)))
    assert s3.broken[kind] > 5


def test_a_changed_byte_in_the_store_is_found(s3: Proxy, place: str, folder: Path, tmp_path: Path) -> None:
    published(folder, place)
    name = sorted(shards(folder))[20]
    data = bytearray(Store(place).read(name))
    data[-1] ^= 1
    Store(place).put(name, bytes(data))
    with pytest.raises(StorageError, match=rf"{name}: its bytes are not those that index.json has the xxh3_128 of"):
        list(loader(place, tmp_path / "cache"))


def test_training_reads_from_a_store(s3: Proxy, place: str, folder: Path, tmp_path: Path) -> None:
    """The log says what share of the time it waited for data; a run from a filled cache learns the same. Both take all
    samples: shards that are not needed may still be on their way when a run ends."""
    published(folder, place)
    losses = []
    for name in ("empty", "filled"):
        given = {"task": "diffuse", "input": place, "steps": 3, "batch_size": 16, "log_every": 1, "threads": 1}
        output = tmp_path / name
        train.main(build(TrainConfig, {**given, "output": str(output), "cache": str(tmp_path / "cache")}))
        lines = [json.loads(line) for line in (output / "logs/training_log.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert len(steps) == 3 and all("data_wait" in line for line in steps)
        losses.append([line["loss"] for line in steps])
    assert losses[0] == losses[1]
    assert len(fetched(s3, place)) == len(set(fetched(s3, place))) == len(shards(folder))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    drawn = {"source": "shapes", "count": 30, "image_size": 32, "holdout": False, "partition_size": 5}
    run_stage("download", **drawn, output=str(tmp_path / "raw"))
    return tmp_path / "raw"


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_from_a_store_in_any_process(s3: Proxy, place: str, photos: Path, workers: int) -> None:
    published(photos, place)
    near, far = Reader(photos, output="array"), Reader(place, output="array")
    assert far.row(7) == near.row(7)  # so that the client is in use when workers are forked
    sampler = Sampler(30, 5, seed=1, stream=Epochs(30, 1, ShardLocal(near.access.dataset.starts, 2)), epochs=1)
    options = {"multiprocessing_context": "fork"} if workers else {}
    seen = list(Loader(far, sampler, num_workers=workers, collate_fn=list, **options))
    order = [int(p) for b in range(6) for p in sampler._stream.samples(b * 5 + np.arange(5))]
    assert len(order) == 30
    for position, (image, target) in zip(order, (pair for batch in seen for pair in batch), strict=True):
        wanted = near[position]
        assert np.array_equal(image, wanted[0]) and target == wanted[1]


def test_files_of_images_come_before_they_are_needed(s3: Proxy, place: str, photos: Path) -> None:
    published(photos, place)
    far = Reader(place, output="bytes")
    s3.paths.clear()
    batches = iter(Loader(far, Sampler(30, 5, seed=1, epochs=1), collate_fn=list))
    next(batches)
    deadline = time.monotonic() + 60
    data = {f"GET /{place[5:]}/{o.path}" for o in Store(place).objects("data") if o.path.endswith(".mds")}
    while not data <= set(s3.paths) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert data <= set(s3.paths)
