"""slurm/nodes.sh: which nodes a life of a job blames, by stand-ins for SLURM. On a real one: test_slurm_jobs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NODES = {"a": (0, 1), "b": (2, 3), "c": (4, 5)}
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames"*) tr , '\\n' <<< "$3" ;;
  *) echo "JobId=7 ExcNodeList=(null) Partition=main Restarts=0 " ;;
esac
"""


def blamed(folder: Path, codes: dict[int, str], before: str = "", nodes: int = 3, **environment: str) -> list[str]:
    """Nodes that would be left out, of a job of two ranks on each node.

    Args:
        codes: of each rank what its life holds: ``code``, or ``code steps seconds``.
        before: lines of bash that go first.
    """
    (folder / "bin").mkdir(parents=True)
    for name, text in (("scontrol", SCONTROL), ("sbatch", "#!/bin/bash\n"), ("srun", "#!/bin/bash\necho $SICK\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    life = folder / "life"
    life.mkdir()
    for rank, code in codes.items():
        number, _, pace = code.partition(" ")
        node = next(name for name, ranks in NODES.items() if rank in ranks)
        (life / f"{rank}.{number}").write_text(f"{node}\n{pace or '0 0'}\n\n/data\n")
    script = f"""
        set -euo pipefail
        source {ROOT}/slurm/job.sh > /dev/null
        export LATENTMILL_LIFE={life} LM_EACH=1
        lm_srun="" lm_module=pipeline
        {before}
        lm_read {2 * nodes}
        lm_find_bad_nodes alone {2 * nodes}
        lm_last=said
        echo "bad: ${{lm_bad[*]}}"
    """
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(2 * nodes)}
    job |= {"SLURM_TASKS_PER_NODE": f"2(x{nodes})", "SLURM_JOB_NODELIST": ",".join([*NODES][:nodes])}
    job |= {"LOGS": str(folder / "logs"), "LATENTMILL_HOME": str(ROOT), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=job | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("bad:")[2].split()


STOPPED = dict.fromkeys(range(6), "75")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (STOPPED, []),
        ({**STOPPED, 2: "1"}, ["b"]),
        ({**STOPPED, 2: "77"}, ["b"]),
        ({**STOPPED, 2: "1", 4: "1"}, ["b", "c"]),
        (dict.fromkeys(range(6), "1"), []),  # what goes wrong everywhere is no node's fault
        (dict.fromkeys((0, 1, 3, 4, 5), "75"), ["b"]),  # rank 2 said nothing
        ({0: "75", 3: "1"}, ["b"]),  # srun has killed the others, before they could say anything
        ({**STOPPED, 0: "76", 1: "76", 2: "76", 3: "76", 4: "76", 5: "3"}, ["c"]),
        ({rank: f"75 {steps} 100" for rank, steps in enumerate((900, 1000, 1000, 900, 200, 250))}, ["c"]),
        ({rank: f"75 {steps} 100" for rank, steps in enumerate((900, 1000, 1000, 900, 400, 450))}, []),
        ({rank: f"75 {steps} 9" for rank, steps in enumerate((900, 1000, 1000, 900, 20, 25))}, []),  # too early to say
    ],
)
def test_nodes_that_did_badly_while_others_did_well_are_found(
    tmp_path: Path, codes: dict[int, str], expected: list[str]
) -> None:
    assert blamed(tmp_path, codes) == expected


@pytest.mark.parametrize(("sick", "expected"), [("b", ["b"]), ("a c", ["a", "c"]), ("", []), ("a b c", [])])
@pytest.mark.parametrize("code", ["74", "78"])
def test_a_refusing_disk_and_a_missing_module_are_looked_for_on_each_node(
    tmp_path: Path, code: str, sick: str, expected: list[str]
) -> None:
    """The first rank that meets it ends the others before they can."""
    assert blamed(tmp_path, {**STOPPED, 0: code}, SICK=sick.replace(" ", "\n")) == expected


def test_frozen_ranks_are_to_blame_not_those_that_waited_for_them(tmp_path: Path) -> None:
    codes = dict.fromkeys((0, 1, 4, 5), "77")
    assert blamed(tmp_path, codes, before='echo " 2 3 " > "$LATENTMILL_LIFE/frozen"') == ["b"]
    codes = dict.fromkeys((0, 1, 4, 5), "75") | {3: "1"}
    assert blamed(tmp_path / "well", codes, before='echo " 2 " > "$LATENTMILL_LIFE/frozen"') == ["b"]


def test_no_more_nodes_are_left_out_than_asked_for(tmp_path: Path) -> None:
    codes = {**STOPPED, 2: "1", 4: "1"}
    assert blamed(tmp_path / "1", codes, BAD_NODES="1") == ["b"]
    assert blamed(tmp_path / "2", codes, BAD_NODES="0") == []
    assert blamed(tmp_path / "3", codes, before='lm_note excluded " x"') == ["b"]  # BAD_NODES=2 in all lives together
    assert blamed(tmp_path / "4", codes, before="lm_enough_without() { [[ $1 != *b* ]]; }") == ["c"]


def test_an_only_node_gets_a_second_chance_but_not_without_an_environment(tmp_path: Path) -> None:
    codes = {0: "75", 1: "1"}
    assert blamed(tmp_path / "1", codes, nodes=1) == []
    assert blamed(tmp_path / "2", codes, nodes=1, before="lm_note node a") == ["a"]
    assert blamed(tmp_path / "3", codes, nodes=1, before="lm_note node b") == []
    assert blamed(tmp_path / "4", {0: "78"}, nodes=1, SICK="a") == ["a"]


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("srun: error: node1: tasks 0-1,3: Exited with exit code 78", {0: "78", 1: "78", 3: "78"}),
        ("srun: error: node[1-2]: task 2: Exited with exit code 5", {2: "5"}),
        ("srun: error: node1: task 2: Killed", {}),
        ("srun: Job step creation temporarily disabled, retrying", {}),
    ],
)
def test_what_srun_says_counts_where_ranks_could_say_nothing(tmp_path: Path, line: str, codes: dict[int, str]) -> None:
    show = 'lm_ask_srun; for rank in "${!lm_code[@]}"; do echo "code $rank ${lm_code[$rank]}"; done'
    script = f"source {ROOT}/slurm/job.sh > /dev/null; LM_EACH=1 lm_srun={tmp_path / 'said'}; lm_last=1; {show}"
    (tmp_path / "said").write_text(f"{line}\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_NNODES": "2", "SLURM_NTASKS": "4", "LOGS": str(tmp_path)}
    job |= {"LATENTMILL_HOME": str(ROOT), "SLURM_JOB_NODELIST": "a,b", "PATH": os.environ["PATH"]}
    said = subprocess.run(["bash", "-c", script], env=job, capture_output=True, text=True, check=True).stdout
    assert {int(word.split()[1]): word.split()[2] for word in said.splitlines()} == codes
