"""Options of the isolated decoder, which every stage that decodes images has."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.options import Options, option


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(Options):
    """Limits on decoding one image."""

    decode_timeout: float = option(
        60.0, "time limit for one image, in seconds; beyond it, the image is failed:decoder_timeout", gt=0
    )
    worker_memory: int = option(
        2048,
        "memory limit for decoding one image, in MiB; beyond it, the image is failed:out_of_memory (0: no limit)",
        ge=256,
        also=(0,),
    )
