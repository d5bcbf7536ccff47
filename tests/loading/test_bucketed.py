"""Batches of latents in buckets: one shape for all ranks in a step, every sample once, from any state on any ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latents.test_buckets import COUNT, rows_of, scenes, sound
from stages.conftest import run_stage

from pipeline.config.schema import ConfigError
from pipeline.latents.loading import build_streaming_latents_dataloader
from pipeline.loading.bucketed import BucketMajor, BucketSampler, BucketSlots
from pipeline.loading.latents import BucketLoader, LatentLoader
from pipeline.partitions.bucket_index import BucketIndex

__all__ = ["scenes", "sound"]  # fixtures
ENDLESS = 10_000


def build(place: Any, batch_size: int = 4, **options: Any) -> LatentLoader:
    given = {"image_size": 64, "cap_seq_size": 16, "cap_emb_dim": 64, "buckets": True, **options}
    return build_streaming_latents_dataloader(place, batch_size, **given)


def by_latents(place: Path, column: str = "latents_64") -> dict[bytes, str]:
    """Keys of samples by the bytes of their latents."""
    return {row[column]: row["key"] for row in rows_of(place)}


def keys_of(batch: dict[str, torch.Tensor], known: dict[bytes, str]) -> list[str]:
    return [known[latents.numpy().tobytes()] for latents in batch["image_latents"]]


def epoch_of(loaders: list[LatentLoader], known: dict[bytes, str]) -> list[list[list[str]]]:
    """The keys of each rank's batches, by step; all ranks have the same shape in a step."""
    steps = list(zip(*loaders, strict=True))
    for batches in steps:
        assert len({batch["image_latents"].shape[1:] for batch in batches}) == 1
    return [[keys_of(batch, known) for batch in batches] for batches in steps]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_each_sample_comes_once_an_epoch_in_batches_of_one_shape(sound: Path, ranks: int, drop_last: bool) -> None:
    known = by_latents(sound)
    loaders = [build(sound, drop_last=drop_last, rank=rank, world_size=ranks) for rank in range(ranks)]
    epochs = [epoch_of(loaders, known) for _ in range(2)]
    for steps in epochs:
        seen = Counter(key for step in steps for keys in step for key in keys)
        assert set(seen.values()) == {1} and len(steps) == len(loaders[0])
        if drop_last:
            assert {len(keys) for step in steps for keys in step} == {4}
            counts = Counter((row["height_64"], row["width_64"]) for row in rows_of(sound))
            assert len(seen) == sum(count // (4 * ranks) * 4 * ranks for count in counts.values())
        else:
            assert len(seen) == COUNT
            assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in steps)
    assert epochs[0] != epochs[1] and len({len(step[0]) for step in epochs[0]}) >= 1


def test_shapes_are_mixed_over_the_epoch(sound: Path) -> None:
    shapes = [tuple(batch["image_latents"].shape[2:]) for batch in build(sound, 1)]
    assert len(set(shapes)) == 3
    for shape in set(shapes):
        places = [place for place, other in enumerate(shapes) if other == shape]
        assert min(places) < 20 and max(places) > 26


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 2)])
def test_a_state_goes_on_on_any_number_of_ranks(sound: Path, before: int, after: int) -> None:
    known = by_latents(sound)
    first = [build(sound, 2, drop_last=False, seed=3, rank=rank, world_size=before) for rank in range(before)]
    iterators = [iter(loader) for loader in first]
    seen = [key for _ in range(4) for iterator in iterators for key in keys_of(next(iterator), known)]
    states = [loader.state_dict() for loader in first]
    assert all(state == states[0] for state in states) and sum(states[0]["position"]) == len(seen)
    then = [build(sound, 2, drop_last=False, seed=3, rank=rank, world_size=after) for rank in range(after)]
    for loader in then:
        loader.load_state_dict(states[0])
    rest = epoch_of(then, known)
    seen += [key for step in rest for keys in step for key in keys]
    assert sorted(seen) == sorted(known.values())
    if before == after:
        whole = [build(sound, 2, drop_last=False, seed=3, rank=rank, world_size=after) for rank in range(after)]
        assert epoch_of(whole, known)[4:] == rest
    assert all(loader.epoch == 1 and not any(loader.state_dict()["position"]) for loader in then)


def test_a_state_of_another_order_is_refused(sound: Path) -> None:
    state = build(sound).state_dict()
    with pytest.raises(ValueError, match="cannot resume: the state has order=buckets"):
        build([sound, sound], weights=[1, 2]).load_state_dict({**state, "samples": 2 * COUNT})
    with pytest.raises(ValueError, match="cannot resume"):
        build(sound, seed=1).load_state_dict(state)


def test_equal_tokens_mean_more_samples_of_smaller_buckets(scenes: Path, tmp_path: Path) -> None:
    settings = {"vae": "embedded", "aspect": "buckets", "bucket_step": 16, "bucket_upscale": "smaller"}
    run_stage("precompute", input=str(scenes), output=str(tmp_path), image_resolutions=(64,), **settings)
    loader = build(tmp_path, 2, balance="tokens", drop_last=False)
    assert isinstance(loader, BucketLoader) and isinstance(loader.slots, BucketSlots)
    sizes = [loader.batch_size_of(bucket) for bucket in range(len(loader.slots.sizes))]
    pixels = [height * width for height, width in loader.slots.sizes]
    assert len(set(sizes)) > 1 and all(size * area <= 2 * 64**2 for size, area in zip(sizes, pixels, strict=True))
    most = dict(zip(loader.slots.sizes, sizes, strict=True))
    batches = list(loader)
    assert sum(len(batch["image_latents"]) for batch in batches) == COUNT
    for batch in batches:
        height, width = batch["image_latents"].shape[2:]
        assert len(batch["image_latents"]) <= most[(8 * height, 8 * width)]


def test_folders_are_mixed_by_weight_and_squares_are_one_bucket(scenes: Path, sound: Path, tmp_path: Path) -> None:
    run_stage("precompute", input=str(scenes), output=str(tmp_path), vae="embedded", image_resolutions=(64,))
    square, buckets = set(by_latents(tmp_path)), set(by_latents(sound))
    loader = build([sound, tmp_path], 1, weights=[3, 1])
    counts: Counter[str] = Counter()
    shapes: Counter[tuple[int, ...]] = Counter()
    for _ in range(20):
        for batch in loader:
            data = batch["image_latents"][0].numpy().tobytes()
            assert (data in square) or (data in buckets)
            counts["square" if data in square and data not in buckets else "buckets"] += 1
            shapes[tuple(batch["image_latents"].shape[2:])] += 1
    total = sum(counts.values())
    both = len(square & buckets) / COUNT  # a square scene has the same latents in both
    assert counts["square"] / total == pytest.approx((1 - both) / 4, abs=0.02)
    assert len(shapes) == 3 and total == 20 * 2 * COUNT


def test_hidden_captions_and_size_conditions_come_with_the_batch(sound: Path) -> None:
    known, rows = by_latents(sound), {row["key"]: row for row in rows_of(sound)}
    hidden = 0
    for batch in build(sound, cap_drop_prob=0.5, size_conditions=True, drop_last=False):
        hidden += int((batch["drop_caption_mask"] == 0).sum())
        for key, told in zip(keys_of(batch, known), batch["size_conditions"].tolist(), strict=True):
            row = rows[key]
            cut = [row[f"{name}_64"] for name in ("crop_top", "crop_left", "height", "width")]
            assert told == [row["original_height"], row["original_width"], *cut]
    assert 10 < hidden < COUNT - 10


def test_moments_are_drawn_anew_in_every_epoch(scenes: Path, tmp_path: Path) -> None:
    settings = {"vae": "embedded", "aspect": "buckets", "bucket_step": 16, "latent": "moments"}
    run_stage("precompute", input=str(scenes), output=str(tmp_path), image_resolutions=(64,), **settings)
    batches = list(build(tmp_path, drop_last=False))
    assert {tuple(batch["image_latents"].shape[1:]) for batch in batches} == {(4, 8, 8), (4, 6, 10), (4, 10, 6)}


def test_single_samples_have_their_own_shape(sound: Path) -> None:
    dataset = build(sound).dataset
    for position, row in enumerate(rows_of(sound)):
        assert dataset[position]["image_latents"].shape == (4, row["height_64"] // 8, row["width_64"] // 8)


def test_latents_in_buckets_are_not_taken_for_squares(sound: Path) -> None:
    with pytest.raises(ConfigError, match="its latents have several shapes: give buckets=True"):
        build(sound, buckets=False)
    with pytest.raises(ConfigError, match="balance=token"):
        build(sound, balance="token")


def test_a_sample_in_another_bucket_than_the_index_says_is_an_error(sound: Path) -> None:
    folder = build(sound).dataset.folders[0]
    index = folder.bucket_index("latents_64")
    with pytest.raises(ValueError, match=r"sample 'shapes/\d+': latents_64 is in the bucket .* but buckets.parquet"):
        folder.read([0], ["latents_64"], index.sizes[-1])


# ---- plans without data


def index_of(runs: list[tuple[int, int]]) -> BucketIndex:
    """Of runs (bucket, samples)."""
    owners, counts = np.array(runs).T
    sizes = tuple((64, 64 * (n + 1)) for n in range(int(owners.max()) + 1))
    return BucketIndex(sizes, np.concatenate([[0], np.cumsum(counts)]), owners.astype(np.int32))


INDEX = index_of([(0, 5), (2, 9), (0, 1), (1, 40), (2, 20), (0, 25)])


def test_samples_are_numbered_bucket_by_bucket() -> None:
    order = BucketMajor(INDEX)
    assert order.starts.tolist() == [0, 31, 71, 100]
    positions = order.positions(np.arange(100)).tolist()
    assert positions == [*range(5), 14, *range(75, 100), *range(15, 55), *range(5, 14), *range(55, 75)]
    assert [INDEX.size_at(position) for position in positions] == [order.size_of(np.array([n])) for n in range(100)]
    with pytest.raises(ValueError, match="samples of 2 buckets cannot form a batch"):
        order.size_of(np.array([30, 31]))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_any_steps_take_each_sample_once(shuffle: bool, blocks: bool) -> None:
    slots = BucketSlots((INDEX, INDEX), 5, shuffle, (), blocks)
    for epoch in range(3):
        taken, seen = np.zeros(3, np.int64), []
        while (bucket := slots.choose(epoch, taken, np.ones(3, np.int64))) is not None:
            count = min(7 + int(taken.sum()) % 3, int(slots.quotas[bucket] - taken[bucket]))
            folders, positions = slots.samples(epoch, bucket, taken[bucket] + np.arange(count))
            assert {INDEX.size_at(position) for position in positions.tolist()} == {slots.sizes[bucket]}
            seen += list(zip(folders.tolist(), positions.tolist(), strict=True))
            taken[bucket] += count
        assert sorted(seen) == [(folder, position) for folder in range(2) for position in range(100)]


def test_training_gives_every_bucket_its_share_and_every_sample_its_turn() -> None:
    starts = BucketMajor(INDEX).starts
    ranks = [BucketSampler(starts, 8, 1, rank, 2) for rank in range(2)]
    seen: Counter[int] = Counter()
    buckets = []
    for _ in range(250):  # 20 epochs
        positions = np.concatenate([sampler.positions() for sampler in ranks])
        bucket = np.unique(np.searchsorted(starts, positions, "right") - 1)
        assert len(bucket) == 1 and len(positions) == 8 and len(np.unique(positions)) >= 4
        buckets.append(int(bucket[0]))
        seen.update(positions.tolist())
        for sampler in ranks:
            sampler.advance()
    assert len(seen) == 100 and min(seen.values()) >= 18 and max(seen.values()) <= 22
    assert ranks[0].epoch == 20 and ranks[0].state() == ranks[1].state()
    assert len({tuple(buckets[at : at + 3]) for at in range(0, 240, 3)}) > 8, "in no regular order"


def test_a_sampler_goes_on_from_its_state_on_other_ranks() -> None:
    starts = BucketMajor(INDEX).starts
    one = BucketSampler(starts, 8, 1)
    for _ in range(13):
        one.advance()
    three = [BucketSampler(starts, 8, 1, rank, 3) for rank in range(3)]
    for sampler in three:
        sampler.load(one.state())
    for _ in range(20):
        assert np.concatenate([sampler.positions() for sampler in three]).tolist() == one.positions().tolist()
        assert np.concatenate([sampler.seen() for sampler in three]).tolist() == one.seen().tolist()
        for sampler in (one, *three):
            sampler.advance()
    with pytest.raises(ValueError, match="the checkpoint has starts="):
        BucketSampler(np.array([0, 50, 100]), 8, 1).load(one.state())
