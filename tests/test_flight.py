"""Recordings of collectives: written by ranks that end badly, read without running what is in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import recorded
from test_distributed import Program

from launch import status
from launch.monitor.flight_report import Unreadable, explain, read

GROUPS = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2, 3]"}}


def entry(sequence: int, name: str, state: str = "completed", **more: Any) -> dict[str, Any]:
    """One collective as torch 2.14 records it for NCCL."""
    frames = [
        {"name": "all_reduce", "filename": "/v/lib/python3.11/site-packages/torch/distributed/c10d.py", "line": 9},
        {"name": "step", "filename": "/home/me/pipeline/training/loop.py", "line": 120 + sequence},
    ]
    return {
        "collective_seq_id": sequence, "p2p_seq_id": 0, "op_id": sequence, "record_id": sequence, "pg_id": 0,
        "process_group": ("0", "default_pg"), "profiling_name": f"nccl:{name}", "is_p2p": False, "state": state,
        "input_sizes": [[1024, 64]], "input_dtypes": ["BFloat16"], "output_sizes": [[1024, 64]],
        "output_dtypes": ["BFloat16"], "frames": frames, "retired": False, "timeout_ms": 600_000,
    } | more  # fmt: skip


def write(folder: Path, rank: int, *entries: dict[str, Any], **more: Any) -> Path:
    dump = {"version": "2.10", "entries": list(entries), "pg_config": GROUPS, "pg_status": {}} | more
    path = folder / f"flight-{rank}"
    path.write_bytes(pickle.dumps(dump, protocol=2))
    return path


def test_the_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    ranks = [entry(7, "all_gather"), entry(8, "all_reduce", "started")]
    files = [write(tmp_path, rank, *ranks) for rank in (0, 1)] + [write(tmp_path, 3, ranks[0])]
    assert explain(files) == [
        "collective 8 of group default (ranks 0-3):",
        "  ranks 0-1 waited in all_reduce of [1024, 64] BFloat16 at /home/me/pipeline/training/loop.py:128 (step)",
        "  rank 3 never entered it: its last collective was 7, all_gather of [1024, 64] BFloat16 at "
        "/home/me/pipeline/training/loop.py:127 (step)",
        "  rank 2 left no recording: killed, or stuck elsewhere (see its log and its node)",
    ]


def test_collectives_that_do_not_fit_are_told(tmp_path: Path) -> None:
    pg = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}}
    files = [
        write(tmp_path, 0, entry(8, "all_reduce", "started"), pg_config=pg),
        write(tmp_path, 1, entry(8, "broadcast", "scheduled", input_sizes=[[3]]), pg_config=pg),
    ]
    text = "\n".join(explain(files))
    assert "rank 0 waited in all_reduce of [1024, 64]" in text and "rank 1 waited in broadcast of [3]" in text
    assert "each rank must call the same collective" in text


def test_what_ended_well_is_not_told(tmp_path: Path) -> None:
    assert explain([write(tmp_path, rank, entry(7, "all_gather")) for rank in range(4)]) == []
    assert explain([]) == []


def test_a_rank_that_is_ahead_is_not_blamed(tmp_path: Path) -> None:
    files = [write(tmp_path, 0, entry(7, "broadcast"), entry(8, "send")), *()]
    files += [write(tmp_path, rank, entry(7, "broadcast", "started")) for rank in (1, 2, 3)]
    assert explain(files)[-1].startswith("  rank 0 had completed it: its last collective was 8, send")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "content", [pickle.dumps({"entries": [Evil()]}), b"", b"\x80\x02}.", b"nothing", b"\x80\x05]."]
)
def test_a_file_that_is_no_recording_is_named_and_runs_nothing(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "flight-1"
    path.write_bytes(content)
    with pytest.raises(Unreadable):
        read(path)
    good = write(tmp_path, 0, entry(8, "all_reduce", "started"))
    lines = explain([path, good])
    assert lines[0].startswith(f"{path}: no recording of torch's flight recorder (")
    assert "rank 0 waited" in "\n".join(lines) and not (tmp_path / "evil").exists()


def test_status_shows_it_before_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "train"
    recorded.plan(output, 4)
    recorded.write_events(output, [recorded.event("error", 1, 2, 10.0, 20.0, 1, error="boom")])
    logs = tmp_path / "logs/train.slurm"
    life = logs / ".train-7/0.0"
    life.mkdir(parents=True)
    (logs / "train-7.out").write_text("job 7: srun ended with code 1\n")
    for rank in (0, 1):
        (logs / f"train-7-{rank}.log").write_text("a time-out\n")
    (life / "1.1").touch()
    write(life, 0, entry(8, "all_reduce", "started"))
    write(life, 1, entry(7, "all_gather"))
    assert status.main([str(output), "logs=failed"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("==> collectives <==") < shown.index("rank 1 never entered it") < shown.index("a time-out")


def test_real_ranks_tell_who_did_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", f"{tmp_path}/flight-")
    program = Program(
        tmp_path,
        """
        rank.timeout = 2.0
        import torch
        rank.all_reduce(torch.ones(4))
        if rank.rank == 1:
            time.sleep(1)
            raise ValueError("boom")
        rank.all_reduce(torch.ones(8, 3))
        """,
    )
    codes = [ended for ended, _, _ in program.run(2)]
    assert all(codes)
    assert explain(tmp_path.glob("flight-*")) == [
        "collective 2 of group default (ranks 0-1):",
        "  rank 0 waited in all_reduce of [8, 3] Float",
        "  rank 1 never entered it: its last collective was 1, all_reduce of [4] Float",
    ]
