"""Public import path of the latent loader."""

from pipeline.loading.latents import build_streaming_latents_dataloader

__all__ = ["build_streaming_latents_dataloader"]
