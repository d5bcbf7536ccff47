"""Latentmill: from raw image-text data to latents and trained models, as ranks of a batch job."""

from pipeline.startup import report_missing_modules

report_missing_modules()
