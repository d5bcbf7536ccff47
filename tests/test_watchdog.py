"""A rank that is stuck says where and ends; and ranks tell the job script that started them how they are."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.distributed import EXIT_ENVIRONMENT, EXIT_HUNG, EXIT_STOPPED, EXIT_STORAGE
from pipeline.telemetry.events import last_events

ROOT = Path(__file__).resolve().parent.parent
HEAD = """
import os, sys, time
from pipeline.config.schema import ConfigError, FilterConfig
from pipeline.distributed import distributed
from pipeline.storage import StorageError

@distributed
def main(rank, config):
"""


def start(
    folder: Path, body: str, timeout: float = 0.6, rank: dict[str, str] | None = None, full: bool = False
) -> subprocess.Popen[str]:
    """A rank that runs ``body`` with hang_timeout=``timeout``; its life's folder is ``folder``/life.

    ``full``: what it prints goes to a disk that is full.
    """
    (folder / "life").mkdir(exist_ok=True)
    program = folder / "program.py"
    program.write_text(
        HEAD + textwrap.indent(textwrap.dedent(body), "    ") + f"\nmain(FilterConfig(hang_timeout={timeout}))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "LATENTMILL_LIFE": str(folder / "life")}
    environment |= {"RANK": "0", "WORLD_SIZE": "1"} if rank is None else rank
    if full:
        with open("/dev/full", "w") as disk:
            return subprocess.Popen([sys.executable, program], env=environment, stdout=disk, stderr=disk, text=True)
    return subprocess.Popen([sys.executable, program], env=environment, stderr=subprocess.PIPE, text=True)


def run(folder: Path, body: str, timeout: float = 0.6, rank: dict[str, str] | None = None) -> tuple[int, str]:
    process = start(folder, body, timeout, rank)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def marks(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "life").iterdir())


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def test_a_stuck_rank_shows_where_and_ends(tmp_path: Path) -> None:
    body = """
        def look_for_the_file():
            time.sleep(60)
        look_for_the_file()
    """
    code, said = run(tmp_path, body)
    assert code == EXIT_HUNG
    assert "no progress for 0.6 s (hang_timeout): this rank ends" in said
    assert "in look_for_the_file" in said
    assert marks(tmp_path) == [f"0.{EXIT_HUNG}"]


@pytest.mark.parametrize(
    "step",
    ["rank.check_stop()", "rank.stopping", "open('/dev/null', 'wb').write(bytes(2_000_000))"],
    ids=["a safe boundary", "a question for a signal", "bytes written"],
)
def test_steps_and_bytes_are_progress(tmp_path: Path, step: str) -> None:
    code, said = run(tmp_path, f"for _ in range(15):\n    time.sleep(0.1)\n    {step}")
    assert (code, said) == (0, "")
    assert marks(tmp_path) == ["0.0"]


def test_time_during_which_it_was_stopped_does_not_count(tmp_path: Path) -> None:
    body = """
        for _ in range(10):
            time.sleep(0.1)
            rank.check_stop()
            open("running", "w").close()
    """
    process = start(tmp_path, f"os.chdir({str(tmp_path)!r})\n" + textwrap.dedent(body))
    wait_for(tmp_path / "running")
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("timeout", "rank"), [(0.0, None), (0.4, {})], ids=["hang_timeout=0", "nobody starts it again"]
)
def test_who_is_not_watched_may_take_its_time(tmp_path: Path, timeout: float, rank: dict[str, str] | None) -> None:
    assert run(tmp_path, "time.sleep(1.2)", timeout, rank) == (0, "")


def test_a_rank_that_is_alive_says_for_how_long_not_to_worry(tmp_path: Path) -> None:
    """The file's age is that of the file server's clock: the rank leaves its own clock out of it."""
    process = start(tmp_path, "while not rank.stopping:\n    time.sleep(0.05)\nrank.check_stop()", timeout=100)
    wait_for(tmp_path / "life/0.alive")
    time.sleep(0.2)
    assert -5 < (tmp_path / "life/0.alive").stat().st_mtime - time.time() < 1
    assert (tmp_path / "life/0.alive").read_text() == f". {socket.gethostname()} 100\n"
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert marks(tmp_path) == [f"0.{EXIT_STOPPED}"]


def test_usr1_shows_the_stacks_and_ends_nothing(tmp_path: Path) -> None:
    body = """
        def hard_work():
            while not rank.stopping:
                time.sleep(0.05)
        open("running", "w").close()
        hard_work()
    """
    process = start(tmp_path, f"os.chdir({str(tmp_path)!r})\n" + textwrap.dedent(body), timeout=100)
    wait_for(tmp_path / "running")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert "in hard_work" in process.communicate(timeout=60)[1]
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("raise ConfigError('seed is wrong')", ["0.2"]),
        ("raise ValueError('a defect')", ["0.1"]),
        ("rank.saved()\nrank.saved()", ["0.0", "saved"]),
        ("sys.exit(5)", ["0.5"]),
        ("raise PermissionError(13, 'Permission denied', '/data')", [f"0.{EXIT_STORAGE}"]),
        ("import no_such_module", [f"0.{EXIT_ENVIRONMENT}"]),
        ("raise StorageError('output') from OSError(30, 'Read-only file system')", [f"0.{EXIT_STORAGE}"]),
        ("raise ValueError('output') from OSError(28, 'No space left on device')", [f"0.{EXIT_STORAGE}"]),
    ],
)
def test_how_a_rank_ended_stands_in_its_life(tmp_path: Path, body: str, left: list[str]) -> None:
    run(tmp_path, body, timeout=0)
    assert marks(tmp_path) == left


@pytest.mark.parametrize("rank", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
@pytest.mark.parametrize(("error", "code"), [("ConfigError", 2), ("StorageError", 1)])
def test_what_a_person_can_mend_is_one_line(tmp_path: Path, rank: dict[str, str], error: str, code: int) -> None:
    ended, said = run(tmp_path, f"raise {error}('the data are damaged')", timeout=0, rank=rank)
    assert ended == code
    assert re.search(r"(^|\] |\n)error: the data are damaged$", said.strip()) and "Traceback" not in said


def test_the_reason_stands_beside_the_node_and_the_work_done(tmp_path: Path) -> None:
    body = """
        for _ in range(7):
            rank.check_stop()
        rank.life.work = "/data/out"
        raise ConfigError("seed=-1: must  be at least 0")
    """
    run(tmp_path, body, timeout=0, rank={"RANK": "0", "WORLD_SIZE": "1", "SLURMD_NODENAME": "node7"})
    node, pace, why, work = (tmp_path / "life/0.2").read_text().splitlines()
    assert (node, pace.split()[0], why, work) == ("node7", "7", "error: seed=-1: must be at least 0", "/data/out")
    assert 0 <= float(pace.split()[1]) < 60


def test_a_module_that_is_missing_before_the_rank_begins_is_told_as_well(tmp_path: Path) -> None:
    """Most imports happen before @distributed has anything to say."""
    (tmp_path / "program.py").write_text("import pipeline.stages\nimport no_such_module\n")
    environment = {**os.environ, "LATENTMILL_LIFE": str(tmp_path / "life"), "RANK": "3", "PYTHONPATH": str(ROOT)}
    (tmp_path / "life").mkdir()
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == EXIT_ENVIRONMENT
    assert marks(tmp_path) == [f"3.{EXIT_ENVIRONMENT}"]
    assert (tmp_path / f"life/3.{EXIT_ENVIRONMENT}").read_text().splitlines()[2] == (
        f"No module named 'no_such_module' ({sys.executable})"
    )
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("body", ["print('x' * 100_000)", "rank.log.info('x' * 100_000)", "sys.stdout.write('late')"])
def test_a_log_that_cannot_be_written_ends_no_work(tmp_path: Path, body: str) -> None:
    """Nor does what is left in a buffer at the end of the interpreter, which would be exit code 120."""
    process = start(tmp_path, f"{body}\nopen({str(tmp_path / 'done')!r}, 'w').close()", timeout=0, full=True)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").exists() and marks(tmp_path) == ["0.0"]


def test_a_wrong_setting_is_known_before_it_is_a_rank(tmp_path: Path) -> None:
    environment = {**os.environ, "LATENTMILL_LIFE": str(tmp_path), "RANK": "3", "WORLD_SIZE": "4"}
    command = [sys.executable, "-m", "pipeline.stages.filter", "min_image_sze=3"]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["3.2"]


def test_a_life_whose_folder_is_gone_does_not_matter(tmp_path: Path) -> None:
    code, _ = run(
        tmp_path, "import shutil\nshutil.rmtree(os.environ['LATENTMILL_LIFE'])\nrank.saved()\ntime.sleep(0.2)", 5
    )
    assert code == 0


def test_a_stage_that_hangs_says_so_in_its_events(tmp_path: Path) -> None:
    body = f"""
        import fake_stage
        from pipeline.registry import Registered, stages
        from pipeline.partitions import engine
        stages.added["fake"] = Registered(fake_stage.Fake, fake_stage.FakeConfig)
        class Stuck(fake_stage.Fake):
            def process(self, partition, context):
                if partition.index == 3:
                    time.sleep(60)
                yield from super().process(partition, context)
        engine.run(Stuck(fake_stage.FakeConfig(output={str(tmp_path / "out")!r}), rank))
    """
    code, said = run(tmp_path, body)
    assert code == EXIT_HUNG, said
    assert "in process" in said
    assert marks(tmp_path) == [f"0.{EXIT_HUNG}", "saved"]
    (event,) = last_events(tmp_path / "out")
    assert (event["event"], event["partition"]) == ("hang", 3)
