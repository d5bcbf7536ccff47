"""Networks only; how they are trained is in :mod:`pipeline.training`."""
