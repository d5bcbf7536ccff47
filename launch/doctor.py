"""Check whether this machine or a cluster is ready for a job: ``python launch/doctor.py [data_dir=/data] key=value
...``.

    python launch/doctor.py data_dir=/data                       # this machine
    python launch/doctor.py data_dir=/data ranks=8 gpus=8        # this machine with eight ranks, one for each GPU
    python launch/doctor.py data_dir=/data cluster=slurm nodes=2 gpus_per_node=8 cpus_per_task=8 \\
        vae=stabilityai/stable-diffusion-xl-base-1.0             # through a small job

Exit code: 0 if no check failed, 1 if one did, 2 for a wrong setting.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def _say_missing(error: ModuleNotFoundError) -> None:
    print(
        f"fail: {sys.executable} has no package {error.name!r}\n"
        "→ make setup, then .venv/bin/python launch/doctor.py …; or activate the environment that has it",
        file=sys.stderr,
    )
    sys.exit(1)


try:
    from launch import request
    from launch.checkup import findings_table, judge, start
    from pipeline.config import cli
    from pipeline.config.schema import STAGES, ConfigError, DoctorConfig, LaunchConfig
    from pipeline.doctor.finding import Finding
except ModuleNotFoundError as missing:  # the doctor must be able to report even this
    _say_missing(missing)


def main(argv: list[str]) -> int:
    with cli.errors_as_one_line():
        if cli.wants_help(argv):
            print(cli.help_text(DoctorConfig, cli.program("doctor")))
            print("\nand the options of launch/submit.py that describe a job: cluster, nodes, gpus_per_node, …")
            return 0
        config, launch = read(argv)
        findings = check(config, launch)
        show(config, findings)
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def read(argv: list[str]) -> tuple[DoctorConfig, request.Launch]:
    """The settings: what to check, and where.

    Raises:
        ConfigError: a key or value is invalid.
    """
    given = cli.parse(argv)
    own = {f.name for f in dataclasses.fields(DoctorConfig)}
    config = cli.build(DoctorConfig, {key: value for key, value in given.items() if key in own})
    if config.stage not in STAGES:
        raise ConfigError(f"stage={config.stage}: {cli.nearest(config.stage, STAGES)}")
    rest = [f"{key}={value}" for key, value in given.items() if key not in own]
    launch = request.read([f"stage={config.stage}", *rest])
    for key in launch.settings:
        known = own | {f.name for f in dataclasses.fields(LaunchConfig)}
        raise ConfigError(f"unknown key {key!r}; {cli.nearest(key, known)}")
    return config, launch


def check(config: DoctorConfig, launch: request.Launch) -> list[Finding]:
    """Run all checks and return their findings in order."""
    if launch.kind != "slurm":
        return judge.judge(start.here(config, launch))
    from launch import slurm, slurm_commands

    try:
        slurm_commands.require_slurm()
        good, said = slurm.test_only(start.script_of(config, launch))
    except slurm_commands.SlurmError as error:
        return [Finding("SLURM", "fail", str(error), "run this on a login node of the cluster")]
    if not good:
        return [Finding("SLURM", "fail", f"refuses such a job: {said}", "fix what it names, or ask your administrator")]
    findings = [Finding("SLURM", "ok", said)]
    heard = start.on_slurm(config, launch, lambda line: print(line, file=sys.stderr, flush=True))
    if not heard.findings:
        lines = "; ".join(heard.other[-3:]) or f"srun ended with code {heard.code}"
        advice = f"if no node was free: queue= (now {config.queue:g} s), or partition=; else what srun says"
        return [*findings, Finding("SLURM", "fail", f"the job did not run: {lines}", advice)]
    return [*findings, *judge.judge(heard)]


def show(config: DoctorConfig, findings: list[Finding]) -> None:
    if config.json:
        good = not any(finding.state == "fail" for finding in findings)
        print(json.dumps({"good": good, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=1))
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(findings_table.render(findings))
    print(f"\n{findings_table.verdict(findings)}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ModuleNotFoundError as missing:
        _say_missing(missing)
