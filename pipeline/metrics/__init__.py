"""Metrics of model outputs, independent of the models."""
