"""transformers' CLIP and T5: the values of direct calls, on small models with random weights. No network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import ConfigError
from pipeline.encoders.base import image_encoder, text_encoder

pytestmark = pytest.mark.filterwarnings("ignore")
CAPTIONS = ["a red dog", "", "dog " * 40, "a"]
WORDS = ["a", "red", "dog", "cat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=12).save_pretrained(path)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokens), "max_position_embeddings": 12, "eos_token_id": len(tokens) - 1}
    vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    path = tmp_path_factory.mktemp("t5")
    names = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(names), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(path)
    return path


@torch.no_grad()
def test_clips_states_are_those_of_transformers(clip: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    direct = CLIPTextModel.from_pretrained(clip).eval()
    tokens = CLIPTokenizer.from_pretrained(clip)(
        CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    expected = direct(tokens.input_ids, output_hidden_states=True)
    states = text_encoder(f"clip:{clip}").encode(CAPTIONS)
    assert states.shape == (4, 12, 32)
    torch.testing.assert_close(states, expected.last_hidden_state)
    penultimate = text_encoder(f"clip:{clip}#layer=penultimate").encode(CAPTIONS)
    torch.testing.assert_close(penultimate, expected.hidden_states[-2])


@torch.no_grad()
def test_clips_image_embeddings_are_those_of_transformers(clip: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    x = CLIPImageProcessor.from_pretrained(clip)(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    embeds = CLIPModel.from_pretrained(clip).eval().get_image_features(x)
    encoder = image_encoder(f"clip:{clip}")
    torch.testing.assert_close(encoder.preprocess([picture]), x, atol=2.01 / 255 / 0.26, rtol=0)
    torch.testing.assert_close(encoder.encode(x), torch.nn.functional.normalize(embeds, dim=-1))
    assert (encoder.width, encoder.resolution) == (8, 32)


@torch.no_grad()
def test_t5s_states_do_not_depend_on_the_padding(t5: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    tokens = AutoTokenizer.from_pretrained(t5)(
        CAPTIONS, padding="max_length", max_length=20, truncation=True, return_tensors="pt"
    )
    direct = T5EncoderModel.from_pretrained(t5).eval()
    expected = direct(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    encoder = text_encoder(f"t5:{t5}#length=20")
    assert encoder.lengths(CAPTIONS) == [4, 1, 20, 2]
    alone = torch.cat([encoder.encode([caption]) for caption in CAPTIONS])
    masked = expected * tokens.attention_mask[:, :, None]
    torch.testing.assert_close(encoder.encode(CAPTIONS), masked)
    torch.testing.assert_close(alone, masked)


def test_a_pipelines_text_encoder_is_found(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").symlink_to(clip)
    (tmp_path / "tokenizer").symlink_to(clip)
    assert torch.equal(text_encoder(f"clip:{tmp_path}").encode(CAPTIONS), text_encoder(f"clip:{clip}").encode(CAPTIONS))


def test_the_manifest_gets_plain_values(clip: Path, t5: Path) -> None:
    for said in (
        text_encoder(f"clip:{clip}").describe(),
        text_encoder(f"t5:{t5}").describe(),
        image_encoder(f"clip:{clip}").describe(),
    ):
        assert json.loads(json.dumps(said)) == said and len(said["weights_xxh3"]) == 32


def test_a_missing_repository_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text_encoder=clip:.*: cannot be loaded"):
        text_encoder(f"clip:{tmp_path}")
    with pytest.raises(ConfigError, match="image_encoder=clip:.*: cannot be loaded"):
        image_encoder(f"clip:{tmp_path}")
