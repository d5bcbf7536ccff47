"""Metrics of the output of models, independent of the models."""
