"""Latents and features of real networks, made and checked in depth on a pretended GPU.

No devices are mixed, and nothing that is done for each batch or each sample waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stages.conftest import run_stage
from tiny_networks import (
    save_autoencoder,
    save_causal_language_model,
    save_classifier,
    save_clip,
    save_dino,
    save_dino3,
    save_siglip,
)
from transfer_double import Gpus

from pipeline.encoders.embedded import EmbeddedTextEncoder
from pipeline.encoders.image_text import HfImageEncoder
from pipeline.encoders.transformers import ClipTextEncoder
from pipeline.encoders.vision import _Patches
from pipeline.latents.validation import Validator
from pipeline.partitions.dataset import Dataset
from pipeline.stages import verify
from pipeline.stages.features import Features
from pipeline.stages.precompute import Precompute
from pipeline.stages.score import Score

_SAVED: dict[str, Callable[[Path], Path]] = {
    "vae": partial(save_autoencoder, latent_channels=4),
    "clip": save_clip,
    "dino": save_dino,
    "dino3": save_dino3,
    "siglip": save_siglip,
    "classifier": save_classifier,
    "language": save_causal_language_model,
}


@pytest.fixture(scope="module", autouse=True)
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved before anything is pretended: diffusers makes types of what torch.cuda has when it is imported."""
    place = tmp_path_factory.mktemp("networks")
    for name in (*_SAVED, "vit"):
        (place / name).mkdir()
    for name, save in _SAVED.items():
        save(place / name)
    torch.save(torch.nn.Linear(8, 1).state_dict(), place / "taste.pth")
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(place / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place / "vit")
    return {name: str(place / name) for name in (*_SAVED, "vit", "taste.pth")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Scenes in partitions of 12, 12 and 4."""
    place = str(tmp_path_factory.mktemp("source") / "in")
    run_stage("download", source="shapes", count=28, image_size=64, holdout=False, partition_size=12, output=place)
    return place


@pytest.fixture
def watched(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many batches a stage has encoded; none but the first, with which constants are copied, may wait."""
    seen: Counter[str] = Counter()

    def watch(stage: Any) -> None:
        encode = stage.encode

        def watched(self: Any, *arguments: Any) -> Any:
            seen[stage.name] += 1
            if seen[stage.name] == 1:
                return encode(self, *arguments)
            with gpus.no_waits():
                return encode(self, *arguments)

        monkeypatch.setattr(stage, "encode", watched)

    watch(Precompute)
    watch(Features)
    watch(Score)
    return seen


PRECOMPUTE: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "embedded": lambda n: {"vae": "embedded16", "image_encoder": "embedded"},
    "mode": lambda n: {"vae": n["vae"], "text_encoder": [f"clip:{n['clip']}"], "pooled": True},
    "moments": lambda n: {"vae": n["vae"], "latent": "moments", "text_storage": "ragged"},
    "sample": lambda n: {"vae": n["vae"], "latent": "sample", "text_storage": "dedup"},
    "features of DINOv2": lambda n: {"vae": "embedded16", "image_features": f"hf:{n['dino']}"},
    "features of DINOv3": lambda n: {
        "vae": "embedded16",
        "image_features": f"hf:{n['dino3']}",
        "features_storage": "int8",
    },
    "features of SigLIP": lambda n: {
        "vae": "embedded16",
        "image_features": f"hf:{n['siglip']}",
        "features_resolution": (48, 48),
        "aspect": "buckets",
        "bucket_step": 16,
    },
}


@pytest.mark.parametrize("settings", PRECOMPUTE)
def test_no_batch_of_latents_waits_for_the_device(
    settings: str, networks: dict[str, str], source: str, gpus: Gpus, watched: Counter[str], tmp_path: Path
) -> None:
    given = {"image_resolutions": (32, 64), "batch_size": "8", **PRECOMPUTE[settings](networks)}
    counts = run_stage("precompute", **given, input=source, output=str(tmp_path / "out"))["counts"]
    assert counts["kept"] == 28 and watched["precompute"] == 5
    extra = Dataset.open(tmp_path / "out").header["extra"]
    if settings == "mode":
        dtypes = (extra["vae"]["dtype"], *(text["dtype"] for text in extra["text_encoders"].values()))
        assert dtypes == ("float32", "bfloat16"), "bfloat16 would change latents by percents, and text states by little"


@pytest.mark.parametrize("encoder", ["embedded", "vit"])
def test_no_batch_of_features_waits_for_the_device(
    encoder: str, networks: dict[str, str], source: str, gpus: Gpus, watched: Counter[str], tmp_path: Path
) -> None:
    name = f"vit:{networks['vit']}" if encoder == "vit" else encoder
    counts = run_stage("features", encoder=name, batch_size=8, input=source, output=str(tmp_path / "out"))["counts"]
    assert counts["kept"] == 28 and watched["features"] == 5


@pytest.mark.parametrize("embeds", [True, False])
def test_no_batch_of_scores_waits_for_the_device(
    embeds: bool, networks: dict[str, str], source: str, gpus: Gpus, watched: Counter[str], tmp_path: Path
) -> None:
    clip = f"hf:{networks['clip']}"
    own = [f"embedding:{clip}", f"head:{networks['taste.pth']}"] if embeds else []
    networks_alone = (f"classifier:{networks['classifier']}", f"perplexity:{networks['language']}")
    scorers = (*own, f"clip_similarity:{clip}", *networks_alone, "sharpness", "caption_words")
    settings: dict[str, Any] = {"scorers": scorers, "batch_size": 8, "workers": "0", "reuse": False, "input": source}
    run_stage("score", **settings, output=str(tmp_path / "gpu"))
    assert watched["score"] == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run_stage("score", **settings, output=str(tmp_path / "cpu"))
    ours, theirs = (table_of(tmp_path / name) for name in ("gpu", "cpu"))
    assert len(ours) == 28 and ours.keys() == theirs.keys()
    for key, row in ours.items():
        for name, value in row.items():
            same = np.allclose(value, theirs[key][name], atol=2e-3) if name in _CLOSE else value == theirs[key][name]
            assert same, (key, name)


_CLOSE = ("embedding", "taste", "clip_similarity", "class_probability", "perplexity")


def table_of(place: Path) -> dict[str, dict[str, Any]]:
    dataset = Dataset.open(place)
    return {stored.key: stored.read() for index in range(dataset.partitions) for stored in dataset.samples(index)}


PLANTED = {
    "score: a value that is looked at": (HfImageEncoder, "encode", lambda vectors: vectors.max().item()),
    "precompute: a blocking copy": (ClipTextEncoder, "encode_pooled", lambda states: states[0].cpu()),
    "precompute: a value that is looked at": (
        EmbeddedTextEncoder,
        "encode",
        lambda states: states.isnan().any().item(),
    ),
    "precompute: a synchronisation": (EmbeddedTextEncoder, "encode", lambda states: torch.cuda.synchronize()),
    "precompute: a mix of devices": (EmbeddedTextEncoder, "encode", lambda states: states + torch.ones(states.shape)),
    "features: a mask": (_Patches, "encode", lambda features: features[features > 0]),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_by_its_line(
    fault: str,
    networks: dict[str, str],
    source: str,
    gpus: Gpus,
    watched: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, method, harm = PLANTED[fault]
    sound = getattr(owner, method)

    def harmed(self: Any, *arguments: Any) -> Any:
        found = sound(self, *arguments)
        harm(found)
        return found

    monkeypatch.setattr(owner, method, harmed)
    stage = fault.partition(":")[0]
    settings: dict[str, Any] = {"batch_size": 8}
    if stage == "score":
        settings |= {"scorers": (f"embedding:hf:{networks['clip']}",), "workers": "0"}
    if stage == "precompute":
        text = f"clip:{networks['clip']}" if owner is ClipTextEncoder else "embedded"
        settings = {"batch_size": "8", "image_resolutions": (32,), "text_encoder": [text]}
    with pytest.raises(AssertionError, match=r"(pipeline|tests)/\S+\.py:\d+: "):
        run_stage(stage, **settings, input=source, output=str(tmp_path / "out"))
    gpus.errors.clear()


def test_the_deep_check_waits_for_what_it_compares_and_not_for_each_sample(
    networks: dict[str, str], source: str, gpus: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    settings: dict[str, Any] = {"image_resolutions": (32,), "batch_size": "8", "vae": networks["vae"]}
    run_stage("precompute", **settings, input=source, output=str(tmp_path / "out"))
    assert set(precisions) == {"high"}, "float32 is TF32 on a GPU"
    speed = (Dataset.open(tmp_path / "out").record(1) or {})["notes"]["speed"]
    assert 0 <= speed["mfu"] < 1 and speed["images_per_second"] > 0

    check, waits = Validator.check, []

    def counted(self: Validator, *arguments: Any) -> Iterator[Any]:
        before = len(gpus.waits)
        yield from check(self, *arguments)
        waits.append(len(gpus.waits) - before)

    monkeypatch.setattr(Validator, "check", counted)
    found = [finding.what for finding in verify.findings_of(tmp_path / "out", deep=True)[1]]
    assert len(found) == 1 and "reconstructs a smooth" in found[0], "random weights, and nothing else to find"
    assert waits[1] == waits[2] > 0, "of 12 samples and of 4, as many are compared"
