"""Whether a stage is already finished: ``python -m launch.finished pipeline.stages.<stage> key=value ...``.

The exit code is 0 if so, otherwise 1. slurm/pipeline.sh calls it, and does not submit finished stages.
"""

from __future__ import annotations

import sys

from launch.job import Job
from launch.request import Request
from launch.slurm import already_done
from launch.submit import output_of
from pipeline.config import cli
from pipeline.config.schema import ConfigError, LaunchConfig


def main(argv: list[str]) -> int:
    stage = argv[0].rpartition(".")[2]
    try:
        config = cli.load(stage, argv[1:])
        job = Job(stage, config, tuple(argv[1:]), 1, output_of(stage, config), Request(LaunchConfig(stage=stage)))
    except ConfigError:
        return 1  # the job will report the error
    return 0 if already_done(job) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
