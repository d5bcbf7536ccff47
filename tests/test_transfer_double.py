"""The double of transfers finds what goes wrong with copies in flight, and nothing else."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transfer_double import Gpus, OnDevice, TransferError, pretended


def caught(gpus: Gpus, match: str, act: Callable[[], object]) -> None:
    with pytest.raises(TransferError, match=match):
        act()
        gpus.check()
    assert gpus.errors
    gpus.errors.clear()


def uploaded(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    host = torch.arange(float(size)).pin_memory()
    return host, host.to("cuda", non_blocking=True)


def test_values_are_real_and_bytes_arrive_only_when_their_event_is_waited_for(gpus: Gpus) -> None:
    _, there = uploaded()
    host = torch.empty(4, pin_memory=True).copy_(there * 2, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert np.isnan(host.numpy()).all()  # numpy sees what lies in the memory
    done.synchronize()
    assert host.tolist() == [0, 2, 4, 6] and isinstance(there, OnDevice) and str(there.device) == "cuda:0"
    assert [wait.what for wait in gpus.waits] == ["Event.synchronize()"]


def test_reading_what_is_on_its_way_fails_and_names_the_line(gpus: Gpus) -> None:
    _, there = uploaded()
    host = torch.empty(4, pin_memory=True).copy_(there, non_blocking=True)
    caught(gpus, r"test_transfer_double.py:\d+: aten.stack.* still on their way", lambda: torch.stack([host]))


def test_an_event_recorded_before_the_copy_says_nothing_of_it(gpus: Gpus) -> None:
    _, there = uploaded()
    early = torch.cuda.Event()
    early.record()
    host = torch.empty(4, pin_memory=True).copy_(there, non_blocking=True)
    early.synchronize()
    caught(gpus, "still on their way", lambda: host + 1)


def test_host_memory_that_is_reused_too_early_is_found(gpus: Gpus) -> None:
    host, _ = uploaded()
    host.numpy()[:] = 7
    caught(gpus, "overwritten while it was being copied", lambda: None)


def test_a_stream_must_wait_for_what_another_one_copies(gpus: Gpus) -> None:
    copies = torch.cuda.Stream()
    with torch.cuda.stream(copies):
        _, there = uploaded()
        event = torch.cuda.Event()
        event.record()
    caught(gpus, "wait_event", lambda: there + 1)
    torch.cuda.current_stream().wait_event(event)
    assert float((there + 1).sum()) == 10
    there.record_stream(torch.cuda.current_stream())


def test_memory_that_another_stream_uses_must_be_recorded_there(gpus: Gpus) -> None:
    copies = torch.cuda.Stream()
    with torch.cuda.stream(copies):
        there = uploaded()[1]
    torch.cuda.current_stream().wait_stream(copies)
    there + 1

    def free() -> None:
        nonlocal there
        del there

    caught(gpus, "record_stream", free)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda there: there.cpu(), "copy to the host"),
        (lambda there: there.sum().item(), "item()"),
        (lambda there: there[there > 1], "index with a mask"),
        (lambda there: there[torch.tensor([0])], "index with places on the host"),
        (lambda there: there.nonzero(), "nonzero()"),
        (lambda there: torch.ones(3).to("cuda", non_blocking=True), "copy from memory that is not pinned"),
        (lambda there: torch.ones(3).pin_memory().to("cuda"), "copy from the host"),
        (lambda there: torch.cuda.synchronize(), "torch.cuda.synchronize()"),
        (lambda there: torch.cuda.current_stream().synchronize(), "Stream.synchronize()"),
    ],
)
def test_what_makes_the_host_wait_is_named(gpus: Gpus, act: Callable[[torch.Tensor], object], said: str) -> None:
    _, there = uploaded()
    message = rf"the host waits for the device:\n  tests/test_transfer_double.py:\d+: {re.escape(said)}"
    with pytest.raises(AssertionError, match=message), gpus.no_waits():
        act(there)


def test_who_waits_for_copies_of_their_own_stream_does_not_wait_for_what_is_computed(gpus: Gpus) -> None:
    uploaded()[1] * 2
    with torch.cuda.stream(torch.cuda.Stream()), gpus.no_waits():
        host, _ = uploaded()
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        host.fill_(7)  # may be used again


def test_a_mix_of_devices_fails(gpus: Gpus) -> None:
    _, there = uploaded()
    caught(gpus, "CPU and on a GPU", lambda: there + torch.ones(4))


def test_registered_memory_is_pinned_until_it_is_unregistered(gpus: Gpus) -> None:
    memory = np.zeros(64, np.uint8)
    register = torch.cuda.cudart().cudaHostRegister
    assert register(memory.ctypes.data, 64, 0) == 0 and register(memory.ctypes.data, 64, 0) == 712  # registered already
    assert torch.from_numpy(memory)[8:].is_pinned()
    assert torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data) == 0 and not torch.from_numpy(memory).is_pinned()


def test_each_thread_begins_at_device_0_and_computes_on_the_pretended_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch, 8) as gpus:
        torch.cuda.set_device(3)
        found: list[torch.device] = []
        thread = threading.Thread(target=lambda: found.append(torch.empty(1, device="cuda").device))
        thread.start()
        thread.join()
        assert [found[0].index, torch.empty(1, device="cuda").device.index] == [0, 3] and gpus.contexts == {0, 3}
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.set_device(8)


def test_a_module_moves_there(gpus: Gpus) -> None:
    network = torch.nn.Conv2d(3, 2, 3).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    with torch.inference_mode():
        assert network(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16, device="cuda")).shape == (1, 2, 6, 6)
