"""Image autoencoders, text encoders and image encoders."""
