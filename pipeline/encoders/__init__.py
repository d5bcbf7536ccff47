"""Image autoencoders and text encoders: from pictures and captions to what models train on."""
