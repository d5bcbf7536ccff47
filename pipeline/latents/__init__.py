"""Latents: how pictures get to the encoders, how text states are packed, how latents are checked and loaded."""
