"""stage=precompute on small models with random weights: values of direct calls, whatever the batches; nothing lost."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from fake_stage import rank_of
from PIL import Image
from stages.conftest import digests, run_stage
from tiny_networks import save_autoencoder, save_dino3, save_language_model

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, PrecomputeConfig
from pipeline.distributed import Rank
from pipeline.encoders.base import autoencoder, posterior_noise
from pipeline.encoders.crop import Crop
from pipeline.encoders.preprocessing import fit
from pipeline.imaging import transform
from pipeline.latents.encoding import Encoding
from pipeline.loading import text_storage
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.finalize import Unbalanced
from pipeline.partitions.planning import Stale
from pipeline.partitions.stage import Context
from pipeline.stages.precompute import Precompute

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT, SEED = 23, 7
CLIP = "tiny-for-precompute"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filtered images of all shapes in three partitions; some captions come again, within and across partitions."""
    root = tmp_path_factory.mktemp("upstream")
    random = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(COUNT):
        size = tuple(int(edge) for edge in random.integers(33, 100, 2))
        small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(root / f"images/{number:02}.png")
        (root / f"images/{number:02}.txt").write_text(
            "the same" if number % 3 == 0 else f"number {'very ' * number}{number}"
        )
    run_stage("download", source="image_folder", input=str(root / "images"), output=str(root / "raw"), partition_size=9)
    run_stage("filter", input=str(root / "raw"), output=str(root / "filter"), min_image_size=8, max_image_size=64)
    return root / "filter"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"), latent_channels=4, scaling_factor=0.5, shift_factor=0.1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    path = tmp_path_factory.mktemp("config") / f"{CLIP}.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return f"openclip:{CLIP}:random"


@pytest.fixture
def encoded(upstream: Path, vae: Path, clip: str, tmp_path: Path) -> Callable[..., Dataset]:
    def encode(name: str = "latents", **settings: Any) -> Dataset:
        given = {"vae": str(vae), "text_encoder": clip, "image_resolutions": (32, 64), "batch_size": "8", "seed": SEED}
        run_stage("precompute", input=str(upstream), output=str(tmp_path / name), **(given | settings))
        return Dataset.open(tmp_path / name)

    return encode


def rows_of(dataset: Dataset) -> dict[str, dict[str, Any]]:
    rows = [stored.read() for index in range(dataset.partitions) for stored in dataset.samples(index)]
    assert len(rows) == len({row["key"] for row in rows}) == dataset.require_success()["counts"]["in"]
    return {row["key"]: row for row in rows}


def values(dataset: Dataset, row: dict[str, Any], column: str) -> torch.Tensor:
    extra = dataset.header["extra"]
    return torch.from_numpy(np.frombuffer(row[column], extra["dtype"]).reshape(extra["shapes"][column]).copy()).float()


def assert_near(a: bytes, b: bytes) -> None:
    """Within one unit in the last place of float16, or 1e-5 of the largest."""
    one, other = np.frombuffer(a, np.float16), np.frombuffer(b, np.float16)
    near = np.abs(one.astype(np.float64) - other) <= 1e-5 * np.abs(one).max()
    assert (near | (np.nextafter(one, other) == other)).all()


@torch.no_grad()
def test_values_are_those_of_direct_calls(
    encoded: Callable[..., Dataset], upstream: Path, vae: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    dataset = encoded()
    direct = AutoencoderKL.from_pretrained(vae).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.create_model(CLIP, load_weights=False).eval()
    tokenize = open_clip.get_tokenizer(CLIP)
    sources = rows_of(Dataset.open(upstream))
    stored = rows_of(dataset)
    assert stored.keys() == sources.keys() and len(stored) == COUNT
    for key, row in list(stored.items())[::5]:
        assert set(row) == {"key", "caption", "caption_latents", "latents_32", "latents_64", "min_side"}
        assert row["caption"] == sources[key]["caption"] and row["min_side"] == sources[key]["min_side"]
        picture = transform.decode(sources[key]["jpg"], transform.probe(sources[key]["jpg"]))
        for resolution in (32, 64):
            x = fit([picture], Crop(resolution)).permute(0, 3, 1, 2) / 127.5 - 1
            posterior = direct.encode(x).latent_dist
            noise = posterior_noise(SEED, [key], resolution, (4, resolution // 2, resolution // 2))
            expected = (posterior.mean + posterior.std * noise - 0.1) * 0.5
            torch.testing.assert_close(values(dataset, row, f"latents_{resolution}"), expected[0], rtol=2e-3, atol=1e-4)
        tokens = tokenize([row["caption"]])
        states = clip.transformer(clip.token_embedding(tokens) + clip.positional_embedding, attn_mask=clip.attn_mask)
        torch.testing.assert_close(
            values(dataset, row, "caption_latents"), clip.ln_final(states)[0], rtol=2e-3, atol=1e-3
        )


@torch.no_grad()
def test_image_features_are_those_of_direct_calls(
    encoded: Callable[..., Dataset], upstream: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    (tmp_path / "dino").mkdir()
    place = save_dino3(tmp_path / "dino")
    settings = {"vae": "embedded", "text_encoder": ("embedded",), "image_resolutions": (64,)}
    dataset = encoded(**settings, image_features=f"hf:{place}", features_resolution=(64,))
    assert str(place / "model.safetensors") in dataset.header["model_files"]
    extra = dataset.header["extra"]["image_features"]
    assert (extra["name"], extra["width"], len(extra["weights_xxh3"])) == (f"hf:{place}", 16, 32)
    direct, processor = AutoModel.from_pretrained(place).eval(), AutoImageProcessor.from_pretrained(place)
    sources = rows_of(Dataset.open(upstream))
    for key, row in list(rows_of(dataset).items())[::5]:
        picture = transform.decode(sources[key]["jpg"], transform.probe(sources[key]["jpg"]))
        x = processor(Crop(64, "bilinear").cut(picture), do_resize=False, return_tensors="pt")["pixel_values"]
        expected = direct(x).last_hidden_state[0, 5:]
        found = values(dataset, row, "image_features_64")
        assert found.shape == (16, 16)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


def test_neither_batches_nor_workers_change_what_is_stored(encoded: Callable[..., Dataset]) -> None:
    eight = encoded("eight")
    workers = encoded("workers", workers=2)
    assert digests(workers.root.path) == digests(eight.root.path)
    rows = rows_of(eight)
    for size in ("3", "auto"):
        others = rows_of(encoded(size, batch_size=size))
        assert list(others) == list(rows)
        for key, row in rows.items():
            for column in ("caption_latents", "latents_32", "latents_64"):
                assert_near(row[column], others[key][column])


def test_a_batch_that_does_not_fit_is_halved_and_that_is_recorded(
    encoded: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.encoders.diffusers import DiffusersAutoencoder

    before = rows_of(encoded("before"))
    moments = DiffusersAutoencoder.moments

    def small(self: DiffusersAutoencoder, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return moments(self, x)

    monkeypatch.setattr(DiffusersAutoencoder, "moments", small)
    dataset = encoded("after")
    for key, row in rows_of(dataset).items():
        assert_near(row["latents_64"], before[key]["latents_64"])
    (events,) = (dataset.root.path / "events").rglob("*.jsonl")
    commits = [event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "commit"]
    halved = {f"images of {size} at once: out of memory": 1 for size in (8, 4)}
    record = dataset.record(0)
    assert record and record["notes"]["noted"] == halved
    assert json.loads((dataset.root.path / "manifest.json").read_text())["noted"] == halved
    assert Counter(name for event in commits for name in event.get("noted", {})) == halved
    monkeypatch.setattr(DiffusersAutoencoder, "moments", lambda self, x: small(self, torch.cat([x] * 4)))
    with pytest.raises(ConfigError, match="not even one of the images fits into the memory of cpu"):
        encoded("never")


@pytest.mark.parametrize(
    ("speeds", "found"),
    [({8: 10.0, 16: 18.0, 32: 30.0, 64: 31.0}, 32), ({8: 10.0, 16: 18.0}, 16), ({}, 8)],  # what is not there: no memory
)
def test_the_batch_size_is_found_by_trying(
    monkeypatch: pytest.MonkeyPatch, speeds: dict[int, float], found: int
) -> None:
    encoding = Encoding(
        device=torch.device("cuda"),
        vae=autoencoder("embedded"),
        texts={},
        image_encoder=None,
        resolutions=(64,),
        moments=False,
        storage="dense",
        dtype="float16",
    )
    monkeypatch.setattr(Encoding, "_speed", lambda self, size: speeds.get(size, 0.0))
    assert encoding.find_batch_size() == found


def test_moments_give_the_mode_and_the_sample(encoded: Callable[..., Dataset]) -> None:
    sample, mode, moments = (encoded(name, latent=name) for name in ("sample", "mode", "moments"))
    assert moments.header["extra"]["shapes"]["latents_64"] == [8, 32, 32]
    samples, modes = rows_of(sample), rows_of(mode)
    for key, row in rows_of(moments).items():
        mean, deviation = values(moments, row, "latents_64").chunk(2)
        assert torch.equal(mean, values(mode, modes[key], "latents_64"))
        noise = posterior_noise(SEED, [key], 64, (4, 32, 32))[0]
        torch.testing.assert_close(
            values(sample, samples[key], "latents_64"), mean + deviation * noise, rtol=5e-3, atol=5e-3
        )


def test_several_text_encoders_and_an_image_encoder(encoded: Callable[..., Dataset], clip: str) -> None:
    dataset = encoded(
        text_encoder=(clip, "embedded"), image_encoder=clip, save_images=True, text_storage="int8", pooled=True
    )
    extra = dataset.header["extra"]
    assert extra["shapes"]["caption_latents_2"] == [16, 64] and extra["shapes"]["image_embedding"] == [16]
    assert extra["text_encoders"]["caption_latents_2"]["name"] == "embedded"
    assert 0 < extra["text_storage"]["caption_latents"]["cosine_error"]["max"] < 0.003
    manifest = json.loads((dataset.root.path / "manifest.json").read_text())
    assert manifest["vae"]["scaling"] == 0.5 and len(manifest["vae"]["weights_xxh3"]) == 32
    for row in rows_of(dataset).values():
        assert np.linalg.norm(values(dataset, row, "image_embedding")) == pytest.approx(1, abs=1e-2)
        assert len(row["caption_latents"]) == 77 * 34 and row["jpg"]
        assert values(dataset, row, "caption_pooled").shape == (16,) and "caption_pooled_2" not in row


def test_a_caption_is_stored_once_where_it_stands_first(encoded: Callable[..., Dataset]) -> None:
    dense, dedup = rows_of(encoded("dense")), encoded("dedup", text_storage="dedup")
    assert digests(dedup.root.path) != {}
    saved = 0
    for index in range(dedup.partitions):
        rows = [stored.read() for stored in dedup.samples(index)]
        for place, row in enumerate(rows):
            home = rows[place - row["caption_back"]]
            assert home["caption"] == row["caption"] and home["caption_back"] == 0
            assert home["caption_latents"] == dense[row["key"]]["caption_latents"]
            saved += not row["caption_latents"]
    assert saved == len([1 for n in range(COUNT) if n % 3 == 0]) - 3


def test_text_is_encoded_once_for_each_caption_of_a_partition(
    encoded: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.encoders.openclip import OpenClipTextEncoder

    seen: list[str] = []
    encode = OpenClipTextEncoder.encode
    monkeypatch.setattr(OpenClipTextEncoder, "encode", lambda self, c: seen.extend(c) or encode(self, c))
    encoded()
    assert seen.count("the same") == 3 and len(seen) == COUNT - 8 + 3


def test_a_latent_that_is_not_finite_is_no_latent(
    encoded: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.encoders.diffusers import DiffusersAutoencoder

    moments = DiffusersAutoencoder.moments

    def poisoned(self: DiffusersAutoencoder, x: torch.Tensor) -> torch.Tensor:
        result = moments(self, x)
        result[1:2, 0, 0, 0] = float("nan")
        return result

    monkeypatch.setattr(DiffusersAutoencoder, "moments", poisoned)
    dataset = encoded(max_failed_fraction=0.5)
    success = dataset.require_success()
    assert success["counts"]["failed"] == 3 and success["reasons"] == {"failed:not_finite": 3}
    assert len(dataset) == COUNT - 3


def test_a_latent_that_its_stored_precision_cannot_hold_says_which_precision_can(
    encoded: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.encoders.diffusers import DiffusersAutoencoder

    moments = DiffusersAutoencoder.moments

    def large(self: DiffusersAutoencoder, x: torch.Tensor) -> torch.Tensor:
        result = moments(self, x)
        result[:, : result.shape[1] // 2] += 1e7
        return result

    monkeypatch.setattr(DiffusersAutoencoder, "moments", large)
    with pytest.raises(Unbalanced, match="not_finite: .*: save_dtype=float32 helps"):
        encoded(save_dtype="float16")
    stored = encoded("wide", save_dtype="float32")
    assert len(stored) == COUNT and stored.require_success()["reasons"] == {}


def test_wrong_settings_are_one_clear_error(encoded: Callable[..., Dataset]) -> None:
    with pytest.raises(ConfigError, match="batch_size=0: must be auto or a whole number of at least 1"):
        encoded(batch_size="0")
    with pytest.raises(ConfigError, match="image_resolutions=33: must be a multiple of 2"):
        encoded(image_resolutions=(33,))
    with pytest.raises(ConfigError, match="text_encoder=\\[\\]: name at least one"):
        encoded(text_encoder=())
    with pytest.raises(ConfigError, match="pooled=true: none of the text encoders has pooled embeddings"):
        encoded(text_encoder="embedded", pooled=True)


def test_captions_that_are_not_near_are_forgotten() -> None:
    from collections import OrderedDict

    from pipeline.latents import text_states

    known: OrderedDict[str, None] = OrderedDict()
    many = [str(number) for number in range(text_states._REMEMBERED)]
    assert text_states.news(known, [*many, "0"]) == (many, [])
    assert text_states.news(known, ["new", "2", "0"]) == (["new"], ["1"])
    assert text_states.news(known, ["1"]) == (["1"], ["3"])
    assert Precompute.version == 3 and text_storage.kind_of("dedup") == "dense"


def test_what_was_begun_early_counts_only_if_it_comes_next(
    encoded: Callable[..., Dataset], upstream: Path, tmp_path: Path
) -> None:
    expected = encoded(vae="embedded", text_encoder="embedded")
    config = build(PrecomputeConfig, {**expected.header["config"], "input": str(upstream), "output": str(tmp_path)})
    stage = Precompute(config, Rank())
    partitions = [expected.partition(index) for index in (0, 2, 1)]
    for partition, following in zip(partitions, [partitions[2], partitions[2], None], strict=True):
        rows = [outcome.row for outcome in stage.process(partition, Context(following=following))]
        assert rows == [stored.read() for stored in expected.samples(partition.index)]
    outcomes = stage.process(partitions[0], Context(following=partitions[1]))
    next(outcomes)
    outcomes.close()  # as when the rank is stopped
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
    last = stage.process(partitions[1], Context(following=partitions[1]))
    assert [outcome.row for outcome in last] == [s.read() for s in expected.samples(2)]
    stage.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_stores_the_same_samples_of_the_posterior(
    encoded: Callable[..., Dataset], upstream: Path, tmp_path: Path, ranks: int
) -> None:
    alone = encoded()
    settings = {**alone.header["config"], "input": str(upstream), "output": str(tmp_path / "ranks")}
    stages = [Precompute(build(PrecomputeConfig, settings), rank_of(number, ranks)) for number in range(ranks)]
    assert all(stage.encoding for stage in stages)  # models cannot be loaded in several threads at once
    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(engine.run, stages))
    assert digests(tmp_path / "ranks") == digests(alone.root.path)
    rows_of(Dataset.open(tmp_path / "ranks"))


@pytest.mark.parametrize("what", ["weights", "template"])
def test_a_local_model_that_has_changed_is_noticed(upstream: Path, vae: Path, tmp_path: Path, what: str) -> None:
    place, template = tmp_path / "vae", tmp_path / "template.txt"
    shutil.copytree(vae, place)
    template.write_text("a photo of {caption}")
    text = save_language_model(tmp_path / "text")
    given = {"vae": str(place), "text_encoder": f"hf:{text}#length=8#template={template}", "image_resolutions": (32,)}
    run = partial(run_stage, "precompute", input=str(upstream), output=str(tmp_path / "out"), **given)
    run()
    (place / "README.md").write_text("for people")
    run()
    if what == "template":
        template.write_text("a drawing of {caption}")
    else:
        (weights,) = place.glob("*.safetensors")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    with pytest.raises(Stale, match=f"{template.name if what == 'template' else weights.name} was modified since"):
        run()


def test_a_truncated_picture_is_a_row_of_the_ledger(tmp_path: Path) -> None:
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:-2000])
    run_stage("download", source="image_folder", input=str(tmp_path), output=str(tmp_path / "raw"))
    settings = {"image_resolutions": (64,), "max_failed_fraction": 0.5}
    for workers in (0, 2):
        place = tmp_path / f"latents{workers}"
        success = run_stage("precompute", input=str(tmp_path / "raw"), output=str(place), workers=workers, **settings)
        assert success["counts"]["kept"] == 4 and success["reasons"] == {"failed:truncated": 1}


def test_compiled_networks_give_the_same(encoded: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows_of(encoded("plain"))
    compiled: list[str] = []
    graphs: Counter[str] = Counter()

    def compile(self: torch.nn.Module, **options: Any) -> None:
        name = type(self).__name__
        compiled.append(name)

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs[name] += 1
            return graph

        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    after = rows_of(encoded("compiled", compile=True))
    assert compiled == ["Encoder", "Transformer"]
    assert graphs["Encoder"] == 2, "one graph for each resolution, though the last batch of a partition is smaller"
    for key, row in after.items():
        for column in ("caption_latents", "latents_64"):
            assert_near(row[column], before[key][column])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("more", [{}, {"workers": 2}, {"batch_size": "auto"}, {"compile": True}], ids=str)
def test_a_gpu_gives_what_a_cpu_gives(
    encoded: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    gpu = encoded("gpu", model_dtype="float32", save_dtype="float32", **more)
    speed = (gpu.record(0) or {})["notes"]["speed"]
    assert 0 <= speed["idle"] <= 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        cpu = encoded("cpu", save_dtype="float32")
    expected = rows_of(cpu)
    for key, row in rows_of(gpu).items():
        for column in ("caption_latents", "latents_32", "latents_64"):
            # a GPU resizes in float32, which moves a few pixels by a level
            torch.testing.assert_close(
                values(gpu, row, column), values(cpu, expected[key], column), rtol=2e-2, atol=2e-2
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_runs_out_of_memory_goes_on_with_less(encoded: Callable[..., Dataset]) -> None:
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**27 / whole)
    try:
        dataset = encoded("little", image_resolutions=(512,), model_dtype="float32", batch_size="64")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    noted = json.loads((dataset.root.path / "manifest.json").read_text())["noted"]
    assert any("out of memory" in name for name in noted) and len(rows_of(dataset)) == COUNT
