"""benchmarks/gpu.py: each part runs to its end on a CPU, and the file says what was measured where."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", ROOT / "benchmarks/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("part", "columns", "rows"),
    [
        ("precompute", {"resolutions", "bare forward, img/s", "stage, img/s", "stage / bare", "GPU idle"}, 2),
        ("cpus", {"decoding processes", "img/s", "GPU idle"}, 1),
        ("training", {"model", "img/s", "MFU", "peak memory, MB"}, 3),
        ("scans", {"mixer", "length", "torch, ms", "mamba_ssm, ms"}, 2),
        ("generate", {"model", "sampler", "img/s"}, 1),
    ],
)
def test_each_part_can_be_rehearsed_on_a_cpu(
    bench: ModuleType, tmp_path: Path, part: str, columns: set[str], rows: int
) -> None:
    found = bench.PARTS[part](bench.SIZES["tiny"], torch.device("cpu"), tmp_path)
    assert len(found) == rows and all(columns <= row.keys() for row in found)
    assert bench.table(found).count("\n") == rows + 1


def test_one_part_that_fails_is_told_and_does_not_keep_the_others(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        good = "part=scans" in command
        said = '[{"length": "8", "torch, ms": "1.00"}]' if good else ""
        return subprocess.CompletedProcess(command, 0 if good else 1, said, "Traceback\nRuntimeError: no memory")

    monkeypatch.setattr(bench.subprocess, "run", run)
    output = tmp_path / "gpu.md"
    arguments = ["gpu.py", "size=tiny", "device=cpu", "parts=generate,scans", f"output={output}"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == 1
    text = output.read_text()
    assert "RuntimeError: no memory" in text and "| length | torch, ms |" in text
    assert "A rehearsal" in text and "1.00" not in text, "figures that were measured on no GPU"
    assert "generate: failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 1, "there is nothing to measure"),
        (["parts=nothing", "device=cpu"], 2, "known: precompute"),
        (["sizes=full"], 2, "unknown: sizes"),
    ],
)
def test_without_a_gpu_and_with_wrong_words_it_says_so(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    assert bench.main() == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [False, True])
def test_make_gpu_rehearses_where_there_is_none(gpu: bool, tmp_path: Path) -> None:
    """A stand-in for Python says whether there is a GPU, and writes down what it is asked to run."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$2" in *is_available*) exit {0 if gpu else 1};; "import torch") exit 0;; esac\n'
        f'echo "GPU_TESTS_DEVICE=$GPU_TESTS_DEVICE $*" >> {tmp_path}/asked\n'
    )
    python.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={python}", "VENV=", "GPU=parts=scans"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    asked = (tmp_path / "asked").read_text()
    if gpu:
        assert (
            asked.endswith("benchmarks/gpu.py output=gpu.md parts=scans\n") and "GPU_TESTS_DEVICE= -m pytest" in asked
        )
    else:
        assert "no GPU: this is a rehearsal" in done.stdout
        assert "GPU_TESTS_DEVICE=cpu -m pytest -m gpu -rs" in asked
        assert asked.endswith("benchmarks/gpu.py output=gpu-rehearsal.md size=tiny device=cpu parts=scans\n")
