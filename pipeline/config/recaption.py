"""Options of stage=recaption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.decoding import DecodingConfig
from pipeline.config.options import option
from pipeline.config.run import CurationConfig, DeviceConfig
from pipeline.registry import Traits

_SERVER = "captioner^=openai:"
_HERE = "captioner^=transformers:|checkpoint:"
_CHAT = "captioner^=transformers:|openai:"


@dataclass(frozen=True, kw_only=True)
class RecaptionConfig(DeviceConfig, CurationConfig, DecodingConfig):
    """stage=recaption: write further captions with a vision-language model; no image is copied."""

    traits: ClassVar = Traits(upstream=("dedup-semantic", "select", "dedup", "filter"), partitioned=True, gpus=True)
    inherited: ClassVar = {"DecodingConfig": "workers!=0", "DeviceConfig": _HERE}

    captioner: str = option(
        "",
        "transformers:<repo or folder>, openai:<base URL> (any server with OpenAI's interface, such as vLLM's: "
        "http://host:8000/v1), or checkpoint:<run folder> (stage=train task=caption)",
        identity=True,
    )
    caption_prompt: tuple[str, ...] = option(
        (),
        "prompts, which may contain columns of the sample, such as {caption}; each prompt gives a caption "
        "(default: Describe this image in one or two sentences.)",
        identity=True,
    )
    system: str = option("", "system message before the prompt", identity=True, when=_CHAT)
    captions_per_prompt: int = option(1, "captions for each prompt", identity=True, ge=1, le=64)
    temperature: float = option(
        0.0, "sampling temperature; 0: always the most likely token", identity=True, ge=0, le=10
    )
    max_tokens: int = option(
        128,
        "longest caption in tokens; a longer one is cut after its last complete sentence",
        identity=True,
        ge=1,
        le=65536,
    )
    image_edge: int = option(
        1024,
        "larger images are resized to this length of their longer edge before the model sees them",
        identity=True,
        ge=16,
    )
    attempts: int = option(
        3,
        "attempts per caption if the answer is a refusal, repeats itself, is empty or is cut off",
        identity=True,
        ge=1,
        le=100,
    )
    retry_temperature: float = option(0.7, "temperature of all attempts except the first", identity=True, ge=0, le=10)
    refusals: tuple[str, ...] = option(
        (), "additional beginnings that mark an answer as a refusal, such as [the image does not show]", identity=True
    )
    without_caption: str = option(
        "fail",
        "what happens to a sample that gets no caption: it fails, or keeps its original captions",
        identity=True,
        choices=("fail", "keep"),
    )
    first: str = option(
        "new", "which captions come first in captions; the column caption holds the first one", identity=True,
        choices=("new", "original"),
    )  # fmt: skip
    caption_source: str = option("recaption", "name of the new captions in the column caption_sources", identity=True)
    batch_size: int = option(8, "images per forward pass", identity=True, ge=1, le=4096, when=_HERE)
    model_dtype: str = option(
        "bfloat16",
        "precision of the model on a GPU (CPUs use float32)",
        identity=True,
        choices=("float32", "float16", "bfloat16"),
        when=_HERE,
    )
    threads: int = option(
        1, "CPU threads per rank (results depend on it in the last bit)", identity=True, ge=1, le=1024, when=_HERE
    )
    gpu_hour_price: float = option(0.0, "price of a GPU hour; with it, the events include the cost", ge=0, when=_HERE)
    served_model: str = option("", "name of the model on the server", identity=True, when=_SERVER)
    connections: int = option(16, "concurrent requests per rank", ge=1, le=4096, when=_SERVER)
    requests_per_minute: float = option(0.0, "limit for all ranks together (0: no limit)", ge=0, when=_SERVER)
    tokens_per_minute: float = option(0.0, "limit for all ranks together (0: no limit)", ge=0, when=_SERVER)
    timeout: float = option(120.0, "seconds to wait for an answer", gt=0, when=_SERVER)
    retries: int = option(
        5, "retries of a request that the server does not answer, with exponential backoff", ge=0, le=100, when=_SERVER
    )
    token_budget: int = option(
        0,
        "stop after this many tokens of prompts and answers (0: no limit); rerun with a larger value to resume",
        ge=0,
        when=_SERVER,
    )
    prompt_price: float = option(
        0.0, "price of a million prompt tokens; with it, the events include the cost", ge=0, when=_SERVER
    )
    answer_price: float = option(0.0, "price of a million completion tokens", ge=0, when=_SERVER)
    api_key_env: str = option(
        "OPENAI_API_KEY", "environment variable that holds the API key (unset: no key is sent)", when=_SERVER
    )
    workers: int = option(1, "decoding processes per rank (0: in the rank itself, unprotected)", ge=0, le=1024)
