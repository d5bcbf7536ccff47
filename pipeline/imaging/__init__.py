"""Decode, judge and transform images, in worker processes that a bad image cannot take down."""
