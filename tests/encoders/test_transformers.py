"""transformers' CLIP and T5: the values of direct calls, on small models with random weights. No network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import save_clip

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import image_encoder, text_encoder

pytestmark = pytest.mark.filterwarnings("ignore")
CAPTIONS = ["a red dog", "", "dog " * 40, "a"]
WORDS = ["a", "red", "dog", "cat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


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


def test_tokens_are_those_that_the_mask_says(clip: Path, t5: Path) -> None:
    """What ``text_storage=ragged`` keeps."""
    from transformers import AutoTokenizer, CLIPTokenizer

    for encoder, tokenizer in (
        (text_encoder(f"clip:{clip}"), CLIPTokenizer.from_pretrained(clip)),
        (text_encoder(f"t5:{t5}#length=20"), AutoTokenizer.from_pretrained(t5)),
    ):
        settings = {"padding": "max_length", "max_length": encoder.length, "truncation": True}
        assert encoder.tokens(CAPTIONS) == [sum(mask) for mask in tokenizer(CAPTIONS, **settings)["attention_mask"]]
    assert text_encoder(f"t5:{t5}#length=20#mask=false").tokens(CAPTIONS) == [20] * len(CAPTIONS)


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


def test_the_file_that_a_folder_lacks_is_named(clip: Path, tmp_path: Path) -> None:
    def refused(message: str, load: Callable[[str], object] = text_encoder) -> None:
        with pytest.raises(ConfigError, match=message):
            load(f"clip:{tmp_path}")

    refused("^text_encoder=clip:.*: cannot be loaded: config.json is not in the folder")
    refused("^image_encoder=clip:.*: cannot be loaded: config.json is not in the folder", image_encoder)
    shutil.copy(clip / "config.json", tmp_path)
    refused("model.safetensors or model.safetensors.index.json is not in the folder")
    shutil.copy(clip / "model.safetensors", tmp_path)
    refused("preprocessor_config.json is not in the folder", image_encoder)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    refused("cannot be loaded: .+", image_encoder)


def test_without_the_hub_the_file_that_the_cache_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from huggingface_hub.utils._http import reset_sessions

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    try:
        for load, setting in ((text_encoder, "text_encoder"), (image_encoder, "image_encoder")):
            with pytest.raises(ConfigError) as caught:
                load("clip:nobody/nothing")
            said = str(caught.value)
            assert said.startswith(f"{setting}=clip:nobody/nothing: cannot be loaded: the Hugging Face Hub cannot be")
            assert "config.json of nobody/nothing is not in its local cache; give the path of a folder" in said
    finally:
        reset_sessions()


@torch.no_grad()
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_any_text_encoder_of_a_pipeline_is_read_with_its_own_tokenizer(clip: Path, tmp_path: Path, part: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    given = json.loads((clip / "config.json").read_text())["text_config"]
    torch.manual_seed(1)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**{**given, "projection_dim": 6, "hidden_size": 48}))
    for other in ("text_encoder", "text_encoder_2"):
        model.eval().save_pretrained(tmp_path / other) if other == part else None
    own = part.replace("text_encoder", "tokenizer")
    CLIPTokenizer.from_pretrained(clip, pad_token="a").save_pretrained(tmp_path / own)
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    encoder = text_encoder(f"clip:{tmp_path}/{part}#layer=penultimate")
    tokens = CLIPTokenizer.from_pretrained(tmp_path / own)(
        CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    expected = model(tokens.input_ids, output_hidden_states=True)
    states, pooled = encoder.encode_pooled(CAPTIONS)
    torch.testing.assert_close(states, expected.hidden_states[-2])
    torch.testing.assert_close(pooled, expected.text_embeds)
    assert (encoder.width, encoder.pooled_width) == (48, 6)
    assert encoder.name == f"clip:{tmp_path}/{part}"
    with pytest.raises(
        ConfigError, match="text_encoder_3: cannot be loaded: text_encoder_3/config.json is not in the folder"
    ):
        text_encoder(f"clip:{tmp_path}/text_encoder_3")


@torch.no_grad()
def test_clip_without_a_projection_pools_the_end_of_the_text(clip: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(clip)(
        CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    _, pooled = text_encoder(f"clip:{clip}").encode_pooled(CAPTIONS)
    torch.testing.assert_close(pooled, CLIPTextModel.from_pretrained(clip).eval()(tokens.input_ids).pooler_output)


@torch.no_grad()
def test_t5_without_a_mask_gives_padding_states_too(t5: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    tokens = AutoTokenizer.from_pretrained(t5)(
        CAPTIONS, padding="max_length", max_length=20, truncation=True, return_tensors="pt"
    )
    encoder = text_encoder(f"t5:{t5}#length=20#mask=false")
    expected = T5EncoderModel.from_pretrained(t5).eval()(tokens.input_ids).last_hidden_state
    torch.testing.assert_close(encoder.encode(CAPTIONS), expected)
    assert encoder.lengths(CAPTIONS) == [20] * 4 and encoder.describe()["padding"] == "states"
    assert encoder.pooled_width == 0
    with pytest.raises(ConfigError, match="mask=no: expected true or false"):
        text_encoder(f"t5:{t5}#mask=no")


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 32}, "crop_size": 32},
        {"size": {"shortest_edge": 40}, "crop_size": 32},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2},
        {"size": {"shortest_edge": 32}, "crop_size": 32, "resample": 1, "do_normalize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 50), (67, 41), (32, 33), (101, 64), (32, 32)])
def test_preprocessing_is_that_of_the_image_processor(settings: dict[str, object], shape: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor

    from pipeline.encoders.transformers import preprocessing_of

    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8))
    image = np.asarray(smooth.resize(shape[::-1], Image.Resampling.BICUBIC))
    processor = CLIPImageProcessor(**settings)
    expected = processor(images=[image], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    preprocessing, edge = preprocessing_of(processor, "encoder=x")
    level = 1 / 255 / (min(processor.image_std) if processor.do_normalize else 1)
    torch.testing.assert_close(preprocessing([image], edge, "cpu"), expected, atol=2.01 * level, rtol=0)


def test_an_image_processor_that_does_more_is_refused() -> None:
    from transformers import CLIPImageProcessor

    from pipeline.encoders.transformers import preprocessing_of

    for wrong in ({"size": {"shortest_edge": 20}, "crop_size": 32}, {"rescale_factor": 1 / 127.5}, {"resample": 5}):
        with pytest.raises(ConfigError, match="encoder=x: its CLIPImageProcessor"):
            preprocessing_of(CLIPImageProcessor(**wrong), "encoder=x")
