"""Latentmill: from raw image-text data to latents and trained models, as ranks of a batch job."""

import os.path
import sys

from pipeline.config.interpreter import ensure
from pipeline.config.startup import report_missing_modules

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # python -m pipeline.stages.filter
    ensure(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
report_missing_modules()
