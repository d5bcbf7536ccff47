"""open_clip's text towers: the states of direct calls, and no random weights by accident. No network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import image_encoder, text_encoder

CAPTIONS = ["a small red circle", "", "word " * 100]
TINY = "tiny-for-tests"


@pytest.fixture(scope="module", params=[False, True], ids=["CLIP", "CustomTextCLIP"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a tiny model; open_clip has two kinds, with the text tower as a part or spread over the model."""
    name = f"{TINY}-{request.param}"
    config = {
        "embed_dim": 16,
        "custom_text": request.param,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    path = tmp_path_factory.mktemp("config") / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return name


@torch.no_grad()
def by_hand(model: torch.nn.Module, captions: list[str]) -> torch.Tensor:
    """The tower step by step, up to its last layer norm."""
    tower = getattr(model, "text", model)
    tokens = open_clip.get_tokenizer("ViT-B-32")(captions)
    x = tower.token_embedding(tokens) + tower.positional_embedding
    x = tower.transformer(x, attn_mask=tower.attn_mask)
    states: torch.Tensor = tower.ln_final(x)
    return states


def saved(name: str, folder: Path, seed: int) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(seed)
    model = open_clip.create_model(name, load_weights=False).eval()
    path = folder / "weights.pt"
    torch.save(model.state_dict(), path)
    return model, path


def test_states_are_those_before_pooling_and_projection(tiny: str, tmp_path: Path) -> None:
    model, path = saved(tiny, tmp_path, seed=3)
    encoder = text_encoder(f"openclip:{tiny}:{path}")
    states = encoder.encode(CAPTIONS)
    assert states.shape == (3, encoder.length, encoder.width) == (3, 77, 32)
    torch.testing.assert_close(states, by_hand(model, CAPTIONS))


@torch.no_grad()
def test_tokens_are_counted_from_the_start_to_the_end_of_the_text(tiny: str) -> None:
    """What ``text_storage=ragged`` keeps. "!" is token 0, which pads, too."""
    captions = [*CAPTIONS, "a dog!", "! ! !"]
    counts = text_encoder(f"openclip:{tiny}:random").tokens(captions)
    ids = open_clip.get_tokenizer("ViT-B-32")(captions)
    assert counts == [6, 2, 77, 5, 5]
    assert all(row[count - 1] == 49407 and not row[count:].any() for row, count in zip(ids, counts, strict=True))


def test_pooling_and_projecting_them_gives_open_clips_embedding(tiny: str, tmp_path: Path) -> None:
    model, path = saved(tiny, tmp_path, seed=4)
    tokens = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)
    ends = text_encoder(f"openclip:{tiny}:{path}").encode(CAPTIONS)[torch.arange(3), tokens.argmax(-1)]
    tower = getattr(model, "text", model)
    torch.testing.assert_close(ends @ tower.text_projection, model.encode_text(tokens))  # type: ignore[operator]


def test_random_weights_are_always_the_same_and_leave_torchs_state_alone(tiny: str) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first = text_encoder(f"openclip:{tiny}:random")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(10)
    second = text_encoder(f"openclip:{tiny}:random")
    assert first.describe() == second.describe()
    assert torch.equal(first.encode(CAPTIONS), second.encode(CAPTIONS))


def test_the_manifest_tells_weights_apart(tiny: str, tmp_path: Path) -> None:
    random = text_encoder(f"openclip:{tiny}:random").describe()
    _, path = saved(tiny, tmp_path, seed=5)
    assert text_encoder(f"openclip:{tiny}:{path}").describe()["weights_xxh3"] != random["weights_xxh3"]


def test_reduced_precision_is_close_and_comes_out_as_float32(tiny: str) -> None:
    exact, half = (text_encoder(f"openclip:{tiny}:random", dtype=d).encode(CAPTIONS) for d in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0.1)


def test_a_model_without_weights_is_not_silently_random() -> None:
    with pytest.raises(ConfigError, match="name the weights, as openclip:ViT-B-32:<pretrained>, with one of openai"):
        text_encoder("openclip:ViT-B-32")


def test_wrong_models_and_files_are_one_clear_error(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text_encoder=openclip:ViT-B-33:openai: did you mean"):
        text_encoder("openclip:ViT-B-33:openai")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        text_encoder(f"openclip:{tiny}:{tmp_path / 'missing.pt'}")


@torch.no_grad()
def test_the_penultimate_layer_goes_through_the_last_norm(tiny: str, tmp_path: Path) -> None:
    model, path = saved(tiny, tmp_path, seed=6)
    states = text_encoder(f"openclip:{tiny}:{path}#layer=penultimate").encode(CAPTIONS)
    tower = getattr(model, "text", model)
    x = tower.token_embedding(open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)) + tower.positional_embedding
    torch.testing.assert_close(states, tower.ln_final(tower.transformer.resblocks[0](x, attn_mask=tower.attn_mask)))


@torch.no_grad()
@pytest.mark.parametrize("squash", [False, True])
def test_image_embeddings_are_open_clips(tiny: str, tmp_path: Path, squash: bool) -> None:
    import numpy as np
    from PIL import Image

    model, path = saved(tiny, tmp_path, seed=7)
    wants = {**model.visual.preprocess_cfg, "resize_mode": "squash" if squash else "shortest"}  # type: ignore[operator,dict-item]
    encoder = image_encoder(f"openclip:{tiny}:{path}")
    encoder.preprocessing = replace(encoder.preprocessing, squash=squash)
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    steps = open_clip.transform.image_transform(
        32, False, mean=wants["mean"], std=wants["std"], resize_mode=wants["resize_mode"], interpolation="bicubic"
    )
    x = steps(Image.fromarray(picture))[None]
    torch.testing.assert_close(encoder.preprocess([picture]), x, atol=2.01 / 255 / 0.26, rtol=0)
    torch.testing.assert_close(encoder.encode(x), model.encode_image(x, normalize=True))  # type: ignore[operator]
    assert encoder.width == 16 and encoder.encode(x).norm() == pytest.approx(1)
