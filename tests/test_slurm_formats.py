"""slurm/convert_imagenet.sbatch on a real SLURM, to every storage format."""

from __future__ import annotations

from pathlib import Path

from formats.conftest import FORMATS, convert, write_folder
from slurm_cluster.cluster import Cluster
from test_slurm_launch import ROOT, TEMPLATE, await_end, content, logs_below


def test_a_folder_becomes_every_format_with_the_same_bytes_as_in_one_process(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    images = write_folder(tmp_path / "train", 30)
    jobs = []
    for format in FORMATS:
        places = {"INPUT": str(images), "OUTPUT": str(tmp_path / format), "LOGS": str(tmp_path / "logs")}
        environment = {**TEMPLATE, **places, "FORMAT": format, "SHAPE": "[32,40]"}
        options = ["--nodes=2", "--ntasks-per-node=2", "--mem=500M", f"--chdir={tmp_path}"]
        command = ["sbatch", "--parsable", *options, ROOT / "slurm/convert_imagenet.sbatch", "partition_size=8"]
        jobs.append(slurm_cluster.run(*command, environment=environment).stdout.strip())
    assert await_end(slurm_cluster, *jobs) == ["COMPLETED"] * len(FORMATS), logs_below(tmp_path)
    for format in FORMATS:
        here = convert(images, tmp_path / "here" / format, format, partition_size=8)
        assert content(tmp_path / format) == content(here), format
