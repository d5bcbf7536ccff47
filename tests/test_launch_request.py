"""What a command asks of SLURM: presets, keys for one stage, options of sbatch; and what the job scripts look like."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from launch import precheck, slurm
from launch.request import PRESETS, Request, read
from launch.script import Array, Script
from launch.submit import Job, jobs_of
from launch.submit import main as submit_main
from pipeline.config.schema import MAIN_LINE, STAGES, ConfigError, LaunchConfig

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "data"
SHIPPED = sorted((ROOT / "slurm").glob("*.sbatch"))
PRESET = """
kind: slurm
partition: cpu
tasks_per_node: 16
slurm_mail_type: END
precompute: {partition: gpu, gpus_per_node: 8, tasks_per_node: 0, slurm_exclusive: true}
"""


def jobs(*arguments: str) -> dict[str, Job]:
    launch = read(["cluster=slurm", *arguments])
    return {job.stage: job for job in jobs_of(launch.config, launch.settings, launch.requests)}


def script(*arguments: str, max_array: int = 0) -> Script:
    (job,) = jobs(*arguments).values()
    return slurm.scripts_of(job, max_array)[0]


# ---- layers


def test_no_key_means_a_setting_of_a_stage_and_of_the_launcher() -> None:
    own = {f.name for f in fields(LaunchConfig)}
    for stage, cls in STAGES.items():
        assert not own & {f.name for f in fields(cls)}, stage


def test_a_preset_gives_resources_to_all_stages_and_to_one(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(PRESET)
    launch = read([f"cluster={path}", "stage=all", "nodes=3", "precompute.nodes=5", "precompute.batch_size=7"])
    assert launch.kind == "slurm"
    assert launch.settings == {"precompute.batch_size": "7"}
    filter_, precompute = launch.requests["filter"], launch.requests["precompute"]
    assert (filter_.config.partition, filter_.config.nodes, filter_.config.tasks_per_node) == ("cpu", 3, 16)
    assert (precompute.config.partition, precompute.config.nodes, precompute.config.gpus_per_node) == ("gpu", 5, 8)
    assert filter_.options == {"mail_type": "END"}
    assert precompute.options == {"mail_type": "END", "exclusive": "true"}


def test_the_command_line_wins_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(PRESET)
    launch = read([f"cluster={path}", "stage=precompute", "partition=debug", "slurm_exclusive=false"])
    assert launch.requests["precompute"].config.partition == "debug"
    assert "exclusive" not in Script("filter", "n", "", (), tmp_path, launch.requests["precompute"]).options()


@pytest.mark.parametrize("name", [path.stem for path in PRESETS.glob("*.yaml")])
def test_every_preset_that_we_ship_is_valid(name: str) -> None:
    assert read([f"cluster={name}", "stage=filter"]).kind == "slurm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster=slrm"], "cluster=slrm: no such preset; did you mean slurm?"),
        (["cluster=slurm", "ranks=8"], "ranks= is for cluster=local; on SLURM: nodes= and tasks_per_node="),
        (["cluster=slurm", "nodes=0"], "nodes=0: must be at least 1"),
        (["cluster=slurm", "nodes=many"], "nodes=many: expected a whole number"),
        (["cluster=slurm", "slurm_array=1-3"], "slurm_array= is set by the launcher: use array="),
        (["cluster=slurm", "slurm_job_name=mine"], "slurm_job_name= is set by the launcher"),
        (["cluster=slurm", "container_runtime=docker"], "container_runtime=docker: "),
        (["cluster=slurm", "gpus_per_node=h100:many"], "gpus_per_node=h100:many: expected a number, or a type and a"),
        (["cluster=slurm", "gpus=9", "nodes=2"], "gpus=9: not the same number on each of nodes=2: use gpus_per_node="),
        (["cluster=slurm", "gpus=8", "gres=gpu:8"], "gpus and gres=gpu request GPUs twice: use only gpus_per_node="),
        (["cluster=slurm", "gpu_type=h100"], "gpu_type=h100: there are no GPUs; set gpus_per_node="),
        (["cluster=slurm", "gpu_bind=closest"], "gpu_bind=closest: there are no GPUs; set gpus_per_node="),
        (["cluster=slurm", "time=1:30", "signal_seconds=90"], "signal_seconds=90: ranks would be told to stop as soon"),
        (["cluster=slurm", "time=soon"], "time=soon: expected minutes, hours:minutes:seconds or days-hours"),
        (["cluster=slurm", "after=later"], "after=later: expected the ids of jobs, as 1234 or 1234,1240"),
        (["cluster=slurm", "nods=3"], "unknown key 'nods' for stage filter; did you mean nodes"),
        (["cluster=slurm", "filtr.nodes=3"], "no stage 'filtr'; did you mean filter?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        launch = read(["stage=filter", *arguments])
        jobs_of(launch.config, {"data_dir": "/d", "dataset": "shapes", **launch.settings}, launch.requests)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partition: cpu", "expected a mapping with kind: local, inline, slurm"),
        ("kind: slurm\npartitoin: cpu", "unknown key 'partitoin'; did you mean partition"),
        ("kind: slurm\nfilter: {nods: 2}", "unknown key 'filter.nods'; did you mean nodes"),
        ("kind: slurm\ntime: 1\ntime: 2", "time is given more than once"),
        ("kind: [", "not YAML"),
    ],
)
def test_a_wrong_preset_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"site\.yaml") as error:
        read([f"cluster={path}", "stage=filter"])
    assert message in str(error.value)


# ---- scripts


def options(*arguments: str) -> dict[str, str]:
    return script("dataset=shapes", "data_dir=/d", *arguments).options()


def test_what_is_not_asked_for_is_left_to_the_site() -> None:
    assert set(options("stage=filter")) == {
        "job-name", "comment", "nodes", "ntasks-per-node", "cpus-per-task", "chdir", "output", "open-mode", "requeue",
        "signal",
    }  # fmt: skip


def test_gpus_make_as_many_ranks_unless_told_otherwise() -> None:
    assert options("stage=precompute", "gpus_per_node=8")["ntasks-per-node"] == "8"
    assert options("stage=precompute", "gpus_per_node=8", "tasks_per_node=2")["ntasks-per-node"] == "2"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gpus_per_node=a100:4"], ("a100:4", "4", None)),
        (["gpus=h100:8", "nodes=2"], ("h100:4", "4", None)),
        (["gpus_per_node=2", "gpu_type=mi300"], ("mi300:2", "2", None)),
        (["gres=gpu:h100:8,nvme:1"], ("h100:8", "8", "nvme:1")),
        (["gres=gpu"], ("1", "1", None)),
        (["gres=nvme:1"], (None, "1", "nvme:1")),
    ],
)
def test_gpus_are_asked_for_in_each_way_that_people_know(
    arguments: list[str], expected: tuple[str | None, str, str | None]
) -> None:
    said = options("stage=precompute", *arguments)
    assert (said.get("gpus-per-node"), said["ntasks-per-node"], said.get("gres")) == expected


def test_gpus_of_a_preset_give_way_to_those_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("kind: slurm\ngpus_per_node: a100:8\nprecompute: {gpus: h100:16, nodes: 4}")
    asked = {stage: read([f"cluster={path}", "stage=all"]).requests[stage].config for stage in ("train", "precompute")}
    assert [(c.gpu_type, c.gpus_per_node) for c in asked.values()] == [("a100", 8), ("h100", 4)]
    assert read([f"cluster={path}", "stage=train", "gpus_per_node=2"]).requests["train"].config.gpus_per_node == 2
    assert read(["stage=cost", "gpus=8"]).settings == {"gpus": "8"}  # a setting of that stage


def test_what_people_ask_of_sbatch_has_a_name() -> None:
    said = options(
        "stage=filter", "licenses=matlab:2", "nice=100", "begin=now+2hours", "comment=for the paper",
        "mail_user=me@x.org",
    )  # fmt: skip
    wanted = {
        "licenses": "matlab:2",
        "nice": "100",
        "begin": "now+2hours",
        "comment": "/d/shapes/train/filter for the paper",
    }
    assert wanted.items() <= said.items()
    assert (said["mail-user"], said["mail-type"]) == ("me@x.org", "END,FAIL")
    assert options("stage=filter", "mail_type=BEGIN,END")["mail-type"] == "BEGIN,END"


def test_a_stage_of_one_process_is_one_whatever_the_others_get() -> None:
    line = jobs("stage=all", "dataset=shapes", "data_dir=/d", "nodes=4", "gpus_per_node=8", "array=3", "train.array=0")
    sizes = {stage: slurm.scripts_of(job)[0].options() for stage, job in line.items()}
    assert [sizes["report"][key] for key in ("nodes", "ntasks-per-node")] == ["1", "1"]
    assert "gpus-per-node" not in sizes["report"] and sizes["generate"]["gpus-per-node"] == "1"
    assert "array" not in sizes["report"] and sizes["filter"]["array"] == "0-2"


def test_values_with_spaces_are_quoted_and_line_breaks_refused() -> None:
    assert "#SBATCH --mail-user='a b'" in script(
        "stage=filter", "dataset=shapes", "data_dir=/d", "slurm_mail_user=a b"
    ).text.splitlines()  # fmt: skip
    with pytest.raises(ConfigError, match="only printable characters, on one line"):
        _ = script("stage=filter", "dataset=shapes", "data_dir=/d", "slurm_comment2=a\nb").text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["container=/i/a.sif", "container_args=--nv"], "export CONTAINER='apptainer exec --nv /i/a.sif'"),
        (["container=/i/a.sif", "container_runtime=singularity"], "export CONTAINER='singularity exec /i/a.sif'"),
        (
            ["container=a.sqsh", "container_runtime=pyxis", "srun_args=--mpi=none"],
            "export SRUN_ARGS='--container-image=a.sqsh --mpi=none'",
        ),
        (["cpu_bind=ldoms", "mem_bind=local"], "export SRUN_ARGS='--cpu-bind=ldoms --mem-bind=local'"),
        (["lives=9"], "export LIVES=9"),
        (["bad_nodes=0"], "export BAD_NODES=0"),
        (["stagger=30"], "export STAGGER=30"),
        (["notify=https://hooks.example.org/T0/secret"], "NOTIFY=https://hooks.example.org/T0/secret"),
        (["setup=module load cuda; export A=1"], "module load cuda; export A=1"),
    ],
)
def test_settings_reach_the_script(arguments: list[str], line: str) -> None:
    text = " ".join(script("stage=filter", "dataset=shapes", "data_dir=/d", *arguments).text.split("  "))
    assert line in text.splitlines()


def test_a_script_tells_again_what_it_was_made_for(tmp_path: Path) -> None:
    """So that the same output asked for with other settings is noticed while its job still waits."""
    arguments = ["stage=filter", "dataset=shapes", f"data_dir={tmp_path}", "input=/a b/c", "encode_quality=90"]
    (job,) = jobs(*arguments).values()
    (tmp_path / "7_submission.sh").write_text(slurm.scripts_of(job)[0].text)
    assert precheck.arguments_of(tmp_path / "7_submission.sh")[0]["input"] == "/a b/c"
    assert precheck.differences(job, tmp_path / "7_submission.sh") == ([], [])
    (other,) = jobs(*arguments[:-1], "encode_quality=95", "workers=3").values()
    assert precheck.differences(other, tmp_path / "7_submission.sh") == (
        ["encode_quality=90, now 95"],
        ["workers=unset, now 3"],
    )
    assert precheck.differences(job, tmp_path / "gone.sh") == ([], [])


def test_a_large_array_is_cut_and_shares_what_may_run_at_a_time() -> None:
    (job,) = jobs("stage=filter", "dataset=shapes", "data_dir=/d", "array=25", "array_parallelism=9").values()
    arrays = [one.array for one in slurm.scripts_of(job, 10)]
    assert arrays == [Array(10, 0, 25, 3), Array(10, 10, 25, 3), Array(5, 20, 25, 3)]
    texts = [one.options()["array"] for one in slurm.scripts_of(job, 10)]
    assert texts == ["0-9%3", "0-9%3", "0-4%3"]


def test_ranks_that_wait_for_each_other_cannot_be_an_array() -> None:
    (job,) = jobs("stage=train", "dataset=shapes", "data_dir=/d", "array=4").values()
    with pytest.raises(ConfigError, match="array=4: the ranks of stage train wait for each other: use nodes="):
        slurm.scripts_of(job)


def test_the_same_work_has_the_same_name_and_other_work_another() -> None:
    names = [
        script("stage=filter", "dataset=shapes", "data_dir=/d", *more).name
        for more in ([], ["nodes=3"], ["variant=b"], ["output=/e"])
    ]
    assert names[0] == names[1] and len(set(names)) == 3


def submitted(*stages: str, array: bool = False) -> list[slurm.Submitted]:
    line = jobs("stage=all", "dataset=shapes", "data_dir=/d", *(["array=2", "train.array=0"] if array else []))
    return [
        slurm.Submitted(line[stage], (str(number),), "", slurm.scripts_of(line[stage]))
        for number, stage in enumerate(stages, 1)
    ]


def test_jobs_wait_for_those_whose_results_they_need() -> None:
    before = submitted("precompute", "train", "generate")
    line = jobs("stage=all", "dataset=shapes", "data_dir=/d")
    assert slurm.dependency_of(line["download"], []) == {}
    assert slurm.dependency_of(line["generate"], before[:2])["dependency"] == "afterok:1,afterok:2"
    assert slurm.dependency_of(line["report"], before)["dependency"] == "afterok:1,afterok:2,afterok:3"
    assert slurm.dependency_of(line["report"], before)["kill-on-invalid-dep"] == "yes"


def test_jobs_can_wait_for_jobs_of_others() -> None:
    line = jobs("stage=download,filter", "dataset=shapes", "data_dir=/d", "after=12,afterany:13_4")
    first = slurm.dependency_of(line["download"], [])
    assert first == {"dependency": "afterok:12,afterany:13_4", "kill-on-invalid-dep": "yes"}
    before = [slurm.Submitted(line["download"], ("14",), "", slurm.scripts_of(line["download"]))]
    assert slurm.dependency_of(line["filter"], before)["dependency"] == "afterok:14"  # which waits for the others
    (job,) = jobs("stage=filter", "dataset=shapes", "data_dir=/d", "slurm_dependency=singleton").values()
    assert slurm.dependency_of(job, [])["dependency"] == "singleton"


def test_of_an_array_no_single_element_has_to_succeed() -> None:
    line = jobs("stage=all", "dataset=shapes", "data_dir=/d")
    assert slurm.dependency_of(line["filter"], submitted("download", array=True))["dependency"] == "afterany:1"


# ---- what is generated and what is shipped


def golden(name: str, text: str) -> None:
    """Compare with the file; UPDATE_GOLDEN=1 writes it."""
    shown = text.replace(str(ROOT), "/home/me/latentmill").replace(sys.prefix, "/home/me/latentmill/.venv")
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(shown)
    assert shown == path.read_text(), f"if the change is meant: UPDATE_GOLDEN=1 pytest {Path(__file__).name}"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "filter.sbatch",
            ["stage=filter", "nodes=4", "tasks_per_node=16", "mem=32G", "time=24:00:00", "partition=cpu"],
        ),
        ("shard_array.sbatch", ["stage=shard", "array=10", "array_parallelism=4", "account=mine", "shuffle=true"]),
        ("train.sbatch", ["stage=train", "nodes=2", "gpus_per_node=8", "cpus_per_task=8", "setup=module load cuda"]),
    ],
)
def test_generated_scripts_are_as_recorded(monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("launch.script._in_venv", lambda: True)
    golden(name, script("dataset=shapes", "data_dir=/data", "run_id=1", *arguments).text)


def skeleton(text: str) -> list[str]:
    """The parts that every job script has, in their order."""
    parts = [
        ("shebang", r"#!/usr/bin/env bash$"),
        ("name", r"#SBATCH --job-name="),
        ("size", r"#SBATCH --nodes="),
        ("size", r"#SBATCH --ntasks-per-node="),
        ("size", r"#SBATCH --cpus-per-task="),
        ("log", r"#SBATCH --output=.*%x-(%j|%A_%a)\.out$"),
        ("append", r"#SBATCH --open-mode=append$"),
        ("requeue", r"#SBATCH --requeue$"),
        ("signal", r"#SBATCH --signal=USR2@\d+$"),
        ("strict", r"set -euo pipefail$"),
        ("settings", r"# ---- settings"),
        ("job", r"# ---- the job$"),
        ("environment", r'source "\S+/slurm/env\.sh"'),
        ("shared part", r'source "\$LATENTMILL_HOME/slurm/job\.sh"$'),
        ("run", r'"?run(_together|_torchrun|_\$LAUNCHER")? (python )?-m pipeline\.stages\.\w+'),
    ]
    found = [next((name for name, pattern in parts if re.match(pattern, line)), "") for line in text.splitlines()]
    return [name for number, name in enumerate(found) if name and name != (found[number - 1] if number else "")]


@pytest.mark.parametrize(
    "path", [*SHIPPED, *sorted(GOLDEN.glob("*.sbatch"))], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_shipped_and_generated_scripts_have_one_shape(path: Path) -> None:
    text = path.read_text()
    wanted = [
        "shebang", "name", "size", "log", "append", "requeue", "signal", "strict", "settings", "job", "environment",
        "shared part", "run",
    ]  # fmt: skip
    assert list(dict.fromkeys(skeleton(text))) == wanted
    last = text.replace("\\\n", "").rstrip().rpartition("\n")[2]  # what comes after could hide how ranks ended
    assert re.match(r'"?run', last)


def test_there_is_a_script_for_each_stage_of_the_main_line() -> None:
    assert {path.stem for path in SHIPPED} == {*MAIN_LINE, "convert_imagenet"}


@pytest.mark.parametrize("path", [*SHIPPED, *sorted((ROOT / "slurm").glob("*.sh"))], ids=lambda path: path.name)
def test_bash_understands_the_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert max(map(len, path.read_text().splitlines())) <= 120
    assert path.suffix != ".sbatch" or os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ("", "vae=sd batch_size=32 split=train "),
        ("vae=embedded seed=3", "batch_size=32 split=train "),
        ("--vae embedded --batch-size=8", "split=train "),
    ],
)
def test_arguments_of_a_script_win_over_its_settings(arguments: str, left: str) -> None:
    """They would be given twice otherwise, which is an error."""
    words = f"settings vae=sd batch_size=32 split=train -- {arguments}"
    script = f'set -euo pipefail; source {ROOT}/slurm/job.sh; {words}; printf "%s " "${{SETTINGS[@]}}"'
    environment = {**os.environ, "LATENTMILL_CHECK": "1"}
    assert subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True).stdout == left


def test_a_batch_size_for_a_whole_chain_is_refused() -> None:
    environment = {**os.environ, "DATASET": "shapes", "DATA_DIR": "/d", "BATCH_SIZE": "8"}
    done = subprocess.run([ROOT / "slurm/pipeline.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "BATCH_SIZE=8: of which stage? Set PRECOMPUTE_BATCH_SIZE and TRAIN_BATCH_SIZE\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_setting_of_a_script_can_come_from_outside(path: Path) -> None:
    block = path.read_text().partition("# ---- settings")[2].partition("# ---- the job")[0]
    names = re.findall(r"^(\w+)=(.*)$", block, re.MULTILINE)
    assert len(names) >= 5
    for name, value in names:
        assert value.startswith((f"${{{name}:-", f"${{{name}:?")), f"{path.name}: {name}={value}"


# ---- no SLURM


def submit(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/submit.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


def test_without_slurm_one_line_says_so(tmp_path: Path) -> None:
    arguments = ["stage=filter", "dataset=shapes", f"data_dir={tmp_path}", "cluster=slurm"]
    done = submit(*arguments, environment={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == (
        "error: cluster=slurm: no sbatch on this machine: submit from a login node of the cluster, or cluster=local\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_no_secret_of_a_url(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text("source: http_archive\n")
    url = "https://user:hush@example.org/part.tar?part=1&token=hushhush"
    arguments = ["stage=download", f"dataset={tmp_path}/web.yaml", f"urls=[{url}]", f"data_dir={tmp_path}"]
    done = submit(*arguments, "cluster=slurm", "dry_run=true", environment={**os.environ, "PATH": str(tmp_path)})
    assert "https://example.org/part.tar?part=1&token=..." in done.stdout, done.stderr
    assert "hush" not in done.stdout + done.stderr


def test_a_dry_run_shows_of_a_webhook_only_its_host(tmp_path: Path) -> None:
    arguments = ["stage=filter", "dataset=shapes", f"data_dir={tmp_path}", "cluster=slurm", "dry_run=true"]
    notify = "notify=https://hooks.example.org/services/T0/B0/hush"
    done = submit(*arguments, notify, environment={**os.environ, "PATH": str(tmp_path)})
    assert "NOTIFY=<a URL at hooks.example.org>" in done.stdout, done.stderr
    assert "hush" not in done.stdout + done.stderr


UNCONFIGURED = """#!/bin/sh
echo "scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host" >&2
echo "scontrol: fatal: Could not establish a configuration source" >&2
exit 1
"""


@pytest.mark.parametrize("commands", [(), ("sbatch", "squeue", "srun", "scontrol")])
def test_a_dry_run_without_slurm_shows_the_scripts_all_the_same(
    tmp_path: Path, commands: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in commands:
        (tmp_path / name).write_text(UNCONFIGURED)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["stage=filter", "dataset=shapes", f"data_dir={tmp_path}", "cluster=slurm"]
    assert submit_main([*arguments, "dry_run=true"]) == 0
    said = capsys.readouterr()
    why = "belong to no cluster" if commands else "no sbatch on this machine"
    assert "#SBATCH --requeue" in said.out and said.out.count(why) == 1
    assert "resolve" not in said.out + said.err
    with pytest.raises(SystemExit) as refused:
        submit_main(arguments)
    said = capsys.readouterr()
    assert refused.value.code == 2 and said.err.startswith("error: ") and why in said.err
    assert {path.name for path in tmp_path.iterdir()} == set(commands)


def test_variables_of_a_job_around_the_launcher_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    with slurm.outer_job_forgotten():
        assert os.environ["SBATCH_ACCOUNT"] == "mine"  # outside of a job it is the user's own
    for name in ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SLURM_NTASKS", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "7")
    with slurm.outer_job_forgotten():
        left = {name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SRUN"))}
        assert left == {"SLURM_CONF"}
    assert os.environ["SLURM_NTASKS"] == "7"


def test_only_a_controller_that_is_away_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    tries: list[str] = []

    def fail(message: str) -> None:
        tries.append(message)
        raise slurm.SlurmError(message)

    with pytest.raises(slurm.SlurmError):
        slurm.persistently(lambda: fail("invalid partition specified: nowhere"))
    assert len(tries) == 1
    with pytest.raises(slurm.SlurmError):
        slurm.persistently(lambda: fail("Unable to contact slurm controller (connect failure)"))
    assert len(tries) > 5


def test_the_request_of_a_stage_without_preset_is_that_of_the_command() -> None:
    (job,) = jobs_of(LaunchConfig(stage="filter", nodes=3), {"dataset": "shapes", "data_dir": "/d"})
    assert job.request == Request(LaunchConfig(stage="filter", nodes=3))
