"""Training on latents that others have written, as micro_diffusion's precompute does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.stages import train
from pipeline.stages.generate import load_painter
from pipeline.training.checkpoint import finished_run
from pipeline.training.stored_latents import StoredLatents, latents_of

CAPTION = (77, 16)


def write(folder: Path, shape: tuple[int, ...] = (4, 8, 8), dtype: Any = np.float16, seed: int = 0) -> Path:
    streaming = pytest.importorskip("streaming")
    random = np.random.default_rng(seed)
    columns = {"caption": "str", "caption_latents": "bytes", "latents_64": "bytes"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=1 << 16) as writer:
        for number in range(24):
            states, latents = (random.standard_normal(size).astype(dtype).tobytes() for size in (CAPTION, shape))
            writer.write({"caption": f"number {number}", "caption_latents": states, "latents_64": latents})
    return folder


def settings(folder: Path, **given: Any) -> TrainConfig:
    small = {"input": str(folder), "output": str(folder.parent / "run"), "steps": 3, "batch_size": 4, "threads": 1}
    return build(TrainConfig, {**small, "warmup_steps": 1, **given})


def test_a_run_learns_them_and_says_what_it_takes_to_draw(tmp_path: Path) -> None:
    folder = write(tmp_path / "latents")
    train.main(settings(folder, vae="embedded"))
    run = finished_run(str(tmp_path / "run"), "diffuse")
    assert run.step == 3
    info = run.facts["latents"]
    assert (info["autoencoder"], info["text_encoder"], info["resolution"]) == ("embedded", "", 64)
    assert tuple(info["image_shape"]) == (4, 8, 8) and tuple(info["caption_shape"]) == CAPTION
    with pytest.raises(ConfigError, match="does not know what encodes prompts: train it with text_encoder="):
        load_painter(str(tmp_path / "run"), torch.device("cpu"), "")


def test_mixed_with_more_of_the_same(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", seed=1)
    data, info = latents_of(settings(one, mix=[f"{two}*2"]), one)
    assert len(data) == 24 + 48 and info.image_shape == (4, 8, 8)
    wide = write(tmp_path / "wide", (16, 8, 8))
    with pytest.raises(ConfigError, match="mix=.*wide: LatentInfo"):
        latents_of(settings(one, mix=[str(wide)]), one)


def test_other_shapes_and_precisions_are_read_when_they_are_named(tmp_path: Path) -> None:
    deep, single = write(tmp_path / "deep", (32, 2, 2)), write(tmp_path / "single", dtype=np.float32)
    config = settings(deep, latent_shape=[32, 2, 2], caption_shape=[77, 16])
    assert StoredLatents.opened(deep, config).info(64).image_shape == (32, 2, 2)
    config = settings(single, latent_dtype="float32")
    stored = StoredLatents.opened(single, config)
    assert stored.info(64).caption_shape == CAPTION and stored.resolution(0) == 64
    with pytest.raises(ConfigError, match="latents_64 has 256 bytes per sample"):
        StoredLatents.opened(deep, settings(deep))


def test_settings_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    folder = write(tmp_path / "latents")
    for given, message in (
        ({"resolution": 512}, "resolution=512: .* known: 64"),
        ({"caption_shape": [77, 32]}, "text states have 2464 bytes per sample, but 77 x 32 of float16 take 4928"),
        ({"show": 2}, "show=2: .* does not name the autoencoder of its latents: give vae="),
    ):
        with pytest.raises(ConfigError, match=message):
            train.main(settings(folder, **given))
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard["column_names"][1] = "text_latents"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="has no column caption_latents, only caption, text_latents, latents_64"):
        train.main(settings(folder))


def test_what_a_manifest_says_is_not_said_again(tmp_path: Path) -> None:
    from stages.conftest import run_stage

    raw, latents = tmp_path / "raw", tmp_path / "latents"
    run_stage("download", source="shapes", count=4, image_size=32, output=str(raw))
    run_stage("precompute", input=str(raw), output=str(latents), image_resolutions=(32,))
    assert StoredLatents.opened(latents, settings(latents, vae="embedded")).vae == "embedded"  # one command for both
    for given in ({"vae": "embedded16"}, {"caption_shape": [16, 64]}, {"latent_dtype": "float16"}):
        with pytest.raises(ConfigError, match=f"{next(iter(given))}= is for latents without a manifest"):
            train.main(settings(latents, **given))
    with pytest.raises(ConfigError, match="holds no latents: run stage=precompute first"):
        train.main(settings(raw))
