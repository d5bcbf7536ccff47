"""Networks. Their training is in :mod:`pipeline.training`."""
