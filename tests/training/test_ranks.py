"""Several ranks, workers, accumulation, kills: a run that resumes does so to the bit, or says why it cannot."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed.environment import free_port
from pipeline.storage import Folder
from pipeline.training.checkpoint import names, open_checkpoint
from pipeline.training.loggers import read_log

REPOSITORY = Path(__file__).parents[2]
ONE_RANK = """
import json, os, signal, sys, warnings
from pathlib import Path
import torch
from pipeline.distributed import distributed
from tiny_training import Regression, Run

warnings.simplefilter("ignore")
torch.set_num_threads(1)
path, settings, kill, number = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

class Interrupted(Regression):
    def losses(self, network, batch, keys):
        if keys.step == kill:
            os.kill(os.getpid(), number)
        return super().losses(network, batch, keys)

    def prepare(self, batch, keys):  # an augmentation, as a worker does it
        noise = [torch.randn(4, generator=torch.Generator().manual_seed(int(e * 1000 + p)))
                 for e, p in zip(keys.epochs, keys.positions)]
        return {**batch, "x": batch["x"] + 0.1 * torch.stack(noise)}

@distributed(timeout=60)
def main(rank):
    Run(path, rank)(task=Interrupted(plain=settings.pop("plain", False)), **settings)

main()
"""
FAKE_HUB = """
import os
import huggingface_hub

class Api:
    def create_repo(self, *args, **settings):
        pass

    def upload_folder(self, repo_id, folder_path, commit_message):
        with open(os.environ["UPLOADS"], "a") as file:
            file.write(f"rank {os.environ['RANK']}: {commit_message}\\n")

huggingface_hub.HfApi = Api
"""
SETTINGS = {"steps": 9, "checkpoint_every": 4, "log_every": 2, "evaluate_every": 3, "micro_batch": 2, "workers": 1}
NEVER = -5


FAKE_GPUS = """
import torch.distributed
from fake_cuda import fake_cuda

torch.distributed.is_nccl_available = lambda: False
pretended = fake_cuda(2)
pretended.__enter__()
"""


def life(
    path: Path, ranks: int, kill: int = NEVER, number: int = 0, before: str = "", on_node: int = 0, **settings: Any
) -> list[int]:
    """Exit codes of one life of the run; the signal ``number`` comes to rank 0 in step ``kill``.

    Args:
        before: code that each rank runs first.
        on_node: ranks of each node, if they are several nodes.
    """
    port = free_port()
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"LOCAL_RANK": rank % on_node, "LOCAL_WORLD_SIZE": on_node} if on_node else {}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environment["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
        arguments = [str(path), json.dumps({**SETTINGS, **settings}), str(kill if rank == 0 else NEVER), str(number)]
        processes.append(subprocess.Popen([sys.executable, "-c", before + ONE_RANK, *arguments], env=environment))
    return [process.wait(timeout=240) for process in processes]


def test_one_rank_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOADS", str(tmp_path / "uploads"))
    settings = {"hub_repo": "somebody/model", "export_every": 1, "steps": 6, "workers": 0}
    assert life(tmp_path / "run", 2, before=FAKE_HUB, **settings) == [0, 0]
    (epoch,) = (path.name for path in (tmp_path / "run" / "exports").iterdir())
    assert (tmp_path / "uploads").read_text().splitlines() == [f"rank 0: {epoch}", "rank 0: export"]


def everything(path: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, as bytes, and the log, but for times and speeds."""
    found = open_checkpoint(path)
    tensors = {f"{part}/{name}": t.numpy().tobytes() for part, ts in found.tensors.items() for name, t in ts.items()}
    changing = ("time", "samples_per_second", "data_wait", "memory_mb")
    log = [{name: value for name, value in line.items() if name not in changing} for line in read_log(path)]
    return {"facts": found.facts, "log": log, **tensors}


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupted_runs_end_with_the_same_bits(ranks: int, tmp_path: Path) -> None:
    """Stopped by SIGUSR2 in one step, killed in another: weights, optimizer, averages and log come out the same."""
    first, second = sorted(random.Random(ranks).sample(range(9), 2))
    assert life(tmp_path / "whole", ranks) == [0] * ranks
    assert life(tmp_path / "run", ranks, first, signal.SIGUSR2) == [75] * ranks
    with Folder.open(tmp_path / "run/checkpoints") as folder:
        assert names(folder)[-1] == f"step_{first + 1:06d}"
    killed = life(tmp_path / "run", ranks, second, signal.SIGKILL)
    assert killed[0] == -9 and 0 not in killed
    assert life(tmp_path / "run", ranks) == [0] * ranks
    assert everything(tmp_path / "run") == everything(tmp_path / "whole")


def test_fsdp_learns_what_one_rank_learns_and_its_checkpoint_loads_on_one(tmp_path: Path) -> None:
    assert life(tmp_path / "one", 1, plain=True) == [0]
    assert life(tmp_path / "run", 2, 5, signal.SIGTERM, plain=True, parallel="fsdp") == [75, 75]
    assert life(tmp_path / "run", 1, plain=True) == [0]
    ours, theirs = (open_checkpoint(tmp_path / name).tensors for name in ("run", "one"))
    for part in ("model", "ema"):
        torch.testing.assert_close(ours[part], theirs[part], atol=1e-5, rtol=1e-4)
    losses = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("run", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("before", "settings"),
    [
        ("", {"parallel": "hsdp", "on_node": 1, "reshard_after_forward": False}),  # two nodes with a rank each
        (FAKE_GPUS, {"parallel": "ddp"}),
    ],
)
def test_other_kinds_of_ranks_learn_what_one_rank_learns(before: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """And none of them writes what another one writes."""
    exact = {"plain": True, "precision": "float32", "workers": 0}
    assert life(tmp_path / "one", 1, **exact) == [0]
    assert life(tmp_path / "run", 2, before=before, **exact, **settings) == [0, 0]
    ours, theirs = (open_checkpoint(tmp_path / name) for name in ("run", "one"))
    for part in ("model", "ema"):
        torch.testing.assert_close(ours.tensors[part], theirs.tensors[part], atol=1e-5, rtol=1e-4)
    place = tmp_path / "run/checkpoints/step_000009"
    sizes = [(place / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    alone = (tmp_path / "one/checkpoints/step_000009/__0_0.distcp").stat().st_size
    assert max(sizes) < 0.8 * alone and sum(sizes) < 1.2 * alone
