"""Small networks with random weights, saved as their libraries save them. No network is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def save_autoencoder(path: Path, channels: tuple[int, ...] = (8, 16), **settings: Any) -> Path:
    """An AutoencoderKL of diffusers that shrinks images by ``2 ** (len(channels) - 1)``."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=4,
        **settings,
    ).save_pretrained(path)
    return path


def save_clip(path: Path) -> Path:
    """A CLIP of transformers: texts of 12 tokens, images of 32 pixels, states of 32 numbers."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

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


WORDS = ["<pad>", "</s>", "<unk>", "<|user|>", "<|bot|>", "a", "red", "dog", "cat", "describe", ":"]
CHAT = "{% for m in messages %}<|user|> describe : {{ m['content'] }} {% endfor %}<|bot|>"
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


def save_tokenizer(path: Path, chat: bool = True) -> Any:
    """A tokenizer whose tokens are the words in WORDS, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|bot|>"],
        padding_side="left",
    )
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(path)
    return tokenizer


def save_language_model(path: Path) -> Path:
    """A Qwen 3 with states of 16 numbers, with its tokenizer."""
    from transformers import Qwen3Config, Qwen3Model

    save_tokenizer(path)
    torch.manual_seed(0)
    Qwen3Model(Qwen3Config(**SMALL, head_dim=8, num_key_value_heads=1)).save_pretrained(path)
    return path


def save_causal_language_model(path: Path) -> Path:
    """The same, with a head that predicts the next token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    save_tokenizer(path)
    torch.manual_seed(0)
    config = Qwen3Config(**SMALL, head_dim=8, num_key_value_heads=1, initializer_range=0.5)
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def save_siglip(path: Path) -> Path:
    """A SigLIP of transformers: texts of 10 tokens, images of 32 pixels squashed to squares, vectors of 16 numbers."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    save_tokenizer(path, chat=False)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 10}
    torch.manual_seed(0)
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    ).save_pretrained(path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def save_dino(path: Path) -> Path:
    """A DINOv2 of transformers: images of 28 pixels, cut out of ones whose smaller edge has 32; 16 numbers."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(path)
    return path


def save_dino_with_registers(path: Path) -> Path:
    """A DINOv2 with four register tokens; images and states as of :func:`save_dino`."""
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).save_pretrained(path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(path)
    return path


def save_dino3(path: Path) -> Path:
    """A DINOv3 of transformers with four register tokens: images of 32 pixels squashed to squares, 16 numbers."""
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessorFast, DINOv3ViTModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, num_register_tokens=4)).save_pretrained(path)
    DINOv3ViTImageProcessorFast(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def save_swin(path: Path) -> Path:
    """A Swin of transformers, which merges patches; images of 32 pixels."""
    from transformers import SwinConfig, SwinModel, ViTImageProcessor

    torch.manual_seed(0)
    SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)).save_pretrained(
        path
    )
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def save_classifier(path: Path, names: tuple[str, ...] = ("dog", "cat", "car")) -> Path:
    """A ViT of transformers that tells classes called ``names`` apart; images of 32 pixels."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = ViTConfig(**sizes, image_size=32, patch_size=16, id2label=dict(enumerate(names)), initializer_range=0.5)
    ViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def save_vision_language_model(path: Path, kind: str = "llava") -> Path:
    """A LLaVA or Qwen2-VL with random weights, with its processor and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
        Qwen2TokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    marks = ["<pad>", "</s>", "<unk>", "<|user|>", "<|bot|>", "<image>", "<|image_pad|>", "<|video_pad|>"]
    marks += ["<|vision_start|>", "<|vision_end|>"]
    words = [
        *marks,
        *["a", "red", "dog", "cat", "on", "the", "grass", "describe", "this", "image", "what", "is", "it", "."],
    ]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = (PreTrainedTokenizerFast if kind == "llava" else Qwen2TokenizerFast)(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=marks[3:],
        model_input_names=["input_ids", "attention_mask"],
    )
    image = "<image>" if kind == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    template = (
        "{% for m in messages %}<|user|> {% for part in m['content'] %}{% if part['type'] == 'image' %}"
        + " ".join(image.replace("><", "> <").split())
        + " {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}<|bot|>"
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 512}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "llava":
        vision = CLIPVisionConfig(**small, image_size=32, patch_size=16, projection_dim=8)
        config = LlavaConfig(vision, LlamaConfig(**text, **ends), image_token_index=words.index("<image>"))
        network: Any = LlavaForConditionalGeneration(config)
        processor: Any = LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
            tokenizer,
            patch_size=16,
            vision_feature_select_strategy="default",
            chat_template=template,
            num_additional_image_tokens=1,
        )
    else:
        vision_settings = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
        rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
        numbers = {name: words.index(f"<|{name.replace('_token_id', '')}|>") for name in ("vision_start_token_id",)}
        network = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={**text, **ends, "rope_scaling": rope},
                vision_config=vision_settings,
                image_token_id=words.index("<|image_pad|>"),
                video_token_id=words.index("<|video_pad|>"),
                **numbers,
            )
        )
        sizes = {"min_pixels": 28 * 28 * 2, "max_pixels": 28 * 28 * 8}
        processor = Qwen2VLProcessor(
            Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=template
        )
    network.generation_config.eos_token_id = 1
    network.save_pretrained(path)
    processor.save_pretrained(path)
    return path
