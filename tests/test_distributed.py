"""Ranks find their place under every launcher, wait for each other, and end together."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from pipeline.config import cli
from pipeline.config.schema import STAGES, ConfigError, RunConfig, identity
from pipeline.distributed import EXIT_PEER, EXIT_STOPPED, Place, Rank, Stopped, distributed, expand_nodes, find_place
from pipeline.distributed.device import choose_device, why_no_gpu
from pipeline.distributed.environment import free_port
from pipeline.distributed.rank import require_own_gpus

LIMIT = 90  # seconds; what ends only by a time-out of its own would need far more

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
MASTER = {"MASTER_ADDR": "gpu7", "MASTER_PORT": "29511"}
SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "9",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2),3",
    "SLURM_STEP_NODELIST": "cn[007-009]",
    "SLURMD_NODENAME": "cn009",
}
BATCH = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_NTASKS": "9", "SLURM_NODELIST": "cn[007-009]"}


def summary(place: Place) -> tuple[str, int, int, int, int, str]:
    return place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size, place.address


# ---- which rank of how many


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("single", 0, 1, 0, 1, "")),
        (TORCHRUN | MASTER, ("torchrun", 5, 8, 1, 4, "gpu7")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("torchrun", 0, 1, 0, 1, "")),
        ({"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "9"}, ("kubernetes", 3, 9, 0, 1, "")),
        (TORCHRUN | MASTER | {"JOB_COMPLETION_INDEX": "1"}, ("torchrun", 5, 8, 1, 4, "gpu7")),  # training on Kubernetes
        (SRUN, ("slurm", 4, 5, 1, 3, "cn007")),
        (SRUN | MASTER, ("slurm", 4, 5, 1, 3, "gpu7")),
        (SRUN | TORCHRUN | MASTER, ("torchrun", 5, 8, 1, 4, "gpu7")),  # torchrun started by srun
        (BATCH, ("single", 0, 1, 0, 1, "")),
        (SRUN | {"SLURM_STEP_ID": str(2**32 - 5)}, ("single", 0, 1, 0, 1, "")),  # the batch step, as some versions say
        (SRUN | {"WORLD_SIZE": "5"}, ("slurm", 4, 5, 1, 3, "cn007")),  # exported in a batch script, without RANK
    ],
)
def test_the_place_follows_from_the_environment(environment: dict[str, str], expected: tuple[object, ...]) -> None:
    assert summary(find_place(environment)) == expected


def test_an_element_of_an_array_is_a_part_of_all_ranks_and_has_nobody_to_talk_to() -> None:
    place = find_place(SRUN, rank_offset=15, world_size=40, expect_world_size=5)
    assert summary(place) == ("array", 19, 40, 1, 3, "")
    assert find_place({}, world_size=3).launcher == "array"  # the first element
    with pytest.raises(ConnectionError, match="elements of an array"):
        Rank(place).barrier()


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"RANK": "1"}, {}, "WORLD_SIZE is not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, {}, "RANK='x' in the environment is not a number"),
        ({"JOB_COMPLETION_INDEX": "3"}, {}, "WORLD_SIZE is not set: set it to the Job's completions"),
        ({"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "3"}, {}, "kubernetes says that this is rank 3 of 3"),
        ({"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "4"}, {"expect_world_size": 8}, "set completions: 8 of the Job"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, {}, "rank 2 of 2"),
        (SRUN | {"SLURM_NODEID": "7"}, {}, "lists 3 nodes"),
        ({}, {"rank_offset": 4}, "world_size=0"),
        (SRUN, {"rank_offset": 36, "world_size": 40}, "makes ranks 36 to 40, but world_size=40"),
        ({}, {"expect_world_size": 8}, r"but 1 started: .*--multi_gpu.* 8; torchrun, --nproc-per-node .* 8$"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"expect_world_size": 8}, r"--multi_gpu \(also on CPUs\).* 8$"),
        (BATCH, {"expect_world_size": 9}, "but 1 started: start it with srun --ntasks=9"),
        (SRUN, {"expect_world_size": 9}, "but 5 started: start it with srun --ntasks=9"),
    ],
)
def test_what_cannot_be_is_named(environment: dict[str, str], options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_place(environment, **options)


def test_lives_and_steps_of_a_job_do_not_meet_each_other() -> None:
    places = [
        find_place(SRUN | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": life})
        for job in ("41", "42")
        for step in ("0", "1")
        for life in ("0", "1")
    ]
    assert len({place.port for place in places}) == len({place.life for place in places}) == 8
    assert all(1024 < place.port < 32768 for place in places)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node1", "node1"),
        ("node[1-3,7]", "node1 node2 node3 node7"),
        ("n[008-011]", "n008 n009 n010 n011"),
        ("n[9-11]", "n9 n10 n11"),
        ("a1,b[2-3],c", "a1 b2 b3 c"),
        ("r[1-2]n[01-02]-ib,x", "r1n01-ib r1n02-ib r2n01-ib r2n02-ib x"),
    ],
)
def test_node_lists_expand(text: str, nodes: str) -> None:
    assert expand_nodes(text) == nodes.split()


@pytest.mark.parametrize("text", ["", "n[1-2", "n1-2]", "n[a-b]", "n[]"])
def test_node_lists_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="node list"):
        expand_nodes(text)


# ---- one process


def test_a_single_process_calls_the_function_and_needs_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)

    @distributed
    def main(rank: Rank, config: RunConfig, factor: int = 1) -> object:
        rank.barrier("alone")
        rank.log.info("here")
        assert rank.is_main
        return rank.broadcast([rank.rank, rank.world_size]), rank.all_reduce(2.5), factor

    before = signal.getsignal(signal.SIGTERM)
    assert main(RunConfig(), factor=3) == ([0, 1], 2.5, 3)
    assert signal.getsignal(signal.SIGTERM) is before
    assert re.fullmatch(r"\d\d:\d\d:\d\d here\n", capsys.readouterr().err)
    with pytest.raises(ConfigError, match="expect_world_size=2"):
        main(RunConfig(expect_world_size=2))


def test_a_request_to_stop_is_acted_on_at_a_safe_boundary_only() -> None:
    rank = Rank()
    rank.check_stop()
    rank.request_stop("SIGTERM")
    assert rank.stopping
    with pytest.raises(Stopped, match="SIGTERM: stopped") as stopped:
        rank.check_stop()
    assert stopped.value.code == EXIT_STOPPED


# ---- programs: what launchers see

PROLOGUE = """
import json, os, signal, sys, threading, time
from pipeline.config.schema import ConfigError
from pipeline.distributed import *

def forever(*_):
    while True:
        time.sleep(0.02)
"""


class Program:
    """A program under ``@distributed`` in processes of its own."""

    def __init__(self, folder: Path, body: str) -> None:
        self.path = folder / "program.py"
        indented = textwrap.indent(textwrap.dedent(body), "    ")
        self.path.write_text(f"{PROLOGUE}\n@distributed(timeout=60)\ndef main(rank):\n{indented}\nmain()\n")

    def start(self, **environment: str) -> subprocess.Popen[str]:
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LATENTMILL_"))}
        return subprocess.Popen(
            [sys.executable, str(self.path)],
            env=outer | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, world_size: int = 0) -> list[tuple[int, str, str]]:
        """Start all ranks with nobody to end them but themselves; exit code, stdout and stderr of each."""
        if not world_size:
            return self.finish([self.start()])
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world_size)}
        return self.finish([self.start(RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(world_size)])

    @staticmethod
    def finish(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
        try:
            ends = time.monotonic() + LIMIT
            outputs = [rank.communicate(timeout=max(0.0, ends - time.monotonic())) for rank in ranks]
            return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]
        finally:
            for rank in ranks:
                rank.kill()


def test_torch_is_not_imported_before_it_is_needed(tmp_path: Path) -> None:
    body = """
        rank.barrier()
        assert rank.broadcast(7) == 7 and not rank.stopping
        print("torch" in sys.modules, rank.device, "torch" in sys.modules)
    """
    assert Program(tmp_path, body).run()[0][:2] == (0, "False cpu True\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, "SLURM gave this job 4 GPUs"),
        ({"SLURM_JOB_GPUS": "0,1"}, r"SLURM gave this job GPUs \(SLURM_JOB_GPUS=0,1\)"),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, "CUDA_VISIBLE_DEVICES=0,3 names GPUs"),
        ({"SLURM_GPUS_ON_NODE": "0", "CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({}, ""),
    ],
)
def test_a_rank_that_was_given_gpus_does_not_compute_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu", 0, "a", given).type == "cpu"
    if not said:
        assert choose_device("auto", 0, "a", given).type == "cpu"
        given, said = {}, "device=cuda needs a GPU"
    wanted = "auto" if given else "cuda"
    with pytest.raises(ConfigError, match=f"{said}, but torch sees none on a: .*device=cpu computes on the CPU"):
        choose_device(wanted, 0, "a", given)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for seen, expected in ((8, 5), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert choose_device(wanted, 5, "a", {"SLURM_GPUS_ON_NODE": "8"}) == torch.device("cuda", expected)


@pytest.mark.parametrize(
    ("environment", "built", "reason"),
    [
        ({}, None, "is built without CUDA: install a build with it"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "13.0", "CUDA_VISIBLE_DEVICES='' hides all of them"),
        ({"APPTAINER_CONTAINER": "a.sif"}, "13.0", "apptainer runs without --nv"),
        ({}, "13.0", "there is no /dev/nvidiactl"),
    ],
)
def test_why_there_is_no_gpu_is_said(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], built: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert reason in why_no_gpu(environment)


@pytest.mark.parametrize("stage", ["precompute", "features", "train", "generate", "evaluate", "caption"])
def test_every_stage_with_networks_takes_a_device(stage: str) -> None:
    required = {"path": "x", "image_path": "x"}
    names = {field.name for field in dataclasses.fields(STAGES[stage])}
    for device in ("auto", "cpu", "cuda"):
        settings = {name: value for name, value in required.items() if name in names}
        config = cli.build(STAGES[stage], settings | {"device": device})
        assert config.device == device and "device" not in identity(config)
    with pytest.raises(ConfigError, match="device=tpu"):
        cli.build(STAGES[stage], {"device": "tpu"})


def test_gpus_that_slurm_gave_and_torch_does_not_see_end_the_rank(tmp_path: Path) -> None:
    program = Program(tmp_path, "rank.device")
    code, output, errors = program.finish([program.start(SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="")])[0]
    assert code == 2
    assert "error: SLURM gave this job 4 GPUs, but torch sees none" in errors and not output


def test_ranks_that_share_a_gpu_are_refused() -> None:
    require_own_gpus(["a's GPU 1", "a's GPU 2", "b's GPU 1"])
    with pytest.raises(ConfigError, match="ranks 0, 2 share a's GPU 1: start as many ranks on a node"):
        require_own_gpus(["a's GPU 1", "a's GPU 2", "a's GPU 1"])


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise ValueError('boom')", 1, "ValueError: boom"),
        ("threading.Thread(target=forever).start(); raise ValueError('boom')", 1, "ValueError: boom"),
        ("raise ConfigError('lr=-1: too small')", 2, "error: lr=-1: too small"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("sys.exit(9)", 9, ""),
        ("rank.request_stop('SIGUSR2'); rank.check_stop()", EXIT_STOPPED, ""),
    ],
)
@pytest.mark.parametrize("launched", [False, True])
def test_the_exit_code_says_how_a_rank_ended(
    tmp_path: Path, body: str, code: int, message: str, launched: bool
) -> None:
    ranks = 3 if launched else 0  # nobody joined the others: each rank ends by itself, and torch is not needed
    for rank, (ended, _, said) in enumerate(Program(tmp_path, body).run(ranks)):
        assert ended == code
        assert message in said
        assert ("Traceback" in said) == (code == 1)
        assert not launched or code == 9 or f"[rank {rank}/3 " in said


def test_a_signal_is_a_flag_and_workers_do_not_hear_it(tmp_path: Path) -> None:
    body = """
        import multiprocessing
        pool = multiprocessing.get_context("fork").Pool(2, initializer=ignore_signals)
        pids = [worker.pid for worker in pool._pool]
        pool.apply(int)
        print(json.dumps(pids), flush=True)
        while not rank.stopping:
            time.sleep(0.01)
        assert pool.map(abs, [-1, -2]) == [1, 2] and [worker.pid for worker in pool._pool] == pids
        pool.terminate(); pool.join()   # SIGTERM from the parent still counts
        rank.check_stop()
    """
    with Program(tmp_path, body).start() as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            for pid in pids:
                os.kill(pid, number)
        process.send_signal(signal.SIGTERM)
        assert Program.finish([process])[0][0] == EXIT_STOPPED


def test_a_second_ctrl_c_does_not_wait_for_the_boundary(tmp_path: Path) -> None:
    with Program(tmp_path, "print('ready', flush=True)\nforever()").start() as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert Program.finish([process])[0][0] == 130


# ---- several ranks, with torch


def test_ranks_talk_and_a_barrier_names_who_is_missing(tmp_path: Path) -> None:
    """Rank 2 never comes to the last barrier: the others say so, and it ends although nobody kills it."""
    body = """
        import torch
        said = [rank.broadcast({"from": rank.rank}, src=src) for src in (1, 2, 0, 1)]
        said += [rank.all_reduce(1.5 * (rank.rank + 1), op) for op in ("sum", "mean", "max", "min")]
        said += [rank.all_reduce(torch.tensor([1, rank.rank]), "sum").tolist(), rank.all_reduce(True)]
        for step in range(50):
            rank.barrier(f"step {step}")
        print(json.dumps(said), flush=True)
        rank.barrier("talked")
        if rank.rank == 2:
            time.sleep(600)
        rank.barrier("save", timeout=2)
    """
    ranks = Program(tmp_path, body).run(3)
    talk = [{"from": 1}, {"from": 2}, {"from": 0}, {"from": 1}, 9.0, 3.0, 4.5, 1.5, [3, 3], 3.0]
    assert [json.loads(output) for _, output, _ in ranks] == [talk] * 3
    for code, _, said in ranks[:2]:
        assert code in (1, EXIT_PEER)  # whoever gave up first, and who heard of it
        assert re.search(r"barrier 'save': after 2 s still without rank 2 on \S+ \(last at barrier 'talked'\)", said)
    code, _, said = ranks[2]
    assert code == EXIT_PEER
    assert "this rank was stuck here" in said
    assert "time.sleep(600)" in said


def test_an_exception_ends_ranks_that_are_in_a_collective(tmp_path: Path) -> None:
    """Rank 1 has a thread that would keep its process for ever."""
    body = """
        import torch
        rank.all_reduce(1.0)
        if rank.rank == 1:
            threading.Thread(target=forever).start()
            raise ValueError("boom")
        rank.all_reduce(torch.ones(1000))
    """
    (code0, _, said0), (code1, _, said1) = Program(tmp_path, body).run(2)
    assert (code0, code1) == (EXIT_PEER, 1)
    assert "Traceback" in said1
    assert re.search(r"\[rank 0/2 \S+\] rank 1 on \S+ failed: ValueError: boom", said0)


def test_an_exception_before_the_first_meeting_is_heard(tmp_path: Path) -> None:
    body = """
        if rank.rank == 0:
            rank.barrier("first")
        while not somebody_listens(rank.place):
            time.sleep(0.05)
        raise ValueError("boom")
    """
    program = Program(tmp_path, body)
    imports = "from pipeline.distributed.peers import somebody_listens\n"
    program.path.write_text(imports + program.path.read_text())
    (code0, _, said0), (code1, _, _) = program.run(2)
    assert (code0, code1) == (EXIT_PEER, 1)
    assert "ValueError: boom" in said0


def test_who_waits_for_a_rank_that_a_signal_stopped_stops_too(tmp_path: Path) -> None:
    body = """
        rank.barrier("both")
        if rank.rank == 1:
            rank.request_stop()
        rank.check_stop()
        rank.barrier("next")
    """
    (code0, _, said0), (code1, _, _) = Program(tmp_path, body).run(2)
    assert (code0, code1) == (EXIT_STOPPED, EXIT_STOPPED)
    assert re.search(r"barrier 'next': rank 1 on \S+ \(ended: stopped\) cannot arrive any more", said0)


def test_torchrun_serves_the_store_and_sees_the_exit_code(tmp_path: Path) -> None:
    body = """
        print(json.dumps([rank.launcher, rank.world_size, rank.broadcast(rank.rank + 40, src=1)]), flush=True)
        if rank.rank == 1:
            sys.exit(9)
    """
    program = Program(tmp_path, body)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program.path)]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = outer | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert ended.stdout.splitlines() == ['["torchrun", 2, 41]'] * 2
    assert ended.returncode == 1
    assert "exitcode  : 9" in ended.stderr
