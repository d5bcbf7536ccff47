# ruff: noqa: N803 - names as mamba_ssm has them
"""mamba_ssm's kernels are used where they work, give what plain torch gives, and are one operation to torch.compile."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import ConfigError
from pipeline.models import scan_kernels
from pipeline.models.scan_kernels import backend_of, kernel
from pipeline.models.ssm import MIXERS, Bidirectional, Mamba1, Mamba2, Mixer, selective_scan, ssd

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretends that these modules are installed, with these attributes; an exception instead: importing raises it."""

    def installed(modules: dict[str, dict[str, Any] | Exception]) -> None:
        class Finder:
            @staticmethod
            def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
                found = modules.get(name)
                if isinstance(found, Exception):
                    raise found
                return None

        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        for name, attributes in modules.items():
            if not isinstance(attributes, Exception):
                module = types.ModuleType(name)
                module.__dict__.update(attributes)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name, module)
        scan_kernels.kernel.cache_clear()
        scan_kernels._report.cache_clear()

    yield installed
    scan_kernels.kernel.cache_clear()
    scan_kernels._report.cache_clear()


def combined(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor) -> Tensor:
    """As release 2.3 has it: states have the type of C."""
    return ssd(x, dt, A, B[:, :, 0], C[:, :, 0], D, chunk_size)


def selective(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    x, dt, b, c = (t.transpose(1, 2) for t in (u, delta, B, C))
    return selective_scan(x, dt, A, b, c, D).transpose(1, 2)


EXTENSION = ModuleNotFoundError("No module named 'selective_scan_cuda'", name="selective_scan_cuda")
TRITON: dict[str, Any] = {"mamba_ssm": {}, "mamba_ssm.ops": {}, "mamba_ssm.ops.triton": {}}
INTERFACE = {"mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective}}
COMBINED = {"mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": combined}}
EVERYTHING = {**TRITON, **INTERFACE, **COMBINED, "selective_scan_cuda": {}}


@pytest.mark.parametrize(
    ("modules", "mamba1", "mamba2"),
    [
        (
            {"mamba_ssm": ModuleNotFoundError("No module named 'mamba_ssm'"), "selective_scan_cuda": EXTENSION},
            "No m",
            "No m",
        ),
        (EVERYTHING, "", ""),
        # built without CUDA, release 2.3: the package itself wants the extension
        ({"mamba_ssm": EXTENSION, "selective_scan_cuda": EXTENSION}, "selective_scan_cuda", "selective_scan_cuda"),
        # later: pure Python by default, the extension on request
        ({**TRITON, **INTERFACE, **COMBINED, "selective_scan_cuda": EXTENSION}, "selective_scan_cuda", ""),
        # built for another torch
        ({**EVERYTHING, "selective_scan_cuda": ImportError("undefined symbol: _ZN3c10\nmore")}, "undefined symbol", ""),
        ({**EVERYTHING, "mamba_ssm.ops.triton.ssd_combined": RuntimeError("no triton")}, "", "no triton"),
    ],
)
def test_each_mixer_is_asked_about_its_own_kernel(
    modules: dict[str, Any], mamba1: str, mamba2: str, install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    install(modules)
    caplog.set_level(logging.INFO, "pipeline")
    for mixer, reason in (("mamba1", mamba1), ("mamba2", mamba2)):
        assert reason in kernel(mixer).reason and bool(kernel(mixer).reason) == bool(reason)
        assert backend_of("auto", CPU, mixer) == backend_of("torch", GPU, mixer) == "torch"
        caplog.clear()
        for _ in range(2):
            assert backend_of("auto", GPU, mixer) == ("torch" if reason else "mamba_ssm")
        (record,) = caplog.records
        assert record.levelno == (logging.WARNING if reason else logging.INFO) and mixer in record.getMessage()
        with pytest.raises(
            ConfigError, match=f"scan_backend=mamba_ssm: its kernels for {mixer} cannot be used: they ne"
        ):
            backend_of("mamba_ssm", CPU, mixer)
        if reason:
            with pytest.raises(ConfigError, match=f"for {mixer} cannot be used: .*{reason}"):
                backend_of("mamba_ssm", GPU, mixer)


def test_deterministic_training_does_without_them(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(EVERYTHING)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert backend_of("auto", GPU, "mamba2") == "torch"
    with pytest.raises(ConfigError, match="deterministic=true"):
        backend_of("mamba_ssm", GPU, "mamba2")


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_float32(chosen: bool, dtype: torch.dtype, install: Callable[..., None]) -> None:
    seen: list[Any] = []

    def old(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor) -> Tensor:
        seen.append((x.dtype, C.dtype))
        return x

    def new(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor,
        state_dtype: Any = None,
    ) -> Tensor:
        seen.append((x.dtype, state_dtype))
        return x

    function = new if chosen else old
    install({**EVERYTHING, "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": function}})
    x, dt, b = torch.ones(1, 5, 2, 4, dtype=dtype), torch.ones(1, 5, 2), torch.ones(1, 5, 3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert scan_kernels.scan("mamba2", x, dt, -torch.ones(2), b, b, torch.ones(2)).dtype == dtype
    assert seen == [(dtype if chosen else torch.float32, torch.float32)]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("kernels", [False, True])
def test_a_mixer_is_one_graph_and_batches_of_other_sizes_make_no_more_than_one(
    mixer: str, kernels: bool, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(EVERYTHING)
    monkeypatch.setattr(Mixer, "uses_kernel", lambda self, x: kernels)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Bidirectional(mixer, 32, d_state=8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for size in (2, 3, 5, 4):
        tokens = torch.randn(size, 6, 32)
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2
    assert any("latentmill" in str(node.target) for node in graphs[0].graph.nodes) == kernels


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_through_the_compiled_operation_are_those_of_the_scan(
    mixer: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(EVERYTHING)
    model = Bidirectional(mixer, 32, d_state=8)
    tokens = torch.randn(2, 20, 32)

    def gradients(network: Any) -> Any:
        return torch.autograd.grad(network(tokens).square().sum(), list(model.parameters()))

    plain = gradients(model)
    monkeypatch.setattr(Mixer, "uses_kernel", lambda self, x: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, theirs in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- mamba-ssm's own source, in Triton's interpreter

RELEASE = "2.3.2.post1"
SHA256 = "104cc47e9101e5401a675fa2b784f2952b9b037f3b1dd83b5ac544394e95d028"


def mamba_source() -> Path:
    """Folder with the package of mamba-ssm's source distribution, from PyPI once and then from the cache.

    Raises:
        OSError: it cannot be fetched.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "latentmill-tests"
    place = cache / f"mamba_ssm-{RELEASE}"
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _fetch(cache, place)
    return place


def _fetch(cache: Path, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"mamba-ssm=={RELEASE} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        command += ["--no-build-isolation", "--quiet", "-d", folder, "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        archive = Path(folder) / f"mamba_ssm-{RELEASE}.tar.gz"
        if done.returncode or not archive.is_file():
            raise OSError(f"mamba-ssm=={RELEASE} cannot be fetched from PyPI: {done.stderr.strip()[-500:]}")
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        with contextlib.suppress(OSError):  # another process was first
            (Path(folder) / f"mamba_ssm-{RELEASE}").rename(place)


PARITY = """
import contextlib, sys, types
import torch, triton
torch.set_num_threads(1)
tune = triton.autotune
def cost(config):
    product = 1
    for value in config.kwargs.values():
        product *= value if isinstance(value, int) else 1
    return product
triton.autotune = lambda configs, key, **more: tune(configs=[min(configs, key=cost)], key=key)
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)
for name, path in (("mamba_ssm", "mamba_ssm"), ("mamba_ssm.ops", "mamba_ssm/ops")):  # without its __init__
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{sys.argv[1]}/{path}"]
from pipeline.models.scan_kernels import kernel, scan
from pipeline.models.ssm import ssd
assert not kernel("mamba2").reason, kernel("mamba2").reason
for dtype, length, tolerance in ((torch.float32, 100, 1e-5), (torch.float32, 64, 1e-5), (torch.float16, 70, 3e-3)):
    torch.manual_seed(length)
    n, h, p, s = 1, 2, 16, 16
    x, b, c = (torch.randn(n, length, *shape).to(dtype).requires_grad_() for shape in ((h, p), (s,), (s,)))
    dt = (torch.rand(n, length, h) * 0.1).requires_grad_()
    a, d = (-torch.rand(h) * 4 - 0.5).requires_grad_(), torch.ones(h, requires_grad=True)
    results = []
    for function in (lambda *tensors: scan("mamba2", *tensors), ssd):
        y = function(x, dt, a, b, c, d)
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, dt, a, b, c, d])])
    for name, ours, theirs in zip(("y", "x", "dt", "a", "b", "c", "d"), *results):
        error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        print(f"{dtype} {length} {name} {error:.1e}")
        assert error <= tolerance, (dtype, length, name, error)
"""


def test_mamba_ssms_own_kernel_gives_what_torch_gives() -> None:
    """Forward and backward, in Triton's interpreter, which knows float32 and float16; one length is no multiple of the
    chunk. Without Triton or the network the test is skipped, or fails with REQUIRE_NETWORK=1."""
    try:
        importlib.import_module("triton")
        source = mamba_source()
    except (ImportError, OSError, subprocess.TimeoutExpired) as error:
        if os.environ.get("REQUIRE_NETWORK") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PARITY, str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("torch.float16") == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_give_what_torch_gives(kind: str, compiled: bool) -> None:
    if not importlib.util.find_spec("mamba_ssm"):
        pytest.skip("mamba_ssm is not installed")
    model = (Mamba1 if kind == "mamba1" else Mamba2)(64, d_state=16).cuda()
    tokens = torch.randn(2, 196, 64, device="cuda")
    results = []
    for backend in ("torch", "mamba_ssm"):
        model.backend = backend_of(backend, GPU, kind)
        network = torch.compile(model) if compiled and backend == "mamba_ssm" else model
        out = network(tokens)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
