"""Options of the stages that encode images and captions: precompute, texts and features."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

from pipeline.config.decoding import DecodingConfig
from pipeline.config.options import option
from pipeline.config.run import DeviceConfig, StageConfig, seed_option
from pipeline.registry import Traits


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(DeviceConfig, StageConfig):
    """Every stage that stores what frozen networks compute."""

    model_dtype: str = option(
        "bfloat16",
        "precision of the encoder on a GPU (CPUs use float32)",
        identity=True,
        choices=("float32", "float16", "bfloat16"),
    )
    save_dtype: str = option(
        "float16", "precision of the stored latents and states", identity=True, choices=("float16", "float32")
    )
    shard_bytes: int = option(2**26, "largest size of one data file", identity=True, ge=1, le=2**32 - 1)
    threads: int = option(
        1, "CPU threads per rank (results depend on it in the last bit)", identity=True, ge=1, le=1024
    )


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(NetworkConfig, DecodingConfig):
    """Every stage that encodes images with a frozen network."""

    inherited: ClassVar = {"DecodingConfig": "workers!=0"}

    workers: int = option(
        -1,
        "decoding processes per rank (-1: one without a GPU, else its CPUs but one; 0: none, unprotected)",
        ge=-1,
        le=1024,
    )


@dataclass(frozen=True, kw_only=True)
class TextStatesConfig(NetworkConfig):
    """Every stage that encodes captions."""

    text_encoder: tuple[str, ...] = option(
        ("embedded",),
        "embedded, openclip:<model>[:<pretrained>], clip:<repo or folder>, t5:<repo or folder>[#length=256#mask=true], "
        "hf:<repo or folder>[#layer=-2#length=256#template=chat#drop_prefix=true#device_map=auto]; "
        "the first one's states are caption_latents, of further ones caption_latents_2, ...; CLIPs take "
        "#layer=penultimate; <pipeline>/text_encoder_2 is a pipeline's second one",
        identity=True,
    )
    encode_captions: str = option(
        "first",
        "encode the first caption of a sample, or all: training then draws one of them at random in each epoch",
        identity=True,
        choices=("first", "all"),
    )
    pooled: bool = option(
        False, "store pooled text embeddings, too, as caption_pooled, caption_pooled_2, ... (CLIPs)", identity=True
    )
    text_storage: str = option(
        "dense",
        "text states as they are, or in 8 bits with a scale per token; ragged: without padding; dedup: one copy per "
        "distinct caption of a partition",
        identity=True,
        choices=tuple(
            "+".join(part for part in parts if part) or "dense"
            for parts in product(("", "int8", "fp8"), ("", "ragged"), ("", "dedup"))
        ),
    )


@dataclass(frozen=True, kw_only=True)
class TextsConfig(TextStatesConfig):
    """stage=texts: text-encoder states alone, for stage=precompute to put next to latents: so that the text encoder and
    the autoencoder need not fit into a GPU together."""

    traits: ClassVar = Traits(upstream=("shard",), partitioned=True, gpus=True)


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(EncodingConfig, TextStatesConfig):
    """stage=precompute: image latents at each resolution and text-encoder states, as MDS."""

    traits: ClassVar = Traits(upstream=("texts", "shard"), partitioned=True, gpus=True)

    vae: str = option(
        "embedded",
        "embedded, embedded16, or an autoencoder of diffusers (Stable Diffusion, FLUX, SANA, Qwen-Image, Wan): "
        "owner/name[@revision] or a folder",
        identity=True,
    )
    image_encoder: str = option(
        "",
        "store an image_embedding too: embedded, openclip:<model>[:<pretrained>], clip:<repo or folder>, hf:<repo or "
        "folder> (SigLIP, DINO, ViT) or program:<file>",
        identity=True,
    )
    image_features: str = option(
        "",
        "store image_features_<resolution> too, tokens of the patches of what latents are made of, for representation "
        "alignment: hf:<repo or folder> (DINOv2, DINOv3, SigLIP, CLIP, ViT) or embedded",
        identity=True,
    )
    features_storage: str = option(
        "dense",
        "image features in save_dtype, or in 8 bits with a scale per token",
        identity=True,
        choices=("dense", "int8", "fp8"),
        when="image_features",
    )
    features_resolution: tuple[int, ...] = option(
        (),
        "for each of image_resolutions, edge of the square that the encoder gets, a multiple of its patch (default: a "
        "patch for 2 x 2 latents)",
        identity=True,
        ge=1,
        le=65536,
        when="image_features",
    )
    image_resolutions: tuple[int, ...] = option(
        (256, 512),
        "edges of the square crops to encode; with aspect=buckets, of squares of as many pixels",
        identity=True,
        ge=1,
        le=65536,
    )
    aspect: str = option(
        "square",
        "square crops, or buckets: each image is cropped to the one of several sizes whose aspect ratio is nearest",
        identity=True,
        choices=("square", "buckets"),
    )
    bucket_step: int = option(
        64,
        "edges of buckets are multiples of this, and of two latents of the autoencoder",
        identity=True,
        ge=1,
        le=65536,
        when="aspect=buckets",
    )
    max_aspect_ratio: float = option(
        2.0, "longer over shorter edge of a bucket, at most", identity=True, ge=1, le=64, when="aspect=buckets"
    )
    bucket_upscale: str = option(
        "true",
        "images that their bucket would enlarge: true: enlarge them; smaller: smaller buckets; false: drop them",
        identity=True,
        choices=("true", "smaller", "false"),
        when="aspect=buckets",
    )
    seed: int = seed_option(when="latent=sample or bucket_crop=random")
    bucket_crop: str = option(
        "center",
        "crop a resized image at its centre, or at a random position that depends on the seed and the sample",
        identity=True,
        choices=("center", "random"),
        when="aspect=buckets",
    )
    batch_size: str = option(
        "32", "images per forward pass; auto: as many as make a GPU fastest", identity=True, choices=("auto",), ge=1
    )
    latent: str = option(
        "sample",
        "take the posterior's sample, its mode, or its moments (mean and deviation: training draws samples of them)",
        identity=True,
        choices=("sample", "mode", "moments"),
    )
    model_dtype: str = option(
        "bfloat16",
        "precision of the text and image encoders on a GPU (CPUs use float32)",
        identity=True,
        choices=("float32", "float16", "bfloat16"),
    )
    vae_dtype: str = option(
        "float32",
        "precision of the autoencoder on a GPU (float32: with TF32; bfloat16 is faster and costs 1 to 3 % of a latent)",
        identity=True,
        choices=("float32", "float16", "bfloat16"),
        when="vae!=embedded|embedded16",
    )
    save_images: bool = option(False, "store the image files with the latents", identity=True)
    keep: str = option(
        "all",
        "latents: once the latents are verified, remove the data of earlier stages, except their ledgers",
        choices=("all", "latents"),
    )
    compile: bool = option(False, "compile the networks with torch.compile", identity=True)
    gpu_hour_price: float = option(0.0, "price of a GPU hour: events then include the cost of a million images", ge=0)

    @property
    def default_variant(self) -> str:
        return Path(self.vae).name


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(EncodingConfig):
    """stage=features: a frozen encoder's features of each image, for task=caption, as MDS."""

    traits: ClassVar = Traits(upstream=("shard",), partitioned=True, gpus=True)

    encoder: str = option(
        "embedded",
        "embedded, vit:<repo or folder>, clip:<repo or folder>, or openclip:<model>[:<pretrained>]",
        identity=True,
    )
    features: str = option(
        "patch", "all tokens of its last layer, or the one for the image", identity=True, choices=("patch", "pooled")
    )
    batch_size: int = option(32, "images per forward pass", identity=True, ge=1)
