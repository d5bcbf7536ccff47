"""Prints one rank's findings to standard output: ``python -m pipeline.doctor key=value ...`` under any launcher."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pipeline.config import cli
from pipeline.config.schema import DoctorConfig
from pipeline.distributed import Rank, distributed
from pipeline.doctor import filesystem, gpus, hub_access, machine, network, speed
from pipeline.doctor.finding import Finding, Report
from pipeline.imaging.worker_pool import available_cpus

_SHORT, _LONG = 60.0, 300.0  # seconds; importing torch on a cold file system takes minutes


@distributed(timeout=120)
def main(rank: Rank, config: DoctorConfig) -> None:
    report = Report(rank.node, rank.rank if rank.launched else -1)
    first_of_node = rank.local_rank == 0
    if first_of_node:
        report.run("machine", lambda: machine.look(config.cpus), _SHORT)
        names = [name for name in (config.vae, config.text_encoder) if name]
        report.run("hub", lambda: hub_access.look(names), _SHORT)
        if config.data_dir:
            report.run("data_dir", lambda: filesystem.look(config.data_dir, rank.rank == 0), _SHORT)
    report.run("gpus", lambda: gpus.look(config.gpus, first_of_node), _LONG)
    if rank.world_size > 1:
        together(rank, config, report)
    if first_of_node:
        report.run("speed", lambda: speeds(rank, config), _LONG + 10 * config.seconds)
    report.add(Finding("end", "ok", "through"))


def together(rank: Rank, config: DoctorConfig, report: Report) -> None:
    """Run the checks that need several ranks."""
    try:
        meeting = network.Meeting(rank, config.patience)
    except Exception as error:  # torch raises various types
        first = str(error).partition("\n")[0]
        report.add(Finding("network", "fail", f"cannot reach rank 0 at {first}", network.ADVICE))
        return
    limit = 4 * config.patience + _SHORT
    if not report.run("network", lambda: network.look(meeting), limit):
        return
    if config.data_dir:
        shared = lambda: filesystem.look_together(config.data_dir, config.run_id, meeting, config.patience)  # noqa: E731
        if not report.run("same data_dir", shared, limit):
            return
    if len(meeting.members) == rank.world_size:
        report.run("all-reduce", lambda: network.all_reduce(rank, config.mebibytes), limit)
        return
    if rank.rank == meeting.members[0]:
        report.add(Finding("all-reduce", "skip", "not tried, as not all ranks have met"))
    meeting.wait("through")
    rank.close(linger=1)  # the missing ranks will not use the store


def speeds(rank: Rank, config: DoctorConfig) -> Iterator[Finding]:
    """Measure decoding on each node and the networks on one, and compare the two."""
    decoding = speed.decoding(min(config.image_resolutions), config.seconds)
    yield decoding
    if rank.rank or not (config.vae or config.text_encoder):
        return
    encode = 0.0
    device = rank.device
    for finding in speed.encoders(
        config.vae, config.text_encoder, config.image_resolutions, config.batch_size, config.seconds, device
    ):
        yield finding
        encode = finding.values.get("encode", encode)
    cpus = available_cpus() if rank.launcher == "slurm" else available_cpus(rank.local_world_size)
    yield speed.balance(decoding.values["decode"], encode, cpus, device.type == "cuda")


if __name__ == "__main__":
    with cli.errors_as_one_line():
        settings = cli.build(DoctorConfig, cli.parse(sys.argv[1:]))
    main(settings)
