"""stage=precompute aspect=buckets: bytes of each image's own bucket, whoever encodes it in whichever batch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_stage import rank_of
from latents.test_crashes import killed
from stages.conftest import digests, run_stage
from streaming import StreamingDataset

from pipeline.config.cli import build
from pipeline.config.schema import PrecomputeConfig
from pipeline.distributed import Rank
from pipeline.encoders.base import posterior_noise, sampled
from pipeline.encoders.crop import PatchCrop
from pipeline.encoders.embedded import EmbeddedAutoencoder, EmbeddedImageEncoder
from pipeline.imaging import transform
from pipeline.imaging.buckets import BUCKET_COLUMNS, Buckets
from pipeline.imaging.patches import PatchGrid
from pipeline.loading.latent_folder import LatentFolder
from pipeline.loading.latents import build_streaming_latents_dataloader
from pipeline.partitions import engine
from pipeline.partitions.bucket_index import NAME, BucketIndex
from pipeline.partitions.dataset import Dataset, RandomAccess, SlotReader, Stored
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context
from pipeline.samples import Outcome, Row
from pipeline.stages import trace
from pipeline.stages.precompute import Precompute
from pipeline.stages.repair import repair
from pipeline.stages.report import describe
from pipeline.stages.takedown import takedown
from pipeline.stages.verify import findings_of

SETTINGS: dict[str, Any] = {
    "vae": "embedded",
    "aspect": "buckets",
    "bucket_step": 16,
    "image_resolutions": (48, 64),
    "batch_size": "5",
    "image_features": "embedded",
    "features_storage": "int8",
}
READ = ("image_latents", "image_features")
CANVASES = ("1:1", "3:2", "2:3", "5:3", "1:3")
COUNT = 47


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of several shapes in four partitions, some smaller than their bucket."""
    root = tmp_path_factory.mktemp("scenes")
    source = {"source": "shapes", "count": COUNT, "canvases": CANVASES, "image_size": 50}
    run_stage("download", **source, partition_size=12, output=str(root / "in"))
    return root / "in"


@pytest.fixture(scope="module")
def sound(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("buckets") / "latents"
    run_stage("precompute", input=str(scenes), output=str(place), **SETTINGS)
    return place


def latents(row: Row, resolution: int, channels: int = 4) -> np.ndarray:
    size = [row[f"{edge}_{resolution}"] // 8 for edge in ("height", "width")]
    return np.frombuffer(row[f"latents_{resolution}"], np.float16).reshape(channels, *size)


def rows_of(place: Path) -> list[Row]:
    stored = RandomAccess(Dataset.open(place))
    return stored.rows(range(len(stored)))


def test_each_image_is_encoded_in_its_own_bucket(scenes: Path, sound: Path) -> None:
    sources = {row["key"]: row["jpg"] for row in rows_of(scenes)}
    vae, shapes = EmbeddedAutoencoder("embedded"), set()
    for row in rows_of(sound):
        data = sources[row["key"]]
        pixels = transform.decode(data, transform.probe(data))
        assert (row["original_height"], row["original_width"]) == pixels.shape[:2]
        for resolution in (48, 64):
            buckets = Buckets(resolution, 16)
            place = buckets.place_of(*pixels.shape[:2], 0, row["key"])
            assert place is not None
            stored = [row[f"{name}_{resolution}"] for name in BUCKET_COLUMNS]
            assert stored == [*place.size, place.top, place.left]
            alone = vae.encode(vae.preprocess_for(pixels, resolution, buckets))[0].numpy().astype(np.float16)
            assert np.array_equal(latents(row, resolution), alone), "bytes do not depend on the batch"
            shapes.add(alone.shape)
    assert len(shapes) == 6  # 48: a square, 32 x 64 and 64 x 32; 64: a square, 48 x 80 and 80 x 48


def test_image_features_are_those_of_the_crop_that_latents_are_made_of(scenes: Path, sound: Path) -> None:
    sources = {row["key"]: row["jpg"] for row in rows_of(scenes)}
    encoder, vae, shapes = EmbeddedImageEncoder(), EmbeddedAutoencoder("embedded"), set()
    rows = {row["key"]: row for row in rows_of(sound)}
    loader: Any = build_streaming_latents_dataloader(
        sound, 4, 64, 16, 64, shuffle=False, drop_last=False, buckets=True, image_features=True
    )
    loaded = [(image, features) for batch in loader for image, features in zip(*map(batch.get, READ), strict=True)]
    by_latents = {image.numpy().tobytes(): features for image, features in loaded}
    for key, row in rows.items():
        pixels = transform.decode(sources[key], transform.probe(sources[key]))
        for resolution, grid in ((48, PatchGrid(48, 24, 8)), (64, PatchGrid(64, 32, 8))):
            crop = PatchCrop(vae.crop(resolution, Buckets(resolution, 16)), grid)
            exact = encoder.encode_patches(encoder.preprocessing.of_one(pixels, crop, "cpu"))[0]
            size = (row[f"height_{resolution}"], row[f"width_{resolution}"])
            assert len(exact) == size[0] * size[1] // 16**2, "one patch for 2 x 2 latents"
            stored = np.frombuffer(row[f"image_features_{resolution}"], np.uint8)
            scales, values = stored[: 2 * len(exact)].view(np.float16), stored[2 * len(exact) :].view(np.int8)
            found = torch.from_numpy(values.reshape(exact.shape).astype(np.float32) * scales[:, None])
            assert float((found - exact).norm() / exact.norm()) < 0.01
            shapes.add((resolution, len(exact)))
        torch.testing.assert_close(by_latents[row["latents_64"]].float(), found, rtol=1e-3, atol=1e-4)
    assert len(by_latents) == COUNT and shapes == {(48, 9), (48, 8), (64, 16), (64, 15)}


def test_samples_lie_bucket_by_bucket_and_the_index_says_so(sound: Path) -> None:
    dataset, folder = Dataset.open(sound), LatentFolder(sound)
    rows = rows_of(sound)
    for resolution in (48, 64):
        index = folder.bucket_index(f"latents_{resolution}")
        told = [
            index.sizes[owner] for owner, n in zip(index.owners, np.diff(index.starts), strict=True) for _ in range(n)
        ]
        assert told == [(row[f"height_{resolution}"], row[f"width_{resolution}"]) for row in rows]
        assert index.counts().sum() == COUNT == len(index)
    for partition in range(dataset.partitions):
        record = dataset.record(partition)
        assert record and len(record["buckets"]) == len({str(sizes) for sizes, _ in record["buckets"]}), "one run each"
    assert NAME in dataset.require_success()["digests"]


def test_any_streaming_dataset_reads_the_folder(sound: Path) -> None:
    rows = StreamingDataset(local=str(sound), batch_size=1, shuffle=False)
    assert [rows[n]["latents_64"] for n in range(COUNT)] == [row["latents_64"] for row in rows_of(sound)]


@pytest.mark.parametrize(
    "settings", [{"batch_size": "32"}, {"batch_size": "1"}, {"workers": 0}, {"workers": 2}], ids=str
)
def test_bytes_do_not_depend_on_batches_or_processes(
    scenes: Path, sound: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run_stage("precompute", input=str(scenes), output=str(tmp_path / "out"), **{**SETTINGS, **settings})
    assert digests(tmp_path / "out") == digests(sound)


def test_killed_ranks_and_other_numbers_of_ranks_store_the_same_bytes(
    scenes: Path, sound: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    settings = {**SETTINGS, "input": str(scenes), "output": str(place), "workers": 0}
    given = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in settings.items()]
    for samples in ((15, 8), (5, 13)):  # two lives of two ranks, killed after so many samples each
        for life in [killed(rank, 2, sample, *given) for rank, sample in enumerate(samples)]:
            _, said = life.communicate(timeout=300)
            assert life.returncode == -signal.SIGKILL, said
    stages = [Precompute(build(PrecomputeConfig, settings), rank_of(number, 3)) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(engine.run, stages))
    assert digests(place) == digests(sound)
    assert (place / NAME).read_bytes() == (sound / NAME).read_bytes()


def test_sizes_come_from_columns_where_there_are_some(scenes: Path, sound: Path, tmp_path: Path) -> None:
    run_stage("filter", input=str(scenes), output=str(tmp_path / "filter"), min_image_size=1, max_image_size=0)
    run_stage("precompute", input=str(tmp_path / "filter"), output=str(tmp_path / "out"), **SETTINGS)
    assert [row["latents_64"] for row in rows_of(tmp_path / "out")] == [row["latents_64"] for row in rows_of(sound)]


def test_an_image_whose_columns_lie_about_its_size_fails(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage("filter", input=str(scenes), output=str(tmp_path / "filter"), min_image_size=1, max_image_size=0)
    read = Stored.read

    def turned(self: Stored, columns: Any = None) -> Row:
        row = read(self, columns)
        lies = self.key.endswith("7") and "width" in row
        return {**row, "width": row["height"], "height": row["width"]} if lies else row

    monkeypatch.setattr(Stored, "read", turned)
    success = run_stage("precompute", input=str(tmp_path / "filter"), output=str(tmp_path / "out"), **SETTINGS)
    table = [SlotReader(Dataset.open(tmp_path / "out"), index).ledger().to_pylist() for index in range(4)]
    failed = [row for rows in table for row in rows if row["outcome"] == "failed"]
    assert failed and success["reasons"] == {"failed:size_mismatch": len(failed)}
    assert all(row["key"].endswith("7") and row["width"] != row["height"] for row in failed)


def test_images_that_would_be_enlarged_are_dropped_or_go_to_smaller_buckets(scenes: Path, tmp_path: Path) -> None:
    for upscale in ("false", "smaller"):
        place = tmp_path / upscale
        run_stage("precompute", input=str(scenes), output=str(place), **SETTINGS, bucket_upscale=upscale)
        for row in rows_of(place):
            for resolution in (48, 64):
                assert row[f"height_{resolution}"] <= row["original_height"]
                assert row[f"width_{resolution}"] <= row["original_width"]
        assert list(findings_of(place, deep=True)[1]) == []
    success = Dataset.open(tmp_path / "false").require_success()
    assert 0 < success["counts"]["dropped"] == success["reasons"]["dropped:smaller_than_bucket"]
    assert len(rows_of(tmp_path / "smaller")) == COUNT


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bucket_crop": "random", "latent": "moments"},
        {"text_storage": "int8+ragged+dedup", "image_encoder": "embedded"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_sound_buckets_have_no_fault(scenes: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run_stage("precompute", input=str(scenes), output=str(tmp_path / "out"), **{**SETTINGS, **settings})
    assert list(findings_of(tmp_path / "out", deep=True)[1]) == []


def test_the_noise_of_a_sample_is_that_of_its_key_and_its_bucket(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = EmbeddedAutoencoder.moments
    monkeypatch.setattr(EmbeddedAutoencoder, "moments", lambda self, x: moments(self, x) + 0.5)  # a deviation of 0.5
    run_stage("precompute", input=str(scenes), output=str(tmp_path / "out"), **SETTINGS)
    sources = {row["key"]: row["jpg"] for row in rows_of(scenes)}
    vae = EmbeddedAutoencoder("embedded")
    for row in rows_of(tmp_path / "out")[::5]:
        pixels = transform.decode(sources[row["key"]], transform.probe(sources[row["key"]]))
        found = latents(row, 64)
        x = vae.preprocess_for(pixels, 64, Buckets(64, 16))
        noise = posterior_noise(0, [row["key"]], 64, found.shape)  # type: ignore[arg-type]
        assert np.array_equal(found, sampled(vae.moments(x), noise)[0].numpy().astype(np.float16))


def test_a_takedown_leaves_an_index_that_is_right(scenes: Path, tmp_path: Path) -> None:
    images, place = tmp_path / "download", tmp_path / "out"
    source = {"source": "shapes", "count": COUNT, "canvases": CANVASES, "image_size": 50}
    run_stage("download", **source, partition_size=12, output=str(images))
    run_stage("precompute", input=str(images), output=str(place), **SETTINGS)
    keys = [row["key"] for row in rows_of(place)[3:40:6]]
    (tmp_path / "list").write_text("\n".join(keys))
    takedown(tmp_path, tmp_path / "list", Rank())
    left = rows_of(place)
    index = BucketIndex.parse((place / NAME).read_bytes(), "latents_64")
    assert len(left) == COUNT - len(keys) == len(index)
    told = [index.sizes[owner] for owner, n in zip(index.owners, np.diff(index.starts), strict=True) for _ in range(n)]
    assert told == [(row["height_64"], row["width_64"]) for row in left]


# ---- planted faults

BAD = 2


def content_digest(place: Path) -> str:
    return str(Dataset.open(place).require_success()["content_digest"])


process = Precompute.process


def wrong_bucket(stage: Precompute, rows: list[Row]) -> None:
    """The square instead of each image's own bucket, consistent in all columns."""
    sources = {stored.key: stored.read()["jpg"] for stored in stage.upstream.samples(BAD)}
    for row in rows:
        pixels = transform.decode(sources[row["key"]], transform.probe(sources[row["key"]]))
        values = stage.vae.encode(stage.vae.preprocess([pixels], 64))
        row |= {"latents_64": values.half().numpy().tobytes(), "height_64": 64, "width_64": 64}


def transposed_shape(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["height_64"], row["width_64"] = row["width_64"], row["height_64"]


def transposed_latents(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["latents_64"] = latents(row, 64).transpose(0, 2, 1).tobytes()


def wrong_shift(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["latents_64"] = (latents(row, 64) + np.float16(0.5)).tobytes()


def wrong_place(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["crop_left_64"] += 1


def wrong_original(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["original_height"] += 1


def latents_of_the_next(stage: Precompute, rows: list[Row]) -> None:
    for column in ("latents_64", "height_64", "width_64", "crop_top_64", "crop_left_64"):
        values = [row[column] for row in rows]
        for row, other in zip(rows, values[1:] + values[:1], strict=True):
            row[column] = other


FAULTS: dict[Callable[[Precompute, list[Row]], None], str] = {
    wrong_bucket: "latents_64 is in the bucket 64 x 64, but an image of ",
    transposed_shape: "latents_64 is in the bucket 80 x 48, but an image of 50 x 75 belongs to 48 x 80",
    transposed_latents: "height and width were swapped",
    wrong_shift: "wrong shift: they are 0.5 more than they should be",
    wrong_place: "latents_64 says that it was cut at ",
    wrong_original: "its row says that its image has ",
    latents_of_the_next: "latents_64",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_was_written_wrong_is_found_and_made_again(
    scenes: Path, sound: Path, tmp_path: Path, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: Precompute, partition: Partition, context: Context) -> Iterator[Outcome]:
        outcomes = list(process(self, partition, context))
        if partition.index == BAD:
            fault(self, [outcome.row for outcome in outcomes if outcome.row])
        yield from outcomes

    place = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Precompute, "process", wrong)
        run_stage("precompute", input=str(scenes), output=str(place), **SETTINGS)
    assert list(findings_of(place)[1]) == []
    found = list(findings_of(place, deep=True)[1])
    assert found and {finding.partition for finding in found} == {BAD}
    assert any(FAULTS[fault] in finding.what and finding.key for finding in found), found
    repair(place, Rank(), deep=True, workers=1)
    assert content_digest(place) == content_digest(sound)
    assert list(findings_of(place, deep=True)[1]) == []


def features_of_the_next(stage: Precompute, rows: list[Row]) -> None:
    for _, group in groupby(rows, key=lambda row: row["height_64"]):
        alike = list(group)
        values = [row["image_features_64"] for row in alike]
        for row, other in zip(alike, values[1:] + values[:1], strict=True):
            row["image_features_64"] = other


def wrong_scale_of_features(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        stored = np.frombuffer(row["image_features_64"], np.uint8).copy()
        scales = stored[: 2 * (len(stored) // (2 + 192))].view(np.float16)
        scales *= np.float16(2)
        row["image_features_64"] = stored.tobytes()


def turned_features(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        (height, width), sizes = (row["height_64"] // 16, row["width_64"] // 16), (2, 192)
        stored, at, parts = np.frombuffer(row["image_features_64"], np.uint8), 0, []
        for size in sizes:
            stop = at + height * width * size
            parts.append(stored[at:stop].reshape(height, width, size).transpose(1, 0, 2).ravel())
            at = stop
        row["image_features_64"] = np.concatenate(parts).tobytes()


def short_features(stage: Precompute, rows: list[Row]) -> None:
    rows[0]["image_features_48"] = rows[0]["image_features_48"][:-1]


OF_FEATURES: tuple[tuple[Callable[[Precompute, list[Row]], None], str], ...] = (
    (features_of_the_next, "they are those of sample "),
    (wrong_scale_of_features, "wrong scale: they are 2 times what they should be"),
    (turned_features, "rows and columns of patches were swapped"),
    (short_features, "image_features_48 has "),
)


def test_wrong_image_features_are_found_and_made_again(
    scenes: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of its own in each partition."""

    def wrong(self: Precompute, partition: Partition, context: Context) -> Iterator[Outcome]:
        outcomes = list(process(self, partition, context))
        OF_FEATURES[partition.index][0](self, [outcome.row for outcome in outcomes if outcome.row])
        yield from outcomes

    place = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Precompute, "process", wrong)
        run_stage("precompute", input=str(scenes), output=str(place), **SETTINGS)
    assert list(findings_of(place)[1]) == []
    found = list(findings_of(place, deep=True)[1])
    for partition, (_, what) in enumerate(OF_FEATURES):
        there = [finding for finding in found if finding.partition == partition]
        assert there and all("image_features_" in finding.what and finding.key for finding in there), there
        assert any(what in finding.what for finding in there), there
    repair(place, Rank(), deep=True, workers=1)
    assert content_digest(place) == content_digest(sound)


# ---- seen by people


def test_trace_tells_a_samples_bucket_and_shows_it(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in rows_of(sound) if row["width_64"] == 80)
    assert trace.tell([sound], row["key"], str(tmp_path / "way.png"), as_json=False) == 0
    told = capsys.readouterr().out
    assert f"48 x 80 at row {row['crop_top_64']}, column {row['crop_left_64']} of " in told
    assert (tmp_path / "way.png").is_file()


def test_the_report_counts_buckets_and_lost_pixels(scenes: Path, sound: Path) -> None:
    facts = describe(Dataset.open(sound), 4, sheet=False)
    assert [entry["column"] for entry in facts["buckets"]] == ["latents_48", "latents_64"]
    sizes = [(row["original_height"], row["original_width"]) for row in rows_of(sound)]
    square = np.mean([1 - min(size) / max(size) for size in sizes])
    for entry in facts["buckets"]:
        assert entry["square"] == pytest.approx(square) and 0 < entry["cut"] < square
    assert all(latent["psnr"] > 15 for latent in facts["latents"])
