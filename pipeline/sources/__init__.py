"""Readers of samples: one module per kind of source, selected by name."""
