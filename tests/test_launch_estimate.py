"""What a dry run estimates, proposes and warns of; and how SLURM's and the disks' own words are read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import estimate, site
from launch.estimate import Estimate, Work, estimates, idle_gpus, predicted, propose, rates
from launch.forecast import lines
from launch.pack import packed
from launch.request import read
from launch.site import Account, Limits, Room, Site
from launch.submit import Job, jobs_of
from pipeline.config.schema import ConfigError
from pipeline.partitions.dataset import Dataset

NODE = Limits("main", True, 4, 4, 240.0, 60.0, 16, 8, 64_000.0)
SITE = Site((NODE, Limits("down", up=False, nodes=1, cpus=4)), "main", (Account("mine", "", 100.0, 50.0),), 1001)
HOURS = 3600.0


def jobs(tmp_path: Path, *arguments: str) -> list[Job]:
    launch = read([f"data_dir={tmp_path}", *arguments])
    found = jobs_of(launch.config, launch.settings, launch.requests)
    return packed(found, launch.config.pack) if launch.kind == "slurm" else found


def slurm(tmp_path: Path, *arguments: str) -> list[Estimate]:
    return estimates(jobs(tmp_path, "cluster=slurm", "dataset=shapes", *arguments), SITE)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    estimate._places.cache_clear()


# ---- the amount of work


def test_work_goes_down_the_line_from_the_plan_of_the_first_stage(tmp_path: Path) -> None:
    line = jobs(tmp_path, "stage=download,filter,shard,precompute,train,report", "dataset=shapes", "count=1100")
    found = {one.stage: one for one in estimates(line)}
    assert [found[name].work.samples for name in ("download", "filter", "shard", "precompute")] == [1100] * 4
    assert found["download"].work.partitions == 3 and found["download"].inodes == 12
    latents = 1100 * (16 * 8 * 8 * 2 + 16 * 64 * 2)  # float16 of 16 channels at 64 px, and text states
    assert found["precompute"].output_bytes == latents
    assert found["train"].hours is None and "stage=cost" in found["train"].basis
    assert found["report"].basis == "not estimated"
    assert not list(tmp_path.iterdir())


def test_what_is_finished_takes_nothing_and_tells_the_next_stage_its_size(tmp_path: Path) -> None:
    from pipeline.partitions import engine
    from pipeline.stages import get_stage

    (job,) = jobs(tmp_path, "stage=download", "dataset=shapes", "count=60", "partition_size=20")
    engine.run(get_stage("download")(job.config, __import__("launch.local").local.planner()))
    download, filter_ = estimates(jobs(tmp_path, "stage=download,filter", "dataset=shapes", "count=60"))
    assert download.finished and download.cpu_hours == 0.0
    stored = Dataset.open(tmp_path / "shapes/train/download").require_success()["counts"]["bytes"]
    assert (filter_.work.samples, filter_.work.bytes, filter_.work.partitions) == (60, stored, 3)
    assert "60 samples" in next(lines(download))
    (alone,) = estimates(jobs(tmp_path, "stage=filter", "dataset=shapes"))
    assert alone.work == filter_.work


def test_later_stages_are_told_the_size_of_what_pointers_lead_to(tmp_path: Path) -> None:
    from pipeline.partitions import engine
    from pipeline.stages import get_stage

    line = "stage=download,filter,dedup,score,select,shard"
    asked = ("dataset=shapes", "count=20", "select.where=width > 0")
    train = tmp_path / "shapes/train"

    def run(stage: str) -> dict[str, int]:
        (job,) = (job for job in jobs(tmp_path, line, *asked) if job.stage == stage)
        engine.run(get_stage(stage)(job.config, __import__("launch.local").local.planner()))
        return Dataset.open(train / stage).require_success()["counts"]

    run("download")
    images = run("filter")
    found = {one.stage: one for one in estimates(jobs(tmp_path, line, *asked))}
    for stage in ("dedup", "score", "select"):
        assert found[stage].output_bytes == images["kept"] * rates()["bytes"]["reference"]
    assert found["shard"].work.bytes == found["shard"].output_bytes == images["bytes"]
    pointers = run("dedup")
    found = {one.stage: one for one in estimates(jobs(tmp_path, line, *asked))}
    assert found["dedup"].output_bytes == pointers["bytes"]
    assert found["shard"].work.bytes == images["bytes"] * pointers["kept"] / images["kept"]


def test_sources_on_a_network_are_not_asked(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text("source: http_archive\nurls: ['https://example.invalid/a.tar']\n")
    arguments = [f"dataset={tmp_path}/web.yaml", "expected_gb=5"]
    download, filter_ = estimates(jobs(tmp_path, "stage=download,filter", *arguments))
    assert (download.work.samples, download.output_bytes, download.hours) == (-1, 5e9, None)
    assert "known when it is planned" in download.basis
    assert "known when the previous stage is planned" in filter_.basis


def test_a_submission_does_not_walk_through_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_source", lambda job: pytest.fail("looked"))
    (found,) = estimates(jobs(tmp_path, "stage=download", "dataset=shapes"), walk=False)
    assert found.work == Work()


# ---- rates


def test_the_table_has_a_positive_rate_for_each_stage_of_the_line() -> None:
    table = rates()
    assert set(table["stages"]) == {"download", "filter", "dedup", "shard", "precompute"}
    for stage in table["stages"]:
        cost = predicted(stage, {"vae": "embedded"}, 1e6, False)
        assert cost is not None and 0 < cost < 10


def test_autoencoders_are_reckoned_by_their_operations() -> None:
    settings = {"vae": "stabilityai/sdxl-vae", "image_resolutions": (256, 512), "text_encoder": ("openclip:ViT-H-14",)}
    models = rates()["models"]
    expected = (models["vae_tflop_256"] * 5 + models["text_tflop"]) / models["tflops_of_a_gpu"]
    assert predicted("precompute", settings, 1e5, True) == pytest.approx(expected)
    assert predicted("precompute", settings, 1e5, False) > 100 * expected


def test_image_features_take_time_and_bytes(tmp_path: Path) -> None:
    def size(*settings: str) -> float:
        line = jobs(tmp_path, "stage=download,precompute", "dataset=shapes", "count=100", *settings)
        return {one.stage: one for one in estimates(line)}["precompute"].output_bytes

    plain, features = size(), "image_features=hf:facebook/dinov2-base"
    assert size(features) - plain == 100 * 4 * 4 * 768 * 2, "one patch for 2 x 2 latents of 64 px"
    assert size(features, "features_storage=int8", "features_resolution=[96]") - plain == 100 * 6 * 6 * 770
    assert size("image_features=embedded", "save_dtype=float32") - size("save_dtype=float32") == 100 * 16 * 192 * 4
    hf = {"vae": "embedded", "image_resolutions": (256,), "image_features": "hf:facebook/dinov2-base"}
    models = rates()["models"]
    expected = (models["vae_tflop_256"] + 256 * models["patch_tflop"]) / models["tflops_of_a_gpu"]
    assert predicted("precompute", hf, 1e5, True) == pytest.approx(expected)


@pytest.fixture
def past(tmp_path: Path) -> Callable[..., Path]:
    """Makes a finished stage whose events say that it took ``slower`` times what the table says."""

    def make(name: str, slower: float) -> Path:
        from recorded import event, write_events

        from pipeline.partitions import engine
        from pipeline.stages import get_stage

        output = tmp_path / "past" / name / "train/download"
        (job,) = jobs(tmp_path, "stage=download", "dataset=shapes", "count=40", f"output={output}")
        engine.run(get_stage("download")(job.config, __import__("launch.local").local.planner()))
        for path in output.glob("events/*/*"):
            path.unlink()
        cost = predicted("download", {}, 0.0, False)
        assert cost is not None
        write_events(output, [event("finish", 0, 1, 1000.0, 1100.0, 2, cpu=slower * cost * 2000, waited=0.0)])
        return output

    return make


def test_earlier_runs_on_the_site_correct_the_table(tmp_path: Path, past: Callable[..., Path]) -> None:
    past("a", 2.0)
    past("b", 3.0)
    past("c", 10.0)
    line = jobs(tmp_path, "stage=download", "dataset=shapes", "count=100000")
    (found,) = estimates(line)
    by_table = predicted("download", {}, 0.0, False)
    assert by_table is not None and found.cpu_hours == pytest.approx(3.0 * 100_000 * by_table / HOURS)
    assert "launch/rates.yaml x 3 (3 earlier runs here)" in found.basis


def test_damaged_outputs_are_no_witnesses(tmp_path: Path, past: Callable[..., Path]) -> None:
    output = past("a", 2.0)
    (output / "plan/plan.json").write_text("{")
    assert estimate.history(tmp_path, "download").runs == 0


def test_training_is_as_fast_as_earlier_runs(tmp_path: Path) -> None:
    from recorded import event, write_events

    run = tmp_path / "shapes/runs/earlier"
    (run / "checkpoints").mkdir(parents=True)
    events = [event("finish", rank, 2, 0.0, 100.0, 5, done=5000, batch=64) for rank in range(2)]
    for one in events:
        write_events(run, [one])
    line = jobs(tmp_path, "stage=train", "dataset=shapes", "steps=1000", "batch_size=64", "ranks=4")
    (found,) = estimates(line)
    assert found.hours == pytest.approx(64_000 * (200 / 10_000) / 4 / HOURS)


# ---- proposals


def estimated(**values: Any) -> Estimate:
    return Estimate("filter", Work(10**6, 1e11, values.pop("partitions", 1000)), **values)


@pytest.mark.parametrize(
    ("found", "limits", "expected"),
    [
        (estimated(cpu_hours=1.0), NODE, {"nodes": "1", "tasks_per_node": "1", "time": "02:00:00"}),
        (estimated(cpu_hours=40.0), NODE, {"nodes": "1", "tasks_per_node": "12", "time": "04:00:00"}),
        (estimated(cpu_hours=200.0), NODE, {"array": "4", "nodes": "1", "tasks_per_node": "15", "time": "04:00:00"}),
        (estimated(cpu_hours=4000.0), NODE, {"array": "4", "tasks_per_node": "16"}),
        (estimated(cpu_hours=4000.0), None, {"array": "63", "tasks_per_node": "16"}),
        (estimated(cpu_hours=400.0, partitions=3), NODE, {"nodes": "1", "tasks_per_node": "3"}),
        (estimated(gpu_hours=40.0), NODE,
         {"nodes": "2", "gpus_per_node": "8", "tasks_per_node": "0", "cpus_per_task": "2", "time": "04:00:00"}),
        (estimated(gpu_hours=6.0), NODE, {"nodes": "1", "gpus_per_node": "2"}),
        (estimated(hours=2.0), None, {"time": "03:10:00"}),
        (estimated(), NODE, {}),
    ],
)  # fmt: skip
def test_proposals_end_within_hours_on_the_nodes_that_there_are(
    tmp_path: Path, found: Estimate, limits: Limits | None, expected: dict[str, str]
) -> None:
    (job,) = jobs(tmp_path, "cluster=slurm", "stage=filter", "dataset=shapes")
    proposal = propose(job, found, limits)
    assert {name: proposal.get(name) for name in expected} == expected
    assert bool(proposal) == bool(expected)


def test_a_proposal_is_a_command_that_the_launcher_takes(tmp_path: Path) -> None:
    (found,) = slurm(tmp_path, "stage=download", "count=3000000")
    (job,) = jobs(tmp_path, "cluster=slurm", "stage=download", "dataset=shapes", *map("=".join, found.proposal.items()))
    assert job.request.config.time == found.proposal["time"]
    assert "proposed: nodes=" in "\n".join(lines(found))


# ---- warnings


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["nodes=5"], "nodes=5: partition main allows 4"),
        (["time=1-0"], "time=1-0: partition main allows 04:00:00"),
        (["time=3:00:00"], "time=3:00:00: account mine allows 01:40:00"),
        (["tasks_per_node=4", "cpus_per_task=8"], "nodes of partition main have 16 CPUs"),
        (["gpus_per_node=9"], "gpus_per_node=9: nodes of partition main have 8 GPUs"),
        (["mem=100G"], "mem=100G: nodes of partition main have 62G"),
        (["partition=mian"], "partition=mian: no such partition; known: down, main"),
        (["partition=down"], "partition down is not up"),
        (["account=yours"], "account=yours: not one of yours (mine)"),
        (["array=60", "account=mine"], "array=60: account mine allows 50 jobs"),
        (["count=100", "tasks_per_node=16"], "16 ranks for 1 partitions: 15 of them will have nothing to do"),
        (["count=30000000", "time=30"], "time=30 is 00:30:00: the job will be requeued about"),
        (["count=200000000"], "the partition's default time is 01:00:00"),
    ],
)
def test_limits_that_will_not_do_are_said_before_the_submission(
    tmp_path: Path, arguments: list[str], warning: str
) -> None:
    (found,) = slurm(tmp_path, "stage=download", *arguments)
    assert warning in "\n".join(lines(found))


def test_nothing_is_said_of_what_will_do(tmp_path: Path) -> None:
    (found,) = slurm(tmp_path, "stage=download", "time=60", "mem=8G", "tasks_per_node=2", "nodes=1")
    assert found.warnings == []


def test_the_time_limit_of_a_packed_job_is_for_all_its_steps(tmp_path: Path) -> None:
    arguments = ["stage=download,filter,shard", "count=6000000", "time=2:40:00"]
    alone = slurm(tmp_path, *arguments)
    together = slurm(tmp_path, *arguments, "pack=true")
    hours = sum(one.hours or 0.0 for one in together)
    assert [one.hours for one in alone] == [one.hours for one in together] and hours > 2.7
    assert ["requeued" in " ".join(one.warnings) for one in together][:2] == [False, False]
    assert "requeued about" in " ".join(together[-1].warnings)


def test_gpus_that_would_wait_for_stages_without_gpus_are_said(tmp_path: Path) -> None:
    line = jobs(tmp_path, "cluster=slurm", "stage=download,filter,precompute", "dataset=shapes", "count=100000",
                "precompute.gpus_per_node=8", "precompute.nodes=2")  # fmt: skip
    found = estimates(line)
    hours = 16 * sum(one.hours or 0.0 for one in found[:2])
    assert idle_gpus(line, found) == (
        f"in one job, 16 GPUs are idle while download, filter run: about {hours:.1f} GPU hours"
    )
    assert idle_gpus(line[:2], found[:2]) == ""


def test_disk_and_inodes_that_will_not_do_are_said_where_they_run_out(tmp_path: Path) -> None:
    line = jobs(tmp_path, "stage=download,filter,precompute", "dataset=shapes", "count=100000")
    (*_, precompute) = estimates(line)
    rooms = [Room("your quota", precompute.output_bytes - 1)]
    said = [one.warnings for one in estimates(line, rooms=rooms)]
    assert [len(warnings) for warnings in said] == [0, 0, 1]
    assert f"up to here, your quota has room for {estimate.amount(precompute.output_bytes - 1)}" in said[-1][0]
    said = [one.warnings for one in estimates(line, rooms=[Room("your quota", inodes=900)])]
    assert [len(warnings) for warnings in said] == [0, 1, 0] and "1,600 files are needed up to here" in said[1][0]


# ---- what SLURM and disks say

PARTITIONS = """\
PartitionName=main AllowGroups=ALL AllowAccounts=ALL Default=YES DefaultTime=01:00:00 MaxNodes=UNLIMITED \
MaxTime=2-00:00:00 State=UP TotalCPUs=64 TotalNodes=4 TRES=cpu=64,mem=62.50G,node=4,billing=64,gres/gpu=32
PartitionName=long Default=NO DefaultTime=NONE MaxNodes=2 MaxTime=UNLIMITED State=DRAIN TotalCPUs=8 TotalNodes=2
"""


def test_partitions_are_read_as_scontrol_shows_them() -> None:
    (main, long), default = site.parse_partitions(PARTITIONS)
    assert default == "main"
    assert main == Limits("main", True, 4, math.inf, 2880, 60, 16, 8, 16_000.0)
    assert long == Limits("long", False, 2, 2, math.inf, math.inf, 4, 0, 0.0)
    assert site.parse_partitions("") == ((), "")


def test_associations_are_read_as_sacctmgr_shows_them() -> None:
    assert site.parse_associations("mine||100|1-00:00:00\nours|gpu||\nodd\n") == (
        Account("mine", "", 1440, 100),
        Account("ours", "gpu", math.inf, math.inf),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/lustre 900 1000 2000 - 50 100 0 -\n", (1100 * 1024, 50)),
        ("/lustre 2000* 1000 0 6d 50 0 0 -\n", (0, math.inf)),
        ("Disk quotas for user me (uid 1000):\n  Filesystem  space quota limit grace files quota limit grace\n"
         "/dev/sda1 10 0 20 0 1 0 2 0\n", (10 * 1024, 1)),
        ("Disk quotas for user me (uid 1000): none\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_quotas_are_read_as_lfs_and_quota_show_them(text: str, expected: tuple[float, float] | None) -> None:
    rooms = site.parse_quota(text, "q")
    assert [(room.bytes, room.inodes) for room in rooms] == ([] if expected is None else [expected])


def stand_in(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_site_is_asked_with_a_time_out_and_says_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "SECONDS", 0.5)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = "AccountingStorageType = accounting_storage/slurmdbd\nMaxArraySize = 501"
    stand_in(tmp_path, "scontrol", f'[ "$2" = config ] && echo "{config}" || exec sleep 30')
    stand_in(tmp_path, "sacctmgr", "echo 'mine||7|'")
    stand_in(tmp_path, "lfs", "echo '/x 1 0 2 - 3 0 4 -'")
    stand_in(tmp_path, "quota", "exec sleep 30")
    found = site.look()
    assert (found.most_elements, found.accounts) == (501, (Account("mine", "", math.inf, 7),))
    assert found.partitions == () and "scontrol show partition" in found.problems[0]
    disk, lfs = site.room(tmp_path / "not/there/yet")
    assert (lfs.bytes, lfs.inodes) == (1024, 1)
    assert 0 < disk.bytes < math.inf and str(tmp_path) in disk.of


def test_a_time_limit_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="time=soon"):
        slurm(tmp_path, "stage=download", "time=soon")


def test_words_for_what_is_known(tmp_path: Path) -> None:
    found = estimated(cpu_hours=1.5, hours=0.75, output_bytes=2.5e9, inodes=4000, basis="x")
    assert list(lines(found)) == [
        "filter: 1,000,000 samples (100 GB) in 1,000 partitions, about 45 min, 1.5 CPU hours, writes 2.5 GB, "
        "4,000 inodes",
        "    from x",
    ]
    assert list(lines(replace(found, work=Work(), hours=None, basis="samples are unknown"))) == [
        "filter: samples are unknown"
    ]
