"""The stand-in for a GPU refuses what a GPU refuses, and names what waits for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_cuda import FakeCuda, fake_cuda
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda(2) as cuda:
        yield cuda


def test_tensors_say_where_they_are_and_have_the_values_of_a_cpu(cuda: FakeCuda) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    made = (x, x.new_zeros(3), torch.ones_like(x), x.t() @ x, x[0], torch.tensor([1.0], device=GPU), x.double())
    assert all(tensor.device == GPU and tensor.is_cuda for tensor in made)
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    on_host = x.cpu()
    assert on_host.device.type == "cpu" and type(on_host) is torch.Tensor
    assert torch.equal(on_host, torch.arange(6.0).view(2, 3))
    assert x.to("cuda:1").device == torch.device("cuda", 1)


def test_what_one_thread_assumes_is_nothing_to_another(cuda: FakeCuda) -> None:
    cuda.assumed = 1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.ones, 3).result().device.type == "cpu"
    assert torch.ones(3).device == torch.device("cuda", 1)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.stack([x, x.to("cuda:1")]),
        lambda x: nn.Linear(3, 3)(x),
        lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, x),
    ],
)
def test_tensors_of_two_devices_do_not_meet(cuda: FakeCuda, mixed: Any) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device.*test_fake_cuda.py:"):
        mixed(torch.ones(3, device=GPU))
    assert float(torch.ones(3, device=GPU).sum() + torch.tensor(1.0)) == 4  # numbers may


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.zeros(3).copy_(x, non_blocking=True),
        lambda x: x[torch.tensor([0])],
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64, device=x.device)),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_makes_the_host_wait_is_named(cuda: FakeCuda, waits: Any) -> None:
    x = torch.ones(3, device=GPU)
    message = r"the host waits for the device:\n  .*test_fake_cuda.py:\d+: "
    with pytest.raises(AssertionError, match=message), cuda.no_waits():
        waits(x)


def test_what_does_not_wait_is_not_named(cuda: FakeCuda) -> None:
    x = torch.ones(3, device=GPU)
    pinned = torch.ones(3).pin_memory()
    with cuda.no_waits():
        y = pinned.to(GPU, non_blocking=True) + x
        torch.empty(3, pin_memory=False)
        x[x > 1] = 0.0
        y.to("cpu", non_blocking=True)
        torch.empty(3).pin_memory().copy_(y, non_blocking=True)
        torch.arange(3, device=GPU)[:, None].expand(3, 2).gather(1, torch.zeros(3, 1, dtype=torch.int64, device=GPU))


def test_a_copy_to_the_host_arrives_when_it_is_waited_for(cuda: FakeCuda) -> None:
    x = torch.ones(3, device=GPU)
    first = x.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    second = x.to("cpu", non_blocking=True)
    assert not torch.equal(first, torch.ones(3))
    event.synchronize()
    assert torch.equal(first, torch.ones(3)) and not torch.equal(second, torch.ones(3))
    torch.cuda.synchronize()
    assert torch.equal(second, torch.ones(3))


def test_gradients_optimizers_and_autocast_work(cuda: FakeCuda) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    twin = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    twin.load_state_dict(model.state_dict())
    model.to(GPU)
    x = torch.randn(5, 4)
    for network, batch in ((model, x.to(GPU)), (twin, x)):
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        network(batch).square().sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert isinstance(ours, nn.Parameter) and ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs)
    with torch.autocast("cuda", torch.bfloat16):
        assert model(x.to(GPU)).dtype == torch.bfloat16


def test_ddp_and_fsdp_work(cuda: FakeCuda) -> None:
    dist.init_process_group("cpu:gloo,cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(5, 4, device=GPU)
        model = nn.Linear(4, 2).to(GPU)
        wrapped = DistributedDataParallel(model, device_ids=[GPU], forward_sync_buffers=False)
        for _ in range(2):  # buckets are made again in the second step, for which ranks compare notes
            wrapped(x).sum().backward()
        with cuda.no_waits():
            wrapped(x).sum().backward()
        assert model.weight.grad is not None and model.weight.grad.is_cuda
        sharded = nn.Linear(4, 2).to(GPU)
        fully_shard(
            sharded,
            mesh=init_device_mesh("cuda", (1,)),
            mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
        )
        with cuda.no_waits():
            out = sharded(x)
            out.float().sum().backward()
        assert out.dtype == torch.bfloat16 and sharded.weight.grad.to_local().is_cuda  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()


def test_a_wait_in_the_pipeline_is_named_by_its_line(cuda: FakeCuda) -> None:
    from pipeline.encoders.base import to_pixels

    to_pixels(torch.zeros(1, 3, 2, 2, device=GPU))
    assert any(re.fullmatch(r"pipeline/encoders/base.py:\d+", wait.where) for wait in cuda.waits)
