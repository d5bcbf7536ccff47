"""Measures of how good a model's output is, independent of the models."""
