"""Folders of latents that others wrote, here and elsewhere: shapes that do not fit are errors, never other tensors."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latents.conftest import COUNT

from pipeline.config.schema import ConfigError
from pipeline.loading.latents import build_streaming_latents_dataloader
from pipeline.loading.streaming import RemoteFolder
from pipeline.storage import StorageError

CAPTION = (4, 8)


def write(folder: Path, channels: int = 4, dtype: Any = np.float16, count: int = 10, **options: Any) -> np.ndarray:
    """What micro_diffusion's precompute writes: no manifest, latents of edge 64; returns them (n, c, 8, 8)."""
    streaming = pytest.importorskip("streaming")
    columns = {"caption": "str", "caption_latents": "bytes", "latents_64": "bytes"}
    values = np.arange(count * channels * 64).reshape(count, channels, 8, 8).astype(dtype)
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=6000, **options) as writer:
        for latents in values:
            text = np.zeros(CAPTION, dtype).tobytes()
            writer.write({"caption": "c", "caption_latents": text, "latents_64": latents.tobytes()})
    return values


def build(place: Path, near: bool, **options: Any) -> Any:
    given = {"cap_seq_size": 4, "cap_emb_dim": 8, "shuffle": False, "drop_last": False, **options}
    where = place if near else f"file://{place}"
    return build_streaming_latents_dataloader(where, 4, 64, cache=place.parent / "cache", **given)


both = pytest.mark.parametrize("near", [True, False], ids=["here", "elsewhere"])


@both
@pytest.mark.parametrize("channels", [4, 16])
def test_the_number_of_channels_is_that_of_the_data(tmp_path: Path, near: bool, channels: int) -> None:
    values = write(tmp_path / "mds", channels)
    loader = build(tmp_path / "mds", near)
    images = torch.cat([batch["image_latents"] for batch in loader])
    assert np.array_equal(images.numpy(), values) and len(loader.dataset) == 10
    assert loader.dataset[9]["image_latents"].tolist() == values[9].tolist()
    assert loader.dataset[-1]["caption_latents"].shape == (1, *CAPTION)
    with pytest.raises(IndexError, match="there is no sample 10: the dataset has 10"):
        loader.dataset[10]


@both
def test_shapes_that_do_not_fit_are_errors_that_say_what_would(tmp_path: Path, near: bool) -> None:
    write(tmp_path / "mds")
    for wrong in ({"cap_emb_dim": 16}, {"cap_seq_size": 77, "cap_emb_dim": 1024}, {"dtype": "float32"}):
        with pytest.raises(ConfigError, match="text states have 64 bytes per sample, but .* take"):
            build(tmp_path / "mds", near, **wrong)
    with pytest.raises(ConfigError, match=r"latents_64 has 512 bytes per sample, which is not 16 x 8 x 8 of float16"):
        build(tmp_path / "mds", near, latent_shape=(16, 8, 8))
    assert next(iter(build(tmp_path / "mds", near, latent_shape=(16, 4, 4))))["image_latents"].shape == (4, 16, 4, 4)
    for wrong, message in (
        ({"dtype": "int8"}, "dtype=int8: expected one of float16, float32"),
        ({"latent_shape": (16, 8)}, r"latent_shape=\[16, 8\]: expected 3 numbers"),
        ({"cap_seq_size": 0}, r"caption_shape=\[0, 8\]: expected 2 numbers of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(tmp_path / "mds", near, **wrong)


@both
def test_single_precision_and_autoencoders_of_other_scales_are_read_when_asked_for(tmp_path: Path, near: bool) -> None:
    values = write(tmp_path / "single", dtype=np.float32)
    assert np.array_equal(next(iter(build(tmp_path / "single", near, dtype="float32")))["image_latents"], values[:4])
    with pytest.raises(ConfigError, match="text states have 128 bytes per sample, but 4 x 8 of float16 take 64"):
        build(tmp_path / "single", near)
    write(tmp_path / "deep", channels=2)  # as many bytes as 32 channels at a thirty-second of the edge
    with pytest.raises(ConfigError, match=r"latents_64 has 256 bytes .* say what was stored with latent_shape="):
        build(tmp_path / "deep", near)
    assert next(iter(build(tmp_path / "deep", near, latent_shape=(32, 2, 2))))["image_latents"].shape == (4, 32, 2, 2)


@both
def test_arguments_that_contradict_a_manifest_are_errors(dense: Path, tmp_path: Path, near: bool) -> None:
    ours = {"cap_seq_size": 16, "cap_emb_dim": 64, "image_size": 64, "batch_size": 4, "cache": tmp_path}
    where = dense if near else f"file://{dense}"
    for wrong, message in (
        ({"cap_emb_dim": 32}, "text states are 16 x 64: give cap_seq_size=16 and cap_emb_dim=64"),
        ({"latent_shape": (4, 8, 8)}, r"latents_64 has the shape \(16, 8, 8\): leave latent_shape= out"),
        ({"dtype": "float32"}, "latents are stored as float16: leave dtype= out"),
        ({"image_size": 512}, "image_size=512: .* known: 32, 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_streaming_latents_dataloader(where, **{**ours, **wrong})
    again = build_streaming_latents_dataloader(where, **ours, latent_shape=(16, 8, 8), dtype="float16")
    assert len(again.dataset) == COUNT


@both
def test_a_sample_of_another_size_is_named(tmp_path: Path, near: bool) -> None:
    streaming = pytest.importorskip("streaming")
    columns = {"key": "str", "caption_latents": "bytes", "latents_64": "bytes"}
    with streaming.MDSWriter(out=str(tmp_path / "mds"), columns=columns) as writer:
        for name, size in (("fine", 512), ("odd", 2048)):
            writer.write({"key": name, "caption_latents": bytes(64), "latents_64": bytes(size)})
    with pytest.raises(ValueError, match=r"sample 'odd': latents_64 has 2048 bytes, expected 512 for \(4, 8, 8\)"):
        list(build(tmp_path / "mds", near))


@both
def test_what_is_no_folder_of_latents_is_one_clear_error(tmp_path: Path, near: bool) -> None:
    with pytest.raises(ConfigError, match="not an MDS folder: index.json: No such file"):
        build(tmp_path / "nothing", near)
    folder = tmp_path / "odd"
    folder.mkdir()
    shard = {"column_names": ["a"], "column_sizes": [None], "samples": 1, "zip_data": None, "format": "mds"}
    shard["raw_data"] = {"basename": "../secret", "bytes": 1, "hashes": {}}
    for content, message in (
        ("{", "index.json: not JSON"),
        ("[]", "index.json is not an index of MDS shards"),
        (json.dumps({"shards": []}), "holds no samples"),
        (json.dumps({"shards": [shard]}), r"names the shard '\.\./secret', which is not below the folder"),
        (json.dumps({"shards": [{**shard, "format": "json"}]}), "its shards are json, not mds"),
    ):
        (folder / "index.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            build(folder, near)


# ---- what comes from elsewhere


def shards(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*.mds"))


def test_compressed_shards_are_unpacked_into_the_cache(tmp_path: Path) -> None:
    values = write(tmp_path / "mds", compression="zstd", hashes=["sha1", "xxh3_128"])
    with pytest.raises(ConfigError, match="its shards are compressed: read it as file://"):
        build(tmp_path / "mds", near=True)
    images = torch.cat([batch["image_latents"] for batch in build(tmp_path / "mds", near=False)])
    assert np.array_equal(images.numpy(), values)


@pytest.mark.parametrize("kind", ["sha256", "sha1", "xxh3_128"])
def test_a_changed_byte_elsewhere_is_found(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "mds", hashes=[kind])
    shard = shards(tmp_path / "mds")[0]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        StorageError, match=f"shard.00000.mds: its bytes are not those that index.json has the {kind} of"
    ):
        list(build(tmp_path / "mds", near=False))
    shard.write_bytes(data[:-7])
    with pytest.raises(StorageError, match=r"shard\.00000\.mds has \d+ bytes, but index.json says"):
        list(build(tmp_path / "mds", near=False))
    with pytest.raises(StorageError, match=r"shard\.00000\.mds has \d+ bytes, but index.json says"):
        list(build(tmp_path / "mds", near=True))


def test_what_is_in_the_cache_is_not_fetched_again_but_never_taken_for_other_content(tmp_path: Path) -> None:
    values = write(tmp_path / "mds", hashes=["sha1"])
    list(build(tmp_path / "mds", near=False))
    cached = {path: path.stat().st_ino for path in shards(tmp_path / "cache")}
    assert len(cached) > 1
    hidden = [path.rename(path.with_suffix(".hidden")) for path in shards(tmp_path / "mds")]
    assert np.array_equal(torch.cat([b["image_latents"] for b in build(tmp_path / "mds", near=False)]).numpy(), values)
    for path in hidden:
        path.rename(path.with_suffix(".mds"))
    shutil.rmtree(tmp_path / "mds")
    changed = write(tmp_path / "mds", channels=16, hashes=["sha1"])
    again = torch.cat([batch["image_latents"] for batch in build(tmp_path / "mds", near=False)])
    assert np.array_equal(again.numpy(), changed)


def test_many_readers_of_one_cache_download_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mds", count=40)
    asked: list[str] = []
    download = RemoteFolder._download

    def counted(self: RemoteFolder, name: str, path: Path, size: int = -1) -> None:
        asked.append(name)
        download(self, name, path, size)

    monkeypatch.setattr(RemoteFolder, "_download", counted)
    loaders = [build(tmp_path / "mds", near=False, shuffle=True, rank=rank, world_size=4) for rank in range(4)]
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda loader: sum(len(batch["image_latents"]) for batch in loader), loaders))
    wanted = [name for name in asked if name.endswith(".mds")]
    assert counts == [10] * 4 and len(wanted) == len(set(wanted)) == len(shards(tmp_path / "mds"))
    assert [path.name for path in (tmp_path / "cache").rglob(".*")] == [".locks"]


def test_a_place_that_cannot_be_reached_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(remote: str, path: Path, size: int) -> None:
        raise RuntimeError("the network is down\nand more")

    monkeypatch.setattr("pipeline.loading.streaming._bring", unreachable)
    with pytest.raises(StorageError, match=r"manifest.json cannot be downloaded \(RuntimeError: the network is down\)"):
        build(tmp_path, near=False)


def test_ranks_are_those_of_the_time_when_an_epoch_begins(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    loader = build_streaming_latents_dataloader(dense, 4, 64, 16, 64, drop_last=False)
    assert len(loader) == 12
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert len(loader) == 4 and loader.place() == (1, 3)
    assert sum(len(batch["image_latents"]) for batch in loader) in (15, 16)
