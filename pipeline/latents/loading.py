"""The loader of latents, under its public name."""

from pipeline.loading.latents import build_streaming_latents_dataloader

__all__ = ["build_streaming_latents_dataloader"]
