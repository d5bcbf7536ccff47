"""Towers of images and captions: the vectors of direct calls, on small models with random weights. No network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import (
    save_classifier,
    save_clip,
    save_dino,
    save_dino3,
    save_dino_with_registers,
    save_siglip,
    save_swin,
)

from pipeline.config.options import ConfigError
from pipeline.encoders.base import patch_encoder
from pipeline.encoders.image_text import HfClassifier, image_tower, text_tower

pytestmark = pytest.mark.filterwarnings("ignore")
CAPTIONS = ["a red dog", "", "dog " * 40, "a"]
Saved = Callable[[Callable[[Path], Path]], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Saves each kind of model once."""
    places: dict[str, Path] = {}

    def place(save: Callable[[Path], Path]) -> Path:
        if save.__name__ not in places:
            places[save.__name__] = save(tmp_path_factory.mktemp(save.__name__))
        return places[save.__name__]

    return place


def photos(count: int = 3) -> list[np.ndarray]:
    """Smooth ones: of noise, libraries' interpolations differ by more than two levels."""
    coarse = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)) for i in range(count)]
    return [np.asarray(one.resize((50 + 4 * i, 40), Image.Resampling.BICUBIC)) for i, one in enumerate(coarse)]


def prepared(place: Path, images: list[np.ndarray]) -> torch.Tensor:
    from transformers import AutoImageProcessor

    pixels: torch.Tensor = AutoImageProcessor.from_pretrained(place, use_fast=False)(images, return_tensors="pt")[
        "pixel_values"
    ]
    return pixels


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("save", [save_clip, save_siglip])
def test_two_tower_models_give_what_transformers_gives(saved: Saved, save: Callable[[Path], Path]) -> None:
    from transformers import AutoModel, AutoTokenizer

    place = saved(save)
    direct = AutoModel.from_pretrained(place).eval()
    images, texts = image_tower(f"hf:{place}", "scorers=x"), text_tower(f"hf:{place}", "scorers=x")
    x = prepared(place, photos())
    torch.testing.assert_close(images.preprocess(photos()), x, atol=2.01 / 255 / 0.26, rtol=0)
    torch.testing.assert_close(images.encode(x), unit(direct.get_image_features(x)))
    tokenizer, length = AutoTokenizer.from_pretrained(place), direct.config.text_config.max_position_embeddings
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    if save is save_siglip:  # which was trained on padded texts without a mask
        del tokens["attention_mask"]
    torch.testing.assert_close(texts.encode(CAPTIONS), unit(direct.get_text_features(**tokens)))
    assert images.width == texts.width == images.encode(x).shape[1]
    alone = torch.cat([texts.encode([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(texts.encode(CAPTIONS), alone)


@torch.no_grad()
def test_image_models_without_a_text_side_are_pooled_as_they_pool(saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoModel, ViTModel

    place = saved(save_dino)
    x = prepared(place, photos())
    tower = image_tower(f"hf:{place}", "scorers=x")
    assert tower.resolution == 28 and tower.preprocessing.shorter == 32
    torch.testing.assert_close(tower.preprocess(photos()), x, atol=2.01 / 255 / 0.22, rtol=0)
    torch.testing.assert_close(tower.encode(x), unit(AutoModel.from_pretrained(place).eval()(x).pooler_output))
    with pytest.raises(ConfigError, match="scorers=clip_similarity: this model has no text tower: it is a Dinov2Model"):
        shutil.copytree(place, tmp_path / "dino")
        for file in saved(save_siglip).glob("*token*"):
            shutil.copy(file, tmp_path / "dino")
        text_tower(f"hf:{tmp_path / 'dino'}", "scorers=clip_similarity")
    # a classifier's checkpoint has no pooler: transformers would make up a random one
    plain = saved(save_classifier)
    x = prepared(plain, photos())
    expected = ViTModel.from_pretrained(plain, add_pooling_layer=False).eval()(x).last_hidden_state[:, 0]
    for _ in range(2):
        tower = image_tower(f"hf:{plain}", "scorers=x")
        torch.testing.assert_close(tower.encode(x), unit(expected))
    assert tower.describe() == image_tower(f"hf:{plain}", "scorers=x").describe()


OTHERS = {save_dino: 1, save_dino_with_registers: 5, save_dino3: 5, save_siglip: 0, save_clip: 1, save_classifier: 1}
"""Kinds of models, with how many class and register tokens come before the patches."""


@torch.no_grad()
@pytest.mark.parametrize("save", OTHERS)
def test_features_of_patches_are_the_last_states_that_transformers_gives(
    saved: Saved, save: Callable[[Path], Path]
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    place = saved(save)
    direct, encoder = AutoModel.from_pretrained(place).eval(), patch_encoder(f"hf:{place}")
    tower = getattr(direct, "vision_model", direct)
    for rows, columns in ((2, 2), (3, 5)):
        height, width = rows * encoder.patch, columns * encoder.patch
        image = np.random.default_rng(rows).integers(0, 256, (height, width, 3), np.uint8)
        processor = AutoImageProcessor.from_pretrained(place)
        x = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(encoder.preprocessing.normalise(torch.from_numpy(image)[None]), x)
        sized = {} if "dino" in save.__name__ else {"interpolate_pos_encoding": True}
        expected = tower(x, **sized).last_hidden_state
        assert expected.shape[1] - OTHERS[save] == rows * columns
        torch.testing.assert_close(encoder.encode_patches(x), expected[:, OTHERS[save] :])
    assert encoder.describe_patches()["width"] == encoder.patch_width == expected.shape[2]


def test_encoders_without_a_token_for_each_patch_are_refused(saved: Saved) -> None:
    with pytest.raises(ConfigError, match=r"^image_features=hf:.*: this is not a vision transformer that gives"):
        patch_encoder(f"hf:{saved(save_swin)}")
    with pytest.raises(ConfigError, match=r"^image_features=openclip:ViT-B-32: this encoder gives one vector"):
        patch_encoder("openclip:ViT-B-32")
    with pytest.raises(ConfigError, match=r"^image_features=hf:x#layer=2: hf takes no options"):
        patch_encoder("hf:x#layer=2")


@torch.no_grad()
def test_open_clips_towers_are_open_clips(tmp_path: Path) -> None:
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "tiny-towers.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-towers.json")
    torch.manual_seed(5)
    model = open_clip.create_model("tiny-towers", load_weights=False).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    spec = f"openclip:tiny-towers:{tmp_path / 'weights.pt'}"
    images, texts = image_tower(spec, "scorers=x"), text_tower(spec, "scorers=x")
    x = images.preprocess(photos())
    torch.testing.assert_close(images.encode(x), model.encode_image(x, normalize=True))  # type: ignore[operator]
    tokens = open_clip.get_tokenizer("tiny-towers")(CAPTIONS)
    torch.testing.assert_close(texts.encode(CAPTIONS), model.encode_text(tokens, normalize=True))  # type: ignore[operator]
    assert images.width == texts.width == 16


@torch.no_grad()
def test_any_network_can_be_a_tower(tmp_path: Path) -> None:
    from pipeline.encoders.preprocessing import Preprocessing
    from pipeline.encoders.vision import save_program

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 8, 8), torch.nn.Flatten(2))
    save_program(network, tmp_path / "net.pt2", 32, Preprocessing())
    tower = image_tower(f"program:{tmp_path / 'net.pt2'}", "scorers=x")
    x = tower.preprocess(photos())
    torch.testing.assert_close(tower.encode(x), unit(network(x).mean(1)))


@torch.no_grad()
def test_a_classifier_is_that_of_transformers(saved: Saved) -> None:
    from transformers import AutoModelForImageClassification

    place = saved(save_classifier)
    x = prepared(place, photos())
    classifier = HfClassifier(str(place), "scorers=x")
    expected = AutoModelForImageClassification.from_pretrained(place).eval()(x).logits.softmax(-1)
    torch.testing.assert_close(classifier.probabilities(x), expected)
    assert classifier.classes == ["dog", "cat", "car"]


def test_what_cannot_be_loaded_is_named_with_the_setting(saved: Saved, tmp_path: Path) -> None:
    for spec in ("nowhere:x", "hf:", "openclip", "t5:x"):
        with pytest.raises(ConfigError, match=r"^scorers=e: (known|did you mean).*hf:<repo or folder>"):
            image_tower(spec, "scorers=e")
    with pytest.raises(ConfigError, match="^scorers=e: this model has no text tower"):
        text_tower("embedded", "scorers=e")
    with pytest.raises(ConfigError, match=r"^scorers=e: cannot be loaded: config.json is not in the folder"):
        image_tower(f"hf:{tmp_path}", "scorers=e")
    with pytest.raises(ConfigError, match=r"^scorers=e: cannot be loaded: config.json is not in the folder"):
        text_tower(f"hf:{tmp_path}", "scorers=e")
    with pytest.raises(ConfigError, match=r"^scorers=e: name the weights"):
        image_tower("openclip:ViT-B-32", "scorers=e")
    with pytest.raises(ConfigError, match=r"^scorers=e: cannot be loaded: it was not written by save_program"):
        image_tower(f"program:{tmp_path / 'no.pt2'}", "scorers=e")
    with pytest.raises(ConfigError, match=r"^scorers=e: .* holds another kind of model: it has no classifier"):
        HfClassifier(str(saved(save_dino)), "scorers=e")


def test_only_safetensors_are_read(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved(save_dino), tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(ConfigError, match="model.safetensors or model.safetensors.index.json is not in the folder"):
        image_tower(f"hf:{tmp_path / 'pickled'}", "scorers=e")
