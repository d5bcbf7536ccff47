"""pack=true: which stages share a job, what the job asks for, and its script."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_launch_request import ROOT, golden

from launch import slurm
from launch.pack import comment, gpu_count, packed, places
from launch.quantities import clock, mebibytes, minutes
from launch.request import read
from launch.submit import Job, jobs_of, per_dataset
from pipeline.config.schema import ConfigError

GPUS = ("precompute.gpus_per_node=8", "train.gpus_per_node=4", "generate.gpus_per_node=1")


def pack(*arguments: str, mode: str = "true") -> list[Job]:
    launch = read(["cluster=slurm", "data_dir=/d", f"pack={mode}", *arguments])
    jobs = [job for own in per_dataset(launch.settings) for job in jobs_of(launch.config, own, launch.requests)]
    return packed(jobs, launch.config.pack)


def names(jobs: list[Job]) -> list[list[str]]:
    return [[part.stage for part in job.parts] or [job.stage] for job in jobs]


LINE = "stage=download,filter,shard,precompute,train,generate,report"


@pytest.mark.parametrize(
    ("mode", "arguments", "expected"),
    [
        ("true", (), [["download", "filter", "shard", "precompute", "train", "generate", "report"]]),
        ("true", GPUS, [["download", "filter", "shard"], ["precompute", "train", "generate"], ["report"]]),
        ("all", GPUS, [["download", "filter", "shard", "precompute", "train", "generate", "report"]]),
        ("false", GPUS, [[name] for name in LINE.partition("=")[2].split(",")]),
        ("true", ("filter.partition=big",),
         [["download"], ["filter"], ["shard", "precompute", "train", "generate", "report"]]),
        ("true", ("shard.slurm_exclusive=true",),
         [["download", "filter"], ["shard"], ["precompute", "train", "generate", "report"]]),
    ],
)  # fmt: skip
def test_neighbours_that_ask_for_the_same_share_a_job(
    mode: str, arguments: tuple[str, ...], expected: list[list[str]]
) -> None:
    assert names(pack(LINE, "dataset=shapes", *arguments, mode=mode)) == expected


def test_small_data_sets_share_one_job_before_the_gpus_and_one_with_them() -> None:
    stages = "stage=download,filter,shard,precompute,train"
    cpu, gpu = pack(stages, "dataset=shapes,digits", *GPUS)
    assert [(part.config.dataset, part.stage) for part in cpu.parts] == [
        (dataset, stage) for dataset in ("shapes", "digits") for stage in ("download", "filter", "shard")
    ]
    assert [(part.config.dataset, part.stage) for part in gpu.parts] == [
        (dataset, stage) for dataset in ("shapes", "digits") for stage in ("precompute", "train")
    ]
    before = slurm.Submitted(cpu, ("7",), "", slurm.scripts_of(cpu))
    assert slurm.dependency_of(gpu, [before])["dependency"] == "afterok:7"


def test_chains_of_several_data_sets_do_not_wait_for_each_other() -> None:
    jobs = pack("stage=download,filter", "dataset=[shapes,digits]", mode="false")
    submitted = [slurm.Submitted(job, (str(n),), "", slurm.scripts_of(job)) for n, job in enumerate(jobs)]
    assert slurm.dependency_of(jobs[2], submitted[:2]) == {}
    assert slurm.dependency_of(jobs[3], submitted[:3])["dependency"] == "afterok:2"


def test_the_job_is_as_large_as_its_largest_step() -> None:
    (job,) = pack(
        "stage=download,filter,shard", "dataset=shapes", "nodes=2", "mem=8G", "download.nodes=1", "shard.mem=900",
        "filter.nodes=4", "filter.tasks_per_node=2", "filter.cpus_per_task=8", "download.tasks_per_node=12",
        "filter.mem=0.5T", "time=1:00:00",
    )  # fmt: skip
    (script,) = slurm.scripts_of(job)
    options = script.options()
    asked = {name: options[name] for name in ("nodes", "ntasks-per-node", "cpus-per-task", "mem", "time")}
    assert asked == {"nodes": "4", "ntasks-per-node": "2", "cpus-per-task": "8", "mem": "0.5T", "time": "1:00:00"}
    sizes = [line for line in script.text.splitlines() if line.startswith("step_size")]
    assert sizes == ["step_size 1 12 1", "step_size 4 2 8", "step_size 2 1 1"]


def test_time_limits_of_single_stages_add_up_and_a_common_one_is_that_of_the_job() -> None:
    own = ["download.time=30", "filter.time=1:30:00", "shard.time=1-0"]
    (job,) = pack("stage=download,filter,shard", "dataset=shapes", *own)
    assert job.request.config.time == "1-02:00:00"
    (job,) = pack("stage=download,filter,shard", "dataset=shapes", "time=2:00:00")
    assert job.request.config.time == "2:00:00"
    (job,) = pack("stage=download,filter,shard", "dataset=shapes", "filter.time=2:00:00")
    assert job.request.config.time == ""  # the others have that of the partition


def test_the_type_of_gpus_is_that_of_the_stages_that_use_them() -> None:
    (job,) = pack("stage=shard,precompute,train", "dataset=shapes", "precompute.gpus_per_node=h100:2",
                  "train.gpus_per_node=h100:8", mode="all")  # fmt: skip
    assert slurm.scripts_of(job)[0].options()["gpus-per-node"] == "h100:8"


def test_stages_that_compute_on_no_gpu_get_none(capsys: pytest.CaptureFixture[str]) -> None:
    cpu, gpu = pack("stage=filter,shard,precompute,train", "dataset=shapes", "gpus_per_node=8")
    assert [slurm.scripts_of(job)[0].options().get("gpus-per-node") for job in (cpu, gpu)] == [None, "8"]
    assert "filter, shard: no GPUs are asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "mode", "message"),
    [
        (("filter.array=3",), "true", "array=3 splits stage filter into independent jobs"),
        (("filter.partition=big",), "all", "stage download has partition=, stage filter partition=big"),
        (("filter.slurm_exclusive=true",), "all", "stage filter exclusive=true"),
        (
            ("stage=precompute,train", "precompute.gpus_per_node=a100:2", "train.gpus_per_node=h100:8"),
            "all",
            "a100 and",
        ),
        (("filter.time=soon", "shard.time=1"), "true", "time="),
    ],
)
def test_what_cannot_share_a_job_is_refused(arguments: tuple[str, ...], mode: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given = arguments if "stage=" in arguments[0] else ("stage=download,filter,shard", *arguments)
        pack("dataset=shapes", "time=5", *given, mode=mode)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cluster=local", "pack=true"), "pack=true has no effect with cluster=local"),
        (("cluster=slurm", "pack=some"), "pack=some"),
        (("cluster=slurm", "filter.pack=true"), "filter.pack"),
        (("cluster=slurm", "dataset=a,b", "output=/x"), "output= are for one dataset"),
        (("cluster=slurm", "dataset=a,a"), "named twice"),
    ],
)
def test_settings_without_effect_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch = read(["stage=filter", *arguments])
        for own in per_dataset(launch.settings):
            jobs_of(launch.config, own, launch.requests)


def test_the_script_of_a_packed_job_is_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("launch.script._in_venv", lambda: True)
    cpu, gpu = pack("stage=shard,precompute,train", "dataset=shapes", "run_id=1", "nodes=2", *GPUS)
    (script,) = slurm.scripts_of(gpu)
    golden("packed.sbatch", script.text)
    assert (cpu.stage, script.logs) == ("shard", Path("/d/shapes/logs/pack.slurm"))


def test_the_name_says_which_work_it_is_whatever_its_size() -> None:
    one, other, more = (
        slurm.name_of(pack("dataset=shapes", *arguments)[0])
        for arguments in (["stage=download,filter"], ["stage=download,filter", "nodes=3"], ["stage=filter,shard"])
    )
    assert one == other != more and one.startswith("pack-")


def test_a_comment_names_all_outputs_of_a_job() -> None:
    outputs = ["/d/shapes/train/filter", "/d/shapes/train/shard-mds", "/d/shapes/runs/a"]
    assert comment(outputs) == "/d/shapes/{train/filter,train/shard-mds,runs/a}"
    assert places(comment(outputs)) == outputs
    assert places("/d/shapes/train/filter") == ["/d/shapes/train/filter"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1:30", 1.5),
        ("2:00:30", 120.5),
        ("1-0", 1440),
        ("1-12:30", 2190),
        ("UNLIMITED", float("inf")),
        ("", 0),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, expected: float) -> None:
    assert minutes(text) == expected


def test_sizes_are_read_as_slurm_reads_them() -> None:
    assert [mebibytes(text) for text in ("64G", "900", "1T", "2048K", "", "odd")] == [65536, 900, 1024**2, 2, 0, 0]
    assert [gpu_count(text) for text in ("8", "a100:4", "", 0, "a100")] == [8, 4, 0, 0, 1]
    assert [clock(value) for value in (0.2, 90, 1500.5)] == ["00:01:00", "01:30:00", "1-01:01:00"]
