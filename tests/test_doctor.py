"""launch/doctor.py on one machine: each check in plain words, what ranks say together, and how it is shown."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import doctor
from launch.checkup import findings_table
from launch.checkup.judge import judge
from launch.checkup.start import Heard
from pipeline import storage
from pipeline.config.schema import ConfigError
from pipeline.doctor import filesystem, gpus, hub_access, machine, network, speed
from pipeline.doctor.finding import Finding, Report, read

ROOT = Path(__file__).parents[1]


def only(findings: Iterator[Finding] | list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


# ---- findings travel as lines


def test_findings_are_found_among_other_output() -> None:
    finding = Finding("gpus", "fail", 'says "no"\nand – more', "do", {"a": 1}, "node3", 4)
    lines = [
        "noise",
        f"3: {finding.line()}",
        finding.line()[:-9],
        "@latentmill-doctor [1]",
        '@latentmill-doctor {"x": 1}',
    ]
    assert list(read(lines)) == [finding]


def test_what_the_shell_says_is_read_as_well(tmp_path: Path) -> None:
    environment = {
        "LATENTMILL_HOME": '/no"where\\',
        "PATH": os.environ["PATH"],
        "SLURMD_NODENAME": "n7",
        "SLURM_PROCID": "5",
    }
    script = (ROOT / "slurm/doctor.sh").read_text()
    said = subprocess.run(["bash", "-c", script, "doctor"], env=environment, capture_output=True, text=True, check=True)
    start, fault, end = read(said.stdout.splitlines())
    assert (start.check, end.check, start.node, start.rank) == ("start", "end", "n7", 5)
    assert fault.text == 'the checkout /no"where\\ cannot be read on this node' and fault.state == "fail"


@pytest.mark.parametrize(
    ("setup", "venv", "said"),
    [
        ("false; no_such_command", "", "setup= fails: .*no_such_command"),
        ("", "/not/there", "no Python environment at LATENTMILL_VENV=/not/there on "),
        ("", "{tmp}/old", r"python is not Python 3.11 or later: 3.9.1 \(.*/old/bin/python\)"),
        ("", "{tmp}/bare", "Python cannot import the pipeline: ModuleNotFoundError: No module named 'xxhash'"),
    ],
)
def test_an_environment_that_cannot_be_used_is_told_without_it(
    tmp_path: Path, setup: str, venv: str, said: str
) -> None:
    for name, script in (
        ("old", "echo 3.9.1 >&2; exit 1"),
        (
            "bare",
            "[[ $2 != *import?pipeline* ]] || { echo \"ModuleNotFoundError: No module named 'xxhash'\" >&2; exit 1; }",
        ),
    ):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin/python").write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name / "bin/python").chmod(0o755)
        (tmp_path / name / "bin/activate").write_text(f"PATH={tmp_path}/{name}/bin:$PATH\n")
    environment = {"LATENTMILL_HOME": str(ROOT), "DOCTOR_SETUP": setup, "SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
    environment["LATENTMILL_VENV"] = venv.format(tmp=tmp_path)
    script = (ROOT / "slurm/doctor.sh").read_text()
    ended = subprocess.run(
        ["bash", "-c", script, "doctor"], env=environment, capture_output=True, text=True, check=True
    )
    fault = only(read(ended.stdout.splitlines()), "environment")
    assert fault.state == "fail" and fault.advice
    assert re.search(said, fault.text), fault.text


def test_a_check_that_hangs_or_raises_does_not_keep_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    report = Report("a", 2)

    def fails() -> Iterator[Finding]:
        yield Finding("one", "ok", "seen")
        raise OSError(errno.EIO, "Input/output error")

    def hangs() -> Iterator[Finding]:
        time.sleep(30)
        yield Finding("never", "ok", "")

    assert report.run("disk", fails, 5)
    assert not report.run("mount", hangs, 0.05)
    found = list(read(capfd.readouterr().out.splitlines()))
    assert [(finding.check, finding.state) for finding in found] == [("disk", "fail"), ("mount", "fail")]
    assert "Input/output error" in found[0].text and "no answer within 0.05 s" in found[1].text
    assert {(finding.node, finding.rank) for finding in found} == {("a", 2)}


# ---- one machine


def test_packages_are_held_against_floors_and_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.packages().state == "ok"
    monkeypatch.setattr(machine, "_pins", lambda: {"numpy": "0.1"})
    monkeypatch.setattr(machine, "_floors", lambda: {"numpy": "1.0"})
    assert machine.packages().state == "warn" and "numpy" in machine.packages().text
    monkeypatch.setattr(machine, "_floors", lambda: {"numpy": "99", "not-there-at-all": "1"})
    found = machine.packages()
    assert found.state == "fail"
    assert "missing: not-there-at-all; too old: numpy" in found.text and "pip install -r" in found.advice


def test_cpus_and_limits_that_are_too_low_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.cpus(0).state == "ok"
    assert "SLURM_CPU_BIND" in machine.cpus(10_000).advice
    monkeypatch.setattr(machine, "_SHARED_MEMORY", 2**60)
    monkeypatch.setattr(machine, "_FILES", 10**9)
    found = list(machine.limits())
    assert {only(found, "shared memory").state, only(found, "open files").state} == {"warn"}


@pytest.mark.parametrize(("expected", "state"), [(0, "ok"), (2, "fail")])
def test_no_gpu_is_a_fault_only_where_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, expected: int, state: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "Path", lambda name: Path("/not/there"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = only(gpus.look(expected, False), "gpus")
    assert found.state == state
    assert "2 GPUs were requested on each node, but torch sees none: " in found.text or not expected


def test_kernels_of_attention_are_run_and_compared() -> None:
    import torch

    found = only(gpus.kernels(torch.device("cpu")), "kernels attention")
    assert found.state == "ok" and "plain" in found.values["attention"]


# ---- file systems


def test_a_folder_that_keeps_its_promises(tmp_path: Path) -> None:
    found = list(filesystem.look(str(tmp_path), alone=True))
    assert {"data_dir", "space", "clock", "file system speed"} <= {finding.check for finding in found}
    assert not [finding for finding in found if finding.state == "fail"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errno.EROFS, "mounted read-only"),
        (errno.EACCES, "may not write there"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "look at the mount"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, advice: str
) -> None:
    def probe(folder: storage.Folder) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(storage, "probe", probe)
    (found,) = filesystem.look(str(tmp_path), alone=True)
    assert found.state == "fail" and os.strerror(error) in found.text and advice in found.advice


def test_a_folder_that_is_not_there_or_no_folder(tmp_path: Path) -> None:
    (found,) = filesystem.look(str(tmp_path / "a/b"), alone=True)
    assert found.state == "fail" and f"the path ends at {tmp_path}" in found.text
    (tmp_path / "file").touch()
    (found,) = filesystem.look(str(tmp_path / "file"), alone=True)
    assert "not a folder" in found.text


def test_a_clock_that_is_off_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    for skew, state in ((0.0, "ok"), (10.0, "warn"), (-3600.0, "fail")):
        monkeypatch.setattr(time, "time", lambda skew=skew: now() + skew)
        found = filesystem.clock(tmp_path)
        assert found.state == state
        assert ("ahead of" if skew > 0 else "behind" if skew < 0 else "as the") in found.text


class Together:
    """Ranks as threads, with a dictionary for a store."""

    def __init__(self, rank: int, members: list[int], store: dict[str, str]) -> None:
        self.rank, self.members, self.store = rank, members, store

    def say(self, key: str, value: str) -> None:
        self.store[key] = value

    def ask(self, key: str) -> str:
        return self.store.get(key, "")

    def wait(self, name: str) -> None:
        self.say(f"at/{name}/{self.rank}", "x")
        end = time.monotonic() + 20
        while not all(self.ask(f"at/{name}/{rank}") for rank in self.members):
            assert time.monotonic() < end, name
            time.sleep(0.005)


def look_together(folders: list[Path], patience: float = 10) -> list[list[Finding]]:
    store: dict[str, str] = {}
    members = list(range(len(folders)))
    found: list[list[Finding]] = [[] for _ in members]

    def work(rank: int) -> None:
        others = Together(rank, members, store)
        found[rank] = list(filesystem.look_together(str(folders[rank]), "x", others, patience))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_share_a_folder_see_each_other_and_one_wins(tmp_path: Path) -> None:
    found = look_together([tmp_path] * 3)
    assert [only(each, "same data_dir").state for each in found] == ["ok"] * 3
    assert only(found[0], "exclusive rename").text == "of 3 ranks that renamed to one name, one won"
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_sees_another_folder_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    found = look_together([tmp_path / "a", tmp_path / "a", tmp_path / "b"], patience=0.3)
    assert "without the files of ranks 2" in only(found[0], "same data_dir").text
    assert "without the files of ranks 0, 1" in only(found[2], "same data_dir").text
    assert only(found[0], "exclusive rename").state == "fail"  # two folders, two winners


def test_a_rank_without_the_folder_leaves_the_others_to_go_on(tmp_path: Path) -> None:
    found = look_together([tmp_path, tmp_path, tmp_path / "not there"], patience=5)
    assert [len(each) > 0 for each in found] == [True, True, False]
    assert only(found[0], "same data_dir").state == "ok"


# ---- network


def test_a_connection_that_fails_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        network.try_port("127.0.0.1", port, 1)
        assert "through lo" in network.interface_to("127.0.0.1", port)
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}: refused, nobody listens there"):
        network.try_port("127.0.0.1", port, 0.1)
    with pytest.raises(ConnectionError, match="the host name cannot be resolved"):
        network.try_port("no-such-host.invalid", port, 1)
    assert network.why(TimeoutError()) == "no answer, packets are dropped"


@pytest.mark.parametrize(
    ("log", "taken"),
    [
        ("n1:7:7 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB eth0:10.0.0.1<0>", "IB mlx5_0"),
        ("n1:7:7 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>", "Socket eth0"),
        ("n1:7:7 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/IPC", ""),
    ],
)
def test_the_network_that_nccl_took_is_read_from_its_log(log: str, taken: str) -> None:
    assert network.transport(log) == taken


# ---- models and speed


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("stabilityai/sdxl-vae", "stabilityai/sdxl-vae"),
        ("stabilityai/sdxl-vae@main", "stabilityai/sdxl-vae"),
        ("openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378", "apple/DFN5B-CLIP-ViT-H-14-378"),
        ("t5:google/flan-t5-base#length=77", "google/flan-t5-base"),
        ("embedded", ""),
        ("openclip:ViT-B-32:random", ""),
        ("clip:/models/clip", ""),
    ],
)
def test_models_that_lie_on_the_hub_are_known(name: str, repository: str) -> None:
    assert hub_access._repository(name) == repository


def test_a_model_that_cannot_come_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_access, "unreachable", lambda: "huggingface.co: timed out")
    found = only(hub_access.look(["owner/name"]), "hub")
    assert (
        found.state == "fail"
        and "owner/name not in the cache" in found.text
        and "hf download owner/name" in found.advice
    )
    assert only(hub_access.look([]), "hub").state == "warn"
    assert only(hub_access.look(["embedded"]), "hub").state == "ok"
    (tmp_path / "models--owner--name/snapshots").mkdir(parents=True)
    assert only(hub_access.look(["owner/name"]), "hub").state == "ok"
    monkeypatch.setattr(hub_access, "unreachable", lambda: "")
    assert only(hub_access.look(["other/name"]), "hub").state == "ok"


def test_the_gpus_hunger_is_held_against_the_cores() -> None:
    found = speed.balance(decode=285, encode=1000, cpus=2, gpu=True)
    assert found.state == "warn" and "idle for 72%" in found.text
    assert found.advice.startswith("cpus_per_task=5 for each GPU") and found.values == {"cpus_needed": 5}
    assert speed.balance(decode=285, encode=1000, cpus=5, gpu=True).state == "ok"
    assert "decoding 50%" in speed.balance(decode=10, encode=10, cpus=5, gpu=False).text


def test_speeds_are_measured_on_what_is_chosen() -> None:
    import torch

    assert speed.decoding(64, 0.01).values["decode"] > 1
    found = list(speed.encoders("embedded", "embedded", [32, 64], 2, 0.01, torch.device("cpu")))
    assert [finding.check for finding in found] == ["autoencoder", "autoencoder", "text encoder", "encoders"]
    assert found[-1].values["encode"] > 0


# ---- what ranks say together


def heard(*findings: Finding, ranks: int, other: tuple[str, ...] = ()) -> Heard:
    ends = [Finding("end", "ok", "", node=f"n{rank}", rank=rank) for rank in range(ranks) if rank != 1]
    return Heard(ranks, [*findings, *ends], list(other))


def test_ranks_that_did_not_come_to_an_end_are_named() -> None:
    found = judge(heard(ranks=3, other=("srun: error: n1: task 1: Killed",)))
    assert [(f.check, f.state, f.text) for f in found] == [
        ("ranks", "fail", "ranks 1 never began; last lines: srun: error: n1: task 1: Killed")
    ]
    (fault,) = [f for f in judge(heard(Finding("start", "ok", "", node="n1", rank=1), ranks=2)) if f.check == "ranks"]
    assert (fault.node, fault.text) == ("n1", "ranks 1 started but did not finish")


def test_nodes_that_differ_are_named() -> None:
    same = [Finding("packages", "ok", "", values={"packages": "a"}, node=node) for node in ("n1", "n2", "n4")]
    found = judge(Heard(0, [*same, Finding("end", "ok", "")]))
    assert not [f for f in found if f.check == "same environment"]
    other = Finding("packages", "ok", "", values={"packages": "b"}, node="n3")
    (fault,) = [f for f in judge(Heard(0, [*same, other])) if f.check == "same environment"]
    assert (fault.node, fault.state) == ("n3", "fail")
    assert fault.text == "packages of n3 are not those of n1, n2, n4"


def test_a_node_that_crawls_is_named() -> None:
    speeds = {"n1": 300, "n2": 280, "n3": 90, "n4": 310}
    found = [Finding("decoding", "ok", "", values={"decode": value}, node=node) for node, value in speeds.items()]
    (fault,) = [f for f in judge(Heard(0, found)) if f.check == "slow node"]
    assert fault.node == "n3" and "decodes 90 images a second" in fault.text


def test_the_table_begins_with_what_will_fail() -> None:
    nodes = [Finding("clock", "ok", "fine", node=f"n{n}") for n in range(4)]
    bad = [Finding("data_dir", "fail", "read-only [ro]", "remount it", node=node) for node in ("n2", "n3")]
    rows = findings_table.rows([*nodes, *bad, Finding("hub", "warn", "not reached")])
    assert [(row.state, row.check, row.where) for row in rows] == [
        ("fail", "data_dir", ["n2", "n3"]),
        ("warn", "hub", []),
        ("ok", "clock", ["n0", "n1", "n2", "n3"]),
    ]
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(findings_table.render([*nodes, *bad]))
    text = console.export_text()
    assert "read-only [ro]" in text and "→ remount it" in text and "n2, n3" in text and "4 nodes" in text
    assert findings_table.verdict([*nodes, *bad]) == "1 check failed"
    assert findings_table.verdict(nodes) == "nothing is wrong"


# ---- the program


def test_this_machine_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main([f"data_dir={tmp_path}", "seconds=0.01", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["good"]
    checks = {finding["check"] for finding in told["findings"]}
    assert {"python", "packages", "cpus", "gpus", "kernels attention", "data_dir", "hub", "decoding"} <= checks


def test_a_fault_gives_exit_code_1_and_torch_stays_out_of_the_launcher(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['doctor.py']; from launch import doctor; from launch.checkup import start\n"
        "from pipeline.doctor.finding import Finding\n"
        "start.here = lambda config, launch: start.Heard(0, [Finding('gpus', 'fail', 'none')])\n"
        "code = doctor.main([]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "2 checks failed" in ended.stdout  # the check did not come to its end, either


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["datadir=/data"], "unknown key 'datadir'; did you mean data_dir"),
        (["stage=filtre"], "stage=filtre: did you mean filter"),
        (["seconds=0"], "seconds=0"),
        (["nodes=2"], "nodes=2 has no effect with cluster=local"),
        (["cluster=nowhere"], "cluster=nowhere: no such preset"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doctor.read(arguments)


def test_without_its_packages_it_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(\"No module named 'yaml'\", name='yaml')\n")
    ended = subprocess.run(
        [sys.executable, str(ROOT / "launch/doctor.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "has no package 'yaml'\n→ make setup" in ended.stderr and "Traceback" not in ended.stderr


def test_a_cluster_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (found,) = doctor.check(*doctor.read(["cluster=slurm"]))
    assert found.state == "fail" and "no sbatch on this machine" in found.text


def test_all_is_described() -> None:
    values: dict[str, Any] = {}
    config, launch = doctor.read(["cluster=slurm", "nodes=3", "gpus_per_node=4", "cpus_per_task=6", "mem=8G"])
    from launch.checkup import start

    words = start._srun_options(start.script_of(config, launch), config)
    values = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    expected = {"nodes": "3", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "6", "mem": "8G"}
    assert expected.items() <= values.items() and values["kill-on-bad-exit"] == "0"
    assert {"gpus=4", "cpus=6"} <= set(start._arguments(config, launch))
