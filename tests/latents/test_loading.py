"""Loading latents: what is stored comes back, once per epoch, on any number of ranks, wherever it was stopped."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latents.conftest import COUNT, Make
from stages.conftest import run_stage

from pipeline.config.schema import ConfigError
from pipeline.loading.latents import (
    LatentFolder,
    LatentLoader,
    Layout,
    Slots,
    TrainingLatents,
    build_streaming_latents_dataloader,
)
from pipeline.loading.shm_cleanup import remove_stale
from pipeline.partitions.dataset import RandomAccess

TEXT = {"cap_seq_size": 16, "cap_emb_dim": 64}


def build(place: Any, batch_size: int = 8, image_size: int = 64, **options: Any) -> LatentLoader:
    loader: LatentLoader = build_streaming_latents_dataloader(place, batch_size, image_size, **(TEXT | options))
    return loader


def identities(loader: LatentLoader, batches: list[dict[str, torch.Tensor]]) -> list[bytes]:
    return [image.numpy().tobytes() for batch in batches for image in batch["image_latents"]]


def test_batches_hold_what_is_stored(make: Make) -> None:
    dataset = make("dense")
    rows = RandomAccess(dataset).rows(range(COUNT))
    batches = list(build(dataset.root.path, shuffle=False, drop_last=False))
    assert [len(batch["image_latents"]) for batch in batches] == [8] * 5 + [7]
    first = batches[0]
    assert first["image_latents"].shape == (8, 16, 8, 8) and first["image_latents"].dtype == torch.float16
    assert first["caption_latents"].shape == (8, 1, 16, 64) and first["caption_latents"].dtype == torch.float16
    assert first["drop_caption_mask"].tolist() == [1.0] * 8
    images = torch.cat([batch["image_latents"] for batch in batches])
    texts = torch.cat([batch["caption_latents"] for batch in batches])
    for row, image, text in zip(rows, images, texts, strict=True):
        assert image.numpy().tobytes() == row["latents_64"] and text.numpy().tobytes() == row["caption_latents"]


@pytest.mark.parametrize(("storage", "most"), [("dense", 0.0005), ("int8", 0.01), ("fp8", 0.04)])
def test_image_features_come_with_their_latents(make: Make, storage: str, most: float) -> None:
    features = {"image_features": "embedded", "features_storage": storage, "save_dtype": "float16"}
    place = make(f"features-{storage}", **features).root.path
    exact = make("features-exact", image_features="embedded", save_dtype="float32")
    batch = next(iter(build(place, 47, image_features=True)))
    expected = next(iter(build(exact.root.path, 47, image_features=True)))["image_features"]
    assert batch["image_features"].shape == (47, 16, 192) and batch["image_features"].dtype == torch.float16
    assert expected.dtype == torch.float32
    error = float((batch["image_features"].float() - expected).norm() / expected.norm())
    assert error < most
    assert "image_features" not in next(iter(build(place)))
    row = RandomAccess(exact).rows([5])[0]
    one = build(exact.root.path, image_size=32, image_features=True).dataset[5]["image_features"]
    assert one.shape == (4, 192) and one.numpy().tobytes() == row["image_features_32"]


def test_image_features_that_are_not_there_or_not_alike_are_refused(make: Make, dense: Path) -> None:
    place = make("features-dense", image_features="embedded").root.path
    with pytest.raises(ConfigError, match=r"dense: its latents were made without image_features="):
        build([place, dense], image_features=True)
    finer = make("features-finer", image_features="embedded", features_resolution=(32, 64)).root.path
    with pytest.raises(ConfigError, match=r"finer: its image features have edge 64, not 32 as in .*features-dense"):
        build([place, finer], image_features=True)
    for wrong in ((32,), (20, 32)):
        with pytest.raises(ConfigError, match=r"features_resolution=.*: give a multiple of 8, the edge of a patch of"):
            make(f"features-{wrong}", image_features="embedded", features_resolution=wrong)


RAGGED = ["ragged", "ragged+dedup", "int8+ragged", "fp8+ragged+dedup"]


@pytest.mark.parametrize("storage", ["dedup", "int8", "fp8", "int8+dedup", *RAGGED])
def test_how_captions_are_stored_does_not_show(make: Make, dense: Path, storage: str) -> None:
    place = make(storage, text_storage=storage).root.path
    plain = next(iter(build(dense, 47)))
    other = next(iter(build(place, 47)))
    assert torch.equal(plain["image_latents"], other["image_latents"])
    if storage in ("dedup", "ragged", "ragged+dedup"):
        assert torch.equal(plain["caption_latents"], other["caption_latents"])
    torch.testing.assert_close(plain["caption_latents"].float(), other["caption_latents"].float(), rtol=0.07, atol=0.02)


@pytest.mark.parametrize("storage", RAGGED)
def test_ragged_captions_come_with_a_mask(make: Make, dense: Path, storage: str) -> None:
    """Hashed words are never zero, and the embedded encoder's padding always is."""
    plain, place = next(iter(build(dense, 47))), make(storage, text_storage=storage).root.path
    batch = next(iter(build(place, 47)))
    assert torch.equal(batch["caption_mask"], plain["caption_latents"][:, 0].any(2))
    mixed = next(iter(build([dense, place], 94)))  # a folder without padding, and one with
    assert sorted(mixed["caption_mask"].sum(1).tolist()) == sorted(batch["caption_mask"].sum(1).tolist() + [16] * 47)
    assert LatentFolder(place).tokens([0, 5]).dtype == np.int64


def test_ragged_captions_take_fewer_bytes(make: Make, dense: Path) -> None:
    def size(place: Path) -> int:
        return sum(path.stat().st_size for path in place.glob("data/*/*/*.mds"))

    place = make("ragged", text_storage="ragged").root.path
    padding = int((~next(iter(build(place, 47)))["caption_mask"]).sum())
    assert abs(size(dense) - size(place) - padding * 64 * 2) < COUNT * 8 + 1000


def test_deduplication_saves_what_comes_again(make: Make, dense: Path) -> None:
    def size(place: Path) -> int:
        return sum(path.stat().st_size for path in place.glob("data/*/*/*.mds"))

    saved = size(dense) - size(make("dedup", text_storage="dedup").root.path)
    folder = LatentFolder(make("dedup", text_storage="dedup").root.path)
    again = sum(
        spans["caption_latents"][0] == spans["caption_latents"][1] for _, spans in map(folder._spans, range(COUNT))
    )
    assert again > 0 and abs(saved - again * 16 * 64 * 2) < COUNT * 8 + 1000


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(dense: Path) -> None:
    loader = build(dense, 6, drop_last=False)
    assert len(loader) == 8
    one, two = (identities(loader, list(loader)) for _ in range(2))
    assert len(one) == COUNT and Counter(one) == Counter(two) and one != two
    assert identities(loader, list(build(dense, 6))) == one[:42]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resuming_on_other_ranks_goes_on_just_there(dense: Path, ranks: int) -> None:
    def taken(batch_size: int, rank: int, world_size: int, state: dict[str, int] | None, most: int) -> list[bytes]:
        loader = build(dense, batch_size, drop_last=False, rank=rank, world_size=world_size, seed=3)
        if state:
            loader.load_state_dict(state)
        batches = [batch for _, batch in zip(range(most), loader, strict=False)]
        states.append(loader.state_dict())
        return identities(loader, batches)

    states: list[dict[str, int]] = []
    before = taken(3, 0, 2, None, 3) + taken(3, 1, 2, None, 3)
    assert states[0] == states[1] == {"seed": 3, "samples": COUNT, "epoch": 0, "position": 18}
    after = [key for rank in range(ranks) for key in taken(4, rank, ranks, states[0], 99)]
    assert len(before) == 18 and len(after) == COUNT - 18
    assert len(set(before + after)) == COUNT
    assert states[-1]["epoch"] == 1 and states[-1]["position"] == 0


def test_a_state_of_other_data_is_refused(dense: Path) -> None:
    with pytest.raises(ValueError, match="the state has seed=1, this loader seed=0"):
        build(dense).load_state_dict({"seed": 1, "samples": COUNT, "epoch": 0, "position": 0})


def test_captions_are_hidden_by_slot_not_by_rank(dense: Path) -> None:
    def masks(rank: int, world_size: int, batch_size: int) -> list[float]:
        loader = build(dense, batch_size, cap_drop_prob=0.5, drop_last=False, rank=rank, world_size=world_size)
        return [float(value) for batch in loader for value in batch["drop_caption_mask"]]

    whole = masks(0, 1, 47)
    assert set(whole) == {0.0, 1.0} and 10 < sum(whole) < 37
    assert masks(0, 2, 24) + masks(1, 2, 24) == whole


def test_weights_are_kept_in_every_block_and_each_folder_is_gone_through_in_rounds() -> None:
    mixture = Slots((50, 2000, 10), 0, True, (0.2, 0.5, 0.3))
    slots = np.arange(1024 * 5)
    folders, positions = mixture.samples(0, slots)
    for block in folders.reshape(5, 1024):
        assert np.abs(np.bincount(block) - np.array([204.8, 512, 307.2])).max() <= 1
    seen = Counter(positions[folders == 0].tolist())
    assert set(seen) == set(range(50)) and max(seen.values()) - min(seen.values()) <= 1 + 1
    again = mixture.samples(0, slots[100:200])
    assert np.array_equal(again[0], folders[100:200]) and np.array_equal(again[1], positions[100:200])
    later = mixture.samples(1, slots[:10])
    assert np.array_equal(later[0], mixture.samples(0, slots[:10] + len(mixture))[0])


def test_folders_are_mixed(make: Make, dense: Path) -> None:
    packed = make("int8", text_storage="int8").root.path
    both = build([dense, packed], 10, drop_last=False)
    assert sum(len(batch["image_latents"]) for batch in both) == 2 * COUNT
    weighted = build([dense, packed], 10, weights=[3, 1])
    assert sum(len(batch["image_latents"]) for batch in weighted) == 90


def test_moments_are_drawn_anew_each_epoch(make: Make) -> None:
    dataset = make("moments", latent="moments")
    folder = LatentFolder(dataset.root.path)
    assert folder.layout.shapes["latents_64"] == (32, 8, 8)
    assert next(iter(build(folder.path, 4)))["image_latents"].shape == (4, 16, 8, 8)
    wide = Layout({"latents_8": (2, 4, 4)}, latent="moments")
    raw = torch.cat([torch.zeros(5, 1, 4, 4), torch.ones(5, 1, 4, 4)], 1).half().flatten(1).view(torch.uint8)
    noise = torch.randn(5, 1, 4, 4)
    torch.testing.assert_close(wide.image(raw, "latents_8", noise), noise.half())


def test_training_reads_latents_in_single_precision_and_texts_as_they_are_stored(make: Make) -> None:
    data = TrainingLatents(LatentFolder(make("int8", text_storage="int8").root.path), 32)
    batch = data.batch(np.array([46, 0, 46]))
    assert len(data) == COUNT and data.image_shape == (16, 4, 4)
    assert batch["image_latents"].shape == (3, 16, 4, 4) and batch["image_latents"].dtype == torch.float32
    assert batch["caption_latents"].shape == (3, 16, 64) and batch["caption_latents"].dtype == torch.float16
    assert torch.equal(batch["image_latents"][0], batch["image_latents"][2])


def test_wrong_requests_are_one_clear_error(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size=512: .*/dense has known: 32, 64"):
        build(dense, image_size=512)
    with pytest.raises(ConfigError, match="text states are 16 x 64: give cap_seq_size=16 and cap_emb_dim=64"):
        build(dense, cap_seq_size=77, cap_emb_dim=1024)
    with pytest.raises(ConfigError, match=r"weights=\[1\]: give a positive one for each of 2 folders"):
        build([dense, dense], weights=[1])
    with pytest.raises(ConfigError, match="not an MDS folder: index.json: No such file"):
        build(tmp_path)
    run_stage("download", source="shapes", count=5, image_size=16, output=str(tmp_path / "raw"))
    with pytest.raises(ConfigError, match="holds no latents: it was made by stage=download"):
        build(tmp_path / "raw")


def test_bytes_of_another_size_name_the_sample(dense: Path) -> None:
    folder = LatentFolder(dense)
    folder.layout = Layout({"latents_64": (4, 8, 8)})
    with pytest.raises(ValueError, match=r"sample '\S+': latents_64 has 2048 bytes, expected 512 for \(4, 8, 8\)"):
        folder.read([5], ["latents_64"])


def test_folders_of_other_writers_can_be_read(tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    columns = {"caption": "str", "caption_latents": "bytes", "latents_64": "bytes"}
    values = np.arange(20 * 256, dtype=np.float16).reshape(20, 256)
    with streaming.MDSWriter(out=str(tmp_path / "mds"), columns=columns, size_limit=4000) as writer:
        for row in values:
            writer.write({"caption": "é", "caption_latents": row[:32].tobytes(), "latents_64": row.tobytes()})
    loader = build(tmp_path / "mds", 20, cap_seq_size=4, cap_emb_dim=8, shuffle=False)
    batch = next(iter(loader))
    assert batch["image_latents"].flatten(1).numpy().tolist() == values.tolist()
    assert batch["caption_latents"].shape == (20, 1, 4, 8)


_CRASH = """
import os, signal, sys
from pipeline.loading.latents import build_streaming_latents_dataloader
loader = build_streaming_latents_dataloader(sys.argv[1], 4, 64, 16, 64, cache=sys.argv[2])
next(iter(loader))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_streaming_from_elsewhere_gives_the_same_and_survives_a_crash(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("streaming")
    place = make("int8+dedup", text_storage="int8+dedup").root.path
    remote = f"file://{place}"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    crashed = subprocess.run(
        [sys.executable, "-c", _CRASH, remote, str(tmp_path)],
        capture_output=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert crashed.returncode == -signal.SIGKILL, crashed.stderr.decode()
    loader = build_streaming_latents_dataloader(remote, 10, 64, **TEXT, shuffle=False, drop_last=False, cache=tmp_path)
    batches = list(loader)
    here = list(build(place, 10, shuffle=False, drop_last=False))
    for one, other in zip(batches, here, strict=True):
        assert torch.equal(one["image_latents"], other["image_latents"])
        assert torch.equal(one["caption_latents"], other["caption_latents"])
    with pytest.raises(ConfigError, match="image_size=128: .* known: 32, 64"):
        build_streaming_latents_dataloader(remote, 10, 128, **TEXT, cache=tmp_path)


_ALIVE = """
import sys
from pipeline.loading.latents import build_streaming_latents_dataloader
loader = build_streaming_latents_dataloader(sys.argv[1], 4, 64, 16, 64, cache=sys.argv[2], drop_last=False)
batches = iter(loader)
count = len(next(batches)["image_latents"])
print("started", flush=True)
sys.stdin.readline()
print(count + sum(len(batch["image_latents"]) for batch in batches))
"""


def test_a_job_that_lives_is_not_disturbed(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("streaming")
    remote = f"file://{make('int8+dedup', text_storage='int8+dedup').root.path}"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with subprocess.Popen(
        [sys.executable, "-c", _ALIVE, remote, str(tmp_path / "theirs")],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        assert job.stdin and job.stdout and job.stdout.readline() == "started\n"
        for _ in range(2):
            ours = build_streaming_latents_dataloader(remote, 4, 64, **TEXT, cache=tmp_path / "ours", drop_last=False)
            assert sum(len(batch["image_latents"]) for batch in ours) == COUNT
        rest, _ = job.communicate("go on\n", timeout=300)
    assert job.returncode == 0 and rest == f"{COUNT}\n"


def test_streamed_moments_are_drawn_anew_each_epoch_and_in_each_run_alike(tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    columns = {"caption_latents": "bytes", "latents_64": "bytes"}
    moments = np.concatenate([np.zeros((4, 8, 8)), np.ones((4, 8, 8))]).astype(np.float16)
    with streaming.MDSWriter(out=str(tmp_path / "remote"), columns=columns) as writer:
        for _ in range(12):
            writer.write({"caption_latents": bytes(2 * 16 * 64), "latents_64": moments.tobytes()})
    shapes = {"latents_64": [8, 8, 8], "caption_latents": [16, 64]}
    manifest = {"shapes": shapes, "dtype": "float16", "latent": "moments"}
    (tmp_path / "remote/manifest.json").write_text(json.dumps(manifest))
    runs = []
    for _ in range(2):
        place = f"file://{tmp_path}/remote"
        loader = build_streaming_latents_dataloader(place, 4, 64, **TEXT, shuffle=False, cache=tmp_path / "cache")
        runs.append([torch.cat([batch["image_latents"] for batch in loader]) for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1]) and runs[0][0].float().std() == pytest.approx(1, abs=0.05)


def test_shared_memory_is_stale_when_nobody_has_it_mapped(tmp_path: Path) -> None:
    for name in ("000000_locals", "000000_barrier", "000001_locals", "000001_barrier", "000002_mine", "other"):
        (tmp_path / name).write_bytes(bytes(4096))
    with (tmp_path / "000001_barrier").open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_stale(["locals", "barrier"], tmp_path) == ["000000_barrier", "000000_locals"]
    assert remove_stale(["locals", "barrier"], tmp_path) == ["000001_barrier", "000001_locals"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002_mine", "other"]
