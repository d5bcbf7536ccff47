"""The loader of latents, under the name that users import."""

from pipeline.loading.latents import build_streaming_latents_dataloader

__all__ = ["build_streaming_latents_dataloader"]
