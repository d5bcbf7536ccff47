"""launch/submit.py: from settings to jobs that read each other's output, as processes of this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from stages.conftest import run_stage

from launch import local, precheck
from launch.job import Job
from launch.request import Launch, read
from launch.submit import jobs_of, main, run_here
from pipeline.config.schema import ConfigError, LaunchConfig
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify

ROOT = Path(__file__).resolve().parent.parent
SUBMIT = [sys.executable, str(ROOT / "launch/submit.py")]


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SUBMIT, *arguments], capture_output=True, text=True, check=False, timeout=300)


def test_each_stage_reads_what_the_one_before_writes() -> None:
    settings = {"dataset": "shapes", "data_dir": "/d", "variant": "", "train.batch_size": "7"}
    jobs = jobs_of(LaunchConfig(stage="all", ranks=3), settings)
    line = {job.stage: job for job in jobs}
    assert list(line)[:5] == ["download", "filter", "shard", "precompute", "train"]
    assert line["shard"].config.input == str(line["filter"].output) == "/d/shapes/train/filter"
    assert line["train"].config.input == str(line["precompute"].output) == "/d/shapes/train/precompute-embedded16"
    assert line["train"].config.batch_size == 7
    assert line["precompute"].config.batch_size == "100"  # of the dataset's YAML
    assert line["report"].ranks == 1
    assert len({job.config.run_id for job in jobs if hasattr(job.config, "run_id")}) == 1


def test_phases_of_a_recipe_are_trained_one_after_another_on_the_same_latents(tmp_path: Path) -> None:
    settings = {"dataset": "shapes", "data_dir": "/d", "recipe": "microdit", "input": "/latents"}
    jobs = jobs_of(LaunchConfig(stage="train,evaluate"), settings)
    phases = ["256-masked", "256-unmasked", "512-masked", "512-unmasked"]
    assert [job.config.name for job in jobs] == [*(f"microdit-{phase}" for phase in phases), "microdit-512-unmasked"]
    assert [job.config.phase for job in jobs[:-1]] == phases
    assert {job.config.input for job in jobs[:-1]} == {"/latents"}
    assert [job.config.start_from for job in jobs[:-1]] == ["", *(f"microdit-{phase}" for phase in phases[:-1])]
    (one,) = jobs_of(LaunchConfig(stage="train"), {**settings, "phase": "512-masked"})
    assert one.config.phase == "512-masked"


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("filtr", {}, "no stage 'filtr'; did you mean filter"),
        ("filter", {"warmup_steps": "3"}, "'warmup_steps' is a setting of train, not of filter"),
        ("filter", {"stpes": "3"}, "unknown key 'stpes' for stage filter"),
        ("download,filter", {"train.lr": "0.1"}, "train.lr=0.1 has no effect: stage train is not run"),
        ("download", {"dataset": "mine.yaml", "data_dir": "/d"}, "dataset=mine.yaml: no such file"),
        ("download,filter", {"output": "/x"}, "output= is for a single stage"),
        ("all", {"dataset": "shapes", "data_dir": "/d", "lr": "fast"}, "lr=fast: expected a number"),
        ("download", {"dataset": "shapes"}, "give data_dir="),
    ],
)
def test_wrong_settings_are_found_before_anything_starts(stage: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        jobs_of(LaunchConfig(stage=stage), settings)
    assert message in str(error.value)


def test_a_dry_run_tells_sizes_and_commands_and_writes_nothing(tmp_path: Path) -> None:
    done = submit("stage=download,filter", "dataset=shapes", f"data_dir={tmp_path}", "count=1100", "dry_run=true")
    assert done.returncode == 0
    assert "download: 3 partitions, 1100 samples; 1 rank" in done.stdout
    assert "filter: size known when the previous stage has finished" in done.stdout
    assert "-m pipeline.stages.filter" in done.stdout
    assert list(tmp_path.iterdir()) == []


def requested(*arguments: str) -> tuple[Launch, list[Job]]:
    launch = read(list(arguments))
    return launch, jobs_of(launch.config, launch.settings, launch.requests)


@pytest.mark.parametrize(
    ("stage", "settings", "missing", "makes_it"),
    [
        ("filter,shard", [], "filter cannot start: {}/shapes/train/download does not exist", "download"),
        ("train", [], "train cannot start: {}/shapes/train/precompute does not", "download,filter,shard,precompute"),
        ("train", ["task=classify"], "/train/shard does not exist", "download,filter,shard"),
        ("train", ["task=caption"], "/train/features does not exist", "download,filter,shard,features"),
        ("dedup", ["method=semantic"], "/train/score does not exist", "download,filter,score"),
        ("shard", ["split=valid"], "/valid/filter does not exist", "download,filter"),
    ],
)
def test_a_missing_upstream_is_named_with_the_command_that_makes_it_before_anything_starts(
    tmp_path: Path, stage: str, settings: list[str], missing: str, makes_it: str
) -> None:
    launch, jobs = requested(f"stage={stage}", "dataset=shapes", f"data_dir={tmp_path}", *settings)
    with pytest.raises(ConfigError) as error:
        run_here(jobs, launch)
    assert missing.format(tmp_path) in str(error.value)
    command = f"python launch/submit.py stage={makes_it} dataset=shapes data_dir={tmp_path}"
    split = [word for word in settings if word.startswith("split=")]
    assert str(error.value).endswith(f"; make it with: {' '.join([command, *split])}")
    assert list(tmp_path.iterdir()) == []
    _, jobs = requested(*command.split()[2:])
    assert [job.stage for job in jobs] == makes_it.split(",")


def test_of_the_stages_before_only_those_that_are_missing_are_proposed(tmp_path: Path) -> None:
    download = tmp_path / "shapes/train/download"
    run_stage("download", output=str(download), source="shapes", count=3, image_size=16)
    _, jobs = requested("stage=shard", "dataset=shapes", f"data_dir={tmp_path}")
    with pytest.raises(ConfigError, match=r"make it with: python launch/submit.py stage=filter dataset"):
        precheck.check_inputs(jobs)
    (download / "_SUCCESS").unlink()
    _, (job,) = requested("stage=filter", "dataset=shapes", f"data_dir={tmp_path}")
    with pytest.raises(ConfigError, match=r"is not finished .* make it with: .* stage=download dataset"):
        precheck.check_inputs([job])
    precheck.check_inputs([replace(job, config=replace(job.config, wait=60.0))])  # the stage itself waits


@pytest.mark.parametrize("stage", ["filter", "shard", "download", "train"])
def test_a_missing_input_is_found_before_anything_starts(
    tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["source=image_folder"] if stage == "download" else []
    with pytest.raises(SystemExit) as error:
        main([f"stage={stage}", *source, f"input={tmp_path}/nosuch", f"output={tmp_path}/out"])
    said = capsys.readouterr()
    assert (error.value.code, said.out) == (2, "")
    assert said.err == f"error: input={tmp_path}/nosuch: there is no such file or folder\n"
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_made_is_one_line() -> None:
    done = submit("stage=download", "dataset=shapes", "data_dir=/proc/xx")
    assert done.returncode == 1
    why = "error: output /proc/xx/shapes/train/download cannot be made: No such file or directory"
    assert done.stderr.splitlines()[-2].endswith(why)
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_cleanly_and_the_same_command_resumes(tmp_path: Path) -> None:
    output = tmp_path / "shapes/train/download"
    settings = ["stage=download", "dataset=shapes", f"data_dir={tmp_path}", "image_size=192", "count=600"]
    settings += ["partition_size=10", "ranks=2"]
    process = subprocess.Popen([*SUBMIT, *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while len(list(output.glob("data/000/0*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "the same command resumes" in said
    first = {path: path.stat().st_ino for path in output.glob("data/000/0*")}
    assert 4 <= len(first) < 60
    assert list(output.glob("data/000/.*")) == []  # attempts in hand were given up, not left lying
    assert not (output / "_SUCCESS").exists()

    again = submit(*settings)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_ino for path in first} == first  # nothing was done twice
    dataset = Dataset.open(output)
    assert dataset.require_success()["counts"]["kept"] == 600
    assert list(verify(dataset)) == []


def test_a_failing_rank_ends_the_others_and_its_log_is_shown(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions.json").write_text("[1, 2]")
    (tmp_path / "images/a.png").write_bytes(b"x")
    done = submit(
        "stage=download", "dataset=image_folder", f"input={tmp_path / 'images'}", f"data_dir={tmp_path / 'd'}",
        f"captions={tmp_path / 'captions.json'}", "ranks=2",
    )  # fmt: skip
    assert done.returncode == 2
    assert "row 1: no JSON object" in done.stdout
    assert "failed with code 2; logs in" in done.stderr


@pytest.mark.parametrize(("stage", "shown"), [("evaluate", "first\nsecond\n"), ("filter", "second\n")])
def test_what_a_stage_of_one_process_says_is_shown_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, shown: str
) -> None:
    (tmp_path / "rank0.log").write_text("first\nsecond\n")
    (job,) = jobs_of(LaunchConfig(stage=stage), {"dataset": "shapes", "data_dir": str(tmp_path)})
    rank = subprocess.Popen(["true"])
    rank.wait()
    assert local._report(job, [rank], tmp_path) == 0
    assert capsys.readouterr().out == shown


CURATED = {"dataset": "shapes", "data_dir": "/d"}


def line_of(settings: dict[str, str], stage: str = "all") -> dict[str, str]:
    """The stages that a command runs, with what each reads."""
    jobs = jobs_of(LaunchConfig(stage=stage), settings)
    return {job.stage: Path(getattr(job.config, "input", "") or "").name for job in jobs}


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, []),
        ({"select.where": "width > 9"}, ["select"]),
        ({"where": "width > 9"}, ["select"]),
        ({"scorers": "[sharpness]"}, ["score"]),
        ({"where": "sharpness > 9", "scorers": "[sharpness]"}, ["score", "select"]),
        ({"hamming": "10"}, ["dedup"]),
        ({"captioner": "openai:http://host/v1", "served_model": "m"}, ["recaption"]),
        ({"curation": "curate"}, ["dedup", "score", "select"]),
        ({"curation": "curate", "captioner": "transformers:a/b"}, ["dedup", "score", "select", "recaption"]),
    ],
)
def test_the_whole_line_takes_the_stages_of_curation_that_are_asked_for(
    settings: dict[str, str], stages: list[str]
) -> None:
    line = line_of(CURATED | settings)
    assert list(line)[:2] == ["download", "filter"]
    assert list(line)[2 : 2 + len(stages) + 1] == [*stages, "shard"]


def test_a_data_set_s_yaml_asks_for_stages_of_curation(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "source: shapes\nscore:\n  scorers: [sharpness]\nselect:\n  where: sharpness > 9\n"
        "recaption:\n  captioner: transformers:a/b\n"
    )
    line = line_of({"dataset": str(path), "data_dir": "/d"})
    assert line["score"] == "filter" and line["select"] == "score"
    assert line["recaption"] == "select" and line["shard"] == "recaption"


def test_stages_read_the_newest_images_not_the_scores() -> None:
    assert line_of(CURATED | {"scorers": "[sharpness]"})["shard"] == "filter"
    assert line_of(CURATED | {"captioner": "transformers:a/b", "scorers": "[sharpness]"})["recaption"] == "filter"
    dedup = line_of(CURATED, "filter,dedup,score,select,shard")
    assert dedup == {"filter": "", "dedup": "filter", "score": "dedup", "select": "score", "shard": "select"}


def test_a_data_set_s_own_settings_win_over_a_recipe_of_curation(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("source: shapes\ncuration: curate\nselect:\n  where: width > 3\n")
    line = {
        job.stage: job.config for job in jobs_of(LaunchConfig(stage="all"), {"dataset": str(path), "data_dir": "/d"})
    }
    assert line["select"].where == "width > 3" and line["dedup"].hamming == 14


def test_a_recipe_of_curation_is_overridden_by_the_command() -> None:
    jobs = jobs_of(LaunchConfig(stage="all"), CURATED | {"curation": "curate", "select.where": "width > 5"})
    line = {job.stage: job.config for job in jobs}
    assert line["select"].where == "width > 5" and "seam" in line["score"].scorers
    with pytest.raises(ConfigError, match="recipe=cure.*curate"):
        jobs_of(LaunchConfig(stage="all"), CURATED | {"curation": "cure"})
