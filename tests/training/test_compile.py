"""compile=true: each block is one graph, batches of other sizes make few more, and a life that resumes makes none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Regression, Run
from torch import nn
from torch.compiler._cache import CacheArtifactManager

from pipeline.distributed import Rank
from pipeline.models.captioner import Captioner, captioner_config
from pipeline.models.dit import DiT, DiTConfig
from pipeline.models.vision_mamba import VisionMamba, vision_mamba_config
from pipeline.storage import Folder
from pipeline.training.compile_cache import FOLDER, _name, load_compiled
from pipeline.training.parallel import blocks_of, compile_blocks

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")


def diffusion() -> tuple[nn.Module, Any]:
    """A small one of MicroDiT's kind: every block of another width, experts in some, tokens that are masked."""
    shape = {"dim": 32, "depth": 3, "heads": 2, "mixer_dim": 32, "mixer_depth": 1, "experts": 2, "text": "attention"}
    more = {"first_mlp_ratio": 0.5, "first_qkv_ratio": 0.5, "local": False, "qk_norm": True, "gated": True}
    model = DiT(DiTConfig(4, 8, 8, 5, 16, **shape, **more))

    def arguments(size: int) -> tuple[Any, ...]:
        keep = torch.rand(size, 16).argsort(1)[:, :8].sort(1).values
        return torch.randn(size, 4, 8, 8), torch.rand(size), torch.randn(size, 5, 16), torch.rand(size) < 0.5, keep

    return model, arguments


def classifier() -> tuple[nn.Module, Any]:
    config = vision_mamba_config("nano", (3, 16, 16), 3, depth=2, blocks="ssm,hybrid", drop_path=0.1, dim=32)
    return VisionMamba(config), lambda size: (torch.randn(size, 3, 16, 16),)


def captioner(decoder: str) -> tuple[nn.Module, Any]:
    config = captioner_config("nano", image_tokens=4, image_width=8, vocab=50, max_length=20, decoder=decoder)
    return Captioner(config), lambda size: (torch.randn(size, 4, 8), torch.randint(0, 50, (size, 6 + size)))


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (diffusion, 4),  # no two blocks are alike
        (classifier, 2),
        (lambda: captioner("transformer"), 1),
        (lambda: captioner("mamba"), 1),
    ],
)
def test_blocks_are_whole_graphs_and_uneven_batches_make_few_more(make: Any, kinds: int) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    model, arguments = make()
    assert len(blocks_of(model)) >= 2
    compile_blocks(model, backend=backend, fullgraph=True)
    counts = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for size in (6, 4, 5, 7):  # the last part of a batch is smaller; ranks may differ by one
            model(*arguments(size)).float().sum().backward()
            counts.append(len(graphs))
        assert counts[0] <= kinds and counts[1] <= 2 * kinds and counts[1:] == [counts[1]] * 3, counts
        model.eval()
        with torch.no_grad():
            for size in (6, 5):
                model(*arguments(size))
        assert len(graphs) <= 2 * counts[1] + kinds


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.out = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.out(x)
        return out


class Blocks(Regression):
    def __init__(self) -> None:
        super().__init__(plain=True)
        torch.manual_seed(0)
        self.model = Stack()  # type: ignore[assignment]


@needs_compiler
def test_a_life_that_goes_on_elsewhere_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch._dynamo.utils.counters

    def life(node: str, **settings: Any) -> dict[str, int]:
        torch._dynamo.reset()
        CacheArtifactManager.clear()
        counters.clear()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / node))  # the node's own
        Run(tmp_path / "run")(task=Blocks(), compile=True, **settings)
        return dict(counters["inductor"])

    assert life("first")["fxgraph_cache_miss"] > 0
    again = life("second", steps=20)
    assert again["fxgraph_cache_hit"] > 0 and not again.get("fxgraph_cache_miss")


def test_what_others_may_write_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Folder.open(tmp_path) as run:
        assert load_compiled(run, Rank()) == 0 and not caplog.records
        run.mkdir(FOLDER)
        place = tmp_path / FOLDER / f"{_name(Rank())}-0"
        place.write_bytes(b"no code")
        os.chmod(place, 0o666)
        assert load_compiled(run, Rank()) == 0
        os.chmod(place, 0o600)
        assert load_compiled(run, Rank()) == 0
    ours = [record.getMessage() for record in caplog.records if record.name == "pipeline"]
    assert "may be written by others" in ours[0] and "cannot be used" in ours[1]
