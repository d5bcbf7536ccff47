"""Text states of any model of transformers: the values of direct calls and of diffusers' pipelines. No network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_networks import SMALL, WORDS, save_language_model, save_tokenizer

from pipeline.config.cli import load
from pipeline.config.schema import ConfigError
from pipeline.encoders.base import text_encoder

pytestmark = pytest.mark.filterwarnings("ignore")
CAPTIONS = ["a red dog", "a", "dog cat dog cat dog cat dog cat dog cat"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("qwen"))


@torch.no_grad()
def direct(model: Any, text: str, layers: tuple[int, ...] = ()) -> torch.Tensor:
    """States of a text by itself, without padding: (l, d)."""
    ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
    said = model(input_ids=ids, output_hidden_states=True)
    return torch.cat([said.hidden_states[layer] for layer in layers], 2)[0] if layers else said.last_hidden_state[0]


def check(encoder: Any, model: Any, layers: tuple[int, ...] = (), template: str = "{}", drop: int = 0) -> None:
    states = encoder.encode(CAPTIONS)
    assert states.shape == (3, encoder.length, encoder.width) and states.dtype == torch.float32
    for caption, found in zip(CAPTIONS, states, strict=True):
        text = " ".join(template.format(caption).split()[: drop + encoder.length])
        expected = direct(model, text, layers)[drop:]
        torch.testing.assert_close(found[: len(expected)], expected, atol=1e-5, rtol=1e-4)
        assert not found[len(expected) :].any()


def gemma2(path: Path) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=1, sliding_window=64))


def gemma3(path: Path) -> Any:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    return Gemma3TextModel(Gemma3TextConfig(**SMALL, head_dim=8, num_key_value_heads=1, sliding_window=64))


def umt5(path: Path) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def bart(path: Path) -> Any:
    from transformers import BartConfig, BartModel

    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return BartModel(BartConfig(vocab_size=len(WORDS), d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes))


@pytest.mark.parametrize("make", [gemma2, gemma3, umt5, bart])
def test_any_model_that_reads_text(make: Any, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    torch.manual_seed(1)
    model = make(tmp_path).eval()
    model.save_pretrained(tmp_path)
    encoder = text_encoder(f"hf:{tmp_path}#length=8")
    check(encoder, model.get_encoder() if make is bart else model)
    assert encoder.lengths(CAPTIONS) == [3, 1, 8]


@pytest.mark.parametrize(
    ("option", "layers"), [("last", ()), ("penultimate", (-2,)), ("1", (1,)), ("0+2+-1", (0, 2, -1))]
)
def test_layers(qwen: Path, option: str, layers: tuple[int, ...]) -> None:
    from transformers import Qwen3Model

    encoder = text_encoder(f"hf:{qwen}#length=12#layer={option}")
    assert encoder.width == 16 * max(1, len(layers))
    check(encoder, Qwen3Model.from_pretrained(qwen).eval(), layers)


def test_the_chat_template_and_its_prefix(qwen: Path) -> None:
    from transformers import Qwen3Model

    model, template = Qwen3Model.from_pretrained(qwen).eval(), "<|user|> describe : {} <|bot|>"
    check(text_encoder(f"hf:{qwen}#length=16#template=chat"), model, template=template)
    check(text_encoder(f"hf:{qwen}#length=5#template=chat#drop_prefix=true"), model, template=template, drop=3)


def test_the_states_are_those_of_qwen_images_pipeline(qwen: Path, tmp_path: Path) -> None:
    """A template with a prefix that is dropped, of the last entry of hidden_states."""
    from diffusers import QwenImagePipeline
    from transformers import AutoTokenizer, Qwen3Model

    template = tmp_path / "template.txt"
    template.write_text("<|user|> describe : {caption} <|bot|>")
    stub = SimpleNamespace(
        text_encoder=Qwen3Model.from_pretrained(qwen).eval(),
        tokenizer=AutoTokenizer.from_pretrained(qwen, padding_side="right"),
        prompt_template_encode=template.read_text().replace("{caption}", "{}"),
        prompt_template_encode_start_idx=3,
        tokenizer_max_length=16,
        _execution_device=torch.device("cpu"),
    )
    stub._extract_masked_hidden = lambda *given: QwenImagePipeline._extract_masked_hidden(stub, *given)
    with torch.no_grad():
        expected, mask = QwenImagePipeline._get_qwen_prompt_embeds(stub, CAPTIONS)
    found = text_encoder(f"hf:{qwen}#length=16#layer=-1#template={template}#drop_prefix=true").encode(CAPTIONS)
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-4)
    assert not found[:, expected.shape[1] :].any() and mask.sum(1).tolist() == [4, 2, 11]


def test_the_tower_of_siglip_has_no_mask_and_a_pooled_output(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    tokenizer = save_tokenizer(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(2)
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 8, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text, {**sizes, "image_size": 32, "patch_size": 16})).eval()
    model.save_pretrained(tmp_path)
    encoder = text_encoder(f"hf:{tmp_path}")
    assert (encoder.length, encoder.width, encoder.pooled_width) == (8, 16, 16)
    states, pooled = encoder.encode_pooled(CAPTIONS)
    tokenizer.padding_side = "right"
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=8, truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(states, model.text_model(ids).last_hidden_state)
        torch.testing.assert_close(pooled, model.get_text_features(ids))


def test_the_text_part_of_a_vision_language_model(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    save_tokenizer(tmp_path)
    torch.manual_seed(3)
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config={**SMALL, "num_key_value_heads": 1, "rope_scaling": rope, "max_window_layers": 3},
        vision_config=vision,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    check(text_encoder(f"hf:{tmp_path}#length=8"), model.model.language_model)


def test_distributed_over_devices(qwen: Path) -> None:
    """Without GPUs everything is on the host, through the same code."""
    expected = text_encoder(f"hf:{qwen}#length=8").encode(CAPTIONS)
    assert torch.equal(text_encoder(f"hf:{qwen}#length=8#device_map=auto").encode(CAPTIONS), expected)


def test_the_manifest_says_what_the_states_are(qwen: Path) -> None:
    said = text_encoder(f"hf:{qwen}#layer=1+2#template=chat#drop_prefix=true").describe()
    assert said["class"] == "Qwen3Model" and said["layers"] == [1, 2] and said["prefix_tokens_dropped"] == 3
    assert said["template"] == "<|user|> describe : {caption} <|bot|>" and said["padding"] == "zeros"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("layer=first", "layer=first: expected last, penultimate, a number, or several joined by +"),
        ("layer=9", "layer=9: the model has 0 to 3"),
        ("length=0", "length=0: expected a number of tokens"),
        ("mask=maybe", "mask=maybe: expected true or false"),
        ("template=no.txt", "template=no.txt: expected chat, or the name of a text file"),
        ("device_map=balanced", "device_map=balanced: expected auto"),
        ("pool=mean", "hf takes layer, length, mask, template, drop_prefix, device_map after the #"),
    ],
)
def test_a_wrong_option_is_named(qwen: Path, options: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        text_encoder(f"hf:{qwen}#{options}")
    assert message in str(error.value)


def test_options_come_through_a_command_line(qwen: Path) -> None:
    arguments = ["input=a", "output=b", f"text_encoder=[hf:{qwen}#length=5#layer=-2,embedded]"]
    first, second = load("precompute", arguments).text_encoder
    assert (text_encoder(first).length, text_encoder(first).describe()["layers"], second) == (5, [-2], "embedded")
    wrong = load("precompute", [*arguments[:2], f"text_encoder=hf:{qwen}#length=5,layer=-2"]).text_encoder
    with pytest.raises(
        ConfigError, match=r"text_encoder=layer=-2: .* append it to the model with #, as in t5:<repo>#layer"
    ):
        text_encoder(wrong[1])


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat=False)
    gemma2(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="template=chat: its tokenizer has no chat template"):
        text_encoder(f"hf:{tmp_path}#template=chat")
