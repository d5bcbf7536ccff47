"""What a command says at its end, what status says meanwhile, and how that fits on a terminal."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stages.conftest import run_stage

from launch import outcome, submit
from launch.finished import finished_at
from launch.monitor.status_table import FittingTable
from launch.monitor.watch import Watch
from launch.submission import Submission, going_on
from pipeline.config import cli
from pipeline.config.schema import FilterConfig
from pipeline.distributed import Rank
from pipeline.storage import Folder
from pipeline.telemetry.events import Events
from pipeline.training import uploads

SHAPES = ["dataset=shapes", "source=shapes", "count=30", "image_size=64", "download.partition_size=10"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def submitted(*arguments: str) -> int:
    return submit.main([*arguments, "cluster=inline"])


def test_a_command_ends_with_what_was_made_where_and_what_is_next(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["stage=download,filter", *SHAPES, f"data_dir={data}", "min_image_size=64", "workers=0"]
    assert submitted(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("done in "))
    assert [line.split()[0] for line in lines[at + 1 : at + 3]] == ["download", "filter"]
    assert f"{data}/shapes/train/filter: 30 of 30 samples kept" in lines[at + 2]
    assert lines[-1] == f"next: python launch/submit.py stage=shard dataset=shapes data_dir={data}"
    elsewhere = [f"input={data}/shapes/train/download", f"output={data / 'x'}", "min_image_size=65", "workers=0"]
    assert submitted("stage=filter", *elsewhere) == 0
    assert "0 of 30 samples kept, 30 dropped (30 too_small)" in capsys.readouterr().out


def test_what_was_finished_already_says_so_and_is_not_proposed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> tuple[str, str]:
        assert submitted(*arguments, "dataset=shapes", f"data_dir={data}") == 0
        lines = capsys.readouterr().out.splitlines()
        return "\n".join(lines), lines[-1]

    source, filtered = SHAPES[1:], ["workers=0", "min_image_size=64"]
    assert "already finished" not in said("stage=download,filter", *source, *filtered)[0]
    again, following = said("stage=download,filter", *source, *filtered)
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert len(re.findall(rf"30 of 30 samples kept; already finished on {when}, nothing to do", again)) == 2
    assert "stage=shard" in following
    assert "stage=shard" in said("stage=download", *source)[1]  # filter is there
    assert "stage=precompute" in said("stage=shard", "format=parquet")[1]
    assert "stage=precompute" in said("stage=filter", *filtered)[1]  # there are shards, if in another format
    anew, following = said("stage=download", *source, "overwrite=true")
    assert "already finished" not in anew and "stage=precompute" in following  # the same content as before
    other, following = said("stage=download", *source[:1], "count=31", *source[2:], "overwrite=true")
    assert "already finished" not in other and "stage=filter" in following


def test_a_training_run_is_finished_until_it_is_extended(data: Path) -> None:
    launch = submit.read(["stage=train", "task=diffuse", "dataset=shapes", f"data_dir={data}"])
    (job,) = submit.jobs_of(launch.config, launch.settings, launch.requests)
    run = data / "shapes/runs/diffuse"
    (run / "checkpoints/step_000002").mkdir(parents=True)
    (run / "checkpoints/step_000002/checkpoint.json").write_text("{}")
    assert finished_at(job) is None
    with Folder.open(run) as folder, Events(folder, Rank()).around():
        assert finished_at(job) is None
    assert finished_at(job) == (run / "checkpoints/step_000002/checkpoint.json").stat().st_mtime
    assert "already finished on " in "".join(outcome.summary([job], 1.0, [finished_at(job)]))
    assert "already finished" not in "".join(outcome.summary([job], 1.0, [1.0]))
    assert "stage=generate" in outcome.next_command(job)
    (run / "samples").mkdir()
    (run / "samples/samples.json").write_text("{}")
    assert "stage=report" in outcome.next_command(job)
    (data / "shapes/report.html").write_text("")
    assert outcome.next_command(job) == ""


def test_failures_are_told_with_their_reasons_and_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.jpg").write_bytes(b"\xff\xd8\xffnot an image" * 9)
    run_stage("download", source="image_folder", input=str(tmp_path / "images"), output=str(tmp_path / "download"))
    given = [f"input={tmp_path / 'download'}", f"output={tmp_path / 'filter'}", "max_failed_fraction=1", "workers=0"]
    assert submitted("stage=filter", *given) == 0
    said = capsys.readouterr().out
    assert "0 of 4 samples kept, 4 failed" in said
    assert re.search(r"failed: .*4 times \(for example 0-jpg\)", said)
    assert said.splitlines()[-1].startswith("next: python -m pipeline.stages.shard input=")


@pytest.mark.parametrize("width", [120, 80, 40])
def test_a_terminal_gets_a_table_with_times_and_rates(data: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "show", lambda *made: shown.append(made))
    shown: list[tuple[Any, ...]] = []
    given = ["stage=download,filter", *SHAPES, f"data_dir={data}", "min_image_size=65", "workers=0"]
    assert submitted(*given) == 0
    assert submitted(*given) == 0
    texts = []
    for made in shown:
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(outcome.table(*made))
        texts.append(console.export_text())
        assert max(map(len, texts[-1].splitlines())) <= width
    row = next(line.split() for line in texts[0].splitlines() if line.startswith("download"))
    assert row[1] == "30"
    assert "30 too_small" in " ".join(texts[0].split())
    assert (" rate " in texts[0].splitlines()[1]) == (width > 40)
    assert " rate " not in texts[1].splitlines()[1]  # both were finished already
    assert "already finished" not in texts[0] and texts[1].count("already finished on") == 2


def test_a_table_is_for_terminals(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["stage=download", *SHAPES, f"data_dir={data}"]
    command = [sys.executable, "launch/submit.py", *given, "cluster=inline"]
    with_terminal = subprocess.run(
        ["script", "-qec", shlex.join(command), "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "80"},
    )
    following = f"next: python launch/submit.py stage=filter dataset=shapes data_dir={data}"
    assert following in with_terminal.stdout.splitlines(), "it can be copied"
    assert re.search(r"stage +kept +dropped +failed +time", with_terminal.stdout)
    without = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "30 of 30 samples kept" in without.stdout and "stage " not in without.stdout.split("done in")[1]


@pytest.mark.parametrize("stage", ["download", "filter", "shard", "precompute", "features", "train", "generate"])
def test_the_next_command_is_one_that_can_be_given(stage: str, data: Path) -> None:
    launch = submit.read([f"stage={stage}", "dataset=shapes", f"data_dir={data}"])
    (job,) = submit.jobs_of(launch.config, launch.settings, launch.requests)
    words = shlex.split(outcome.next_command(job))
    assert words[:2] == ["python", "launch/submit.py"]
    following = submit.read(words[2:])
    assert submit.jobs_of(following.config, following.settings, following.requests)


def test_an_upload_that_failed_is_told_at_the_end_and_by_status(data: Path) -> None:
    run = data / "shapes/runs/diffuse"
    (run / "checkpoints").mkdir(parents=True)
    uploads.note(run, "me/model", run / "export", "")
    assert uploads.problem(run) == ""
    uploads.note(run, "me/model", run / "export", "HTTPError: 401")
    said = f"upload to hub_repo=me/model failed: HTTPError: 401; {run / 'export'} is complete"
    assert said in uploads.problem(run)
    launch = submit.read(["stage=train", "dataset=shapes", f"data_dir={data}"])
    assert any(said in line for line in outcome.summary(submit.jobs_of(launch.config, launch.settings), 4000.0))
    assert any(said in problem for stage in Watch(data).look().stages for problem in stage.problems)


def test_status_waits_between_two_stages_of_a_command(data: Path) -> None:
    run_stage("download", source="shapes", count=5, output=str(data / "shapes/train/download"))
    assert Watch(data).look().over
    with Submission(data / "shapes/train/download", ["download", "filter"]) as submission:
        submission.at(2)
        for place in (data, data / "shapes/train", data / "shapes/train/download"):
            snapshot = Watch(place).look()
            assert not snapshot.over
            assert "stage 2 of 2, filter" in snapshot.submission
    assert Watch(data).look().over
    assert list((data / "shapes/train/logs").iterdir()) == []


def test_a_command_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    with Submission(tmp_path / "a/download", ["a", "b"]) as submission:
        submission.at(1)
        (path,) = (tmp_path / "a/logs").glob("submission.*")
        said = json.loads(path.read_text())
        assert going_on([tmp_path / "a/logs"])
        path.write_text(json.dumps({**said, "pid": 2**22 + 1}))
        assert going_on([tmp_path / "a/logs"]) == ""
        path.write_text("{")
        assert going_on([tmp_path / "a/logs"]) == ""


@pytest.mark.parametrize("width", [200, 80, 40])
def test_names_stay_and_less_important_columns_go_where_a_table_does_not_fit(width: int) -> None:
    rows = [
        {"stage": f"shapes/train/stage-{n}", "state": "running", "samples": "12345", "memory": "1.5 GB"} for n in (1, 2)
    ]
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(FittingTable([{**row, "rate": "9" * 60} for row in rows], ("rate", "memory", "samples")))
    said = console.export_text()
    assert "shapes/train/stage-2" in said and "running" in said
    assert ("9" * 60 in said) == (width == 200)
    assert ("also shows" in said) == (width < 200)
    assert max(map(len, said.splitlines())) <= width


def test_a_rehearsal_says_what_the_run_would_refuse(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SHAPES, f"data_dir={data}"]
    assert submitted("stage=download", *given) == 0
    assert submitted("stage=download,filter", *given, "dry_run=true") == 0
    assert submitted("stage=download,filter", *given[:2], "count=31", *given[3:], "dry_run=true") == 2
    assert "would stop: " in capsys.readouterr().out


def test_the_start_shows_what_differs_from_the_defaults() -> None:
    text = cli.dump(cli.load("filter", ["min_image_size=8", "contact=x", "source=url_list", "fuse=true"]))
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines[:-1]] == ["source", "contact", "fuse", "min_image_size"]
    assert lines[-1] == ["and", str(len(fields(FilterConfig)) - 4), "settings", "at", "their", "defaults"]
