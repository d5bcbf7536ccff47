"""The precompute pipeline: decoding ahead of the encoders, encoding, and validation of latents."""
