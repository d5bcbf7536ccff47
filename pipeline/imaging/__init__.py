"""Decoding, checking and transforming images, in worker processes that isolate bad images from the rank."""
