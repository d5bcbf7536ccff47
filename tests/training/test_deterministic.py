"""deterministic=true restricts torch to algorithms that give the same bits each time."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.schema import TrainConfig
from pipeline.distributed import Rank
from pipeline.registry import Registered, tasks
from pipeline.stages import train


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms_are_asked_for_before_anything_is_computed(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def learned(*_: object) -> None:
        raise Seen(asked, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    asked: list[bool] = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    task = SimpleNamespace(input=lambda config: None, from_config=learned)
    monkeypatch.setitem(tasks.added, "diffuse", Registered(task))
    with pytest.raises(Seen) as seen:
        train.main.__wrapped__(Rank(), TrainConfig(deterministic=deterministic))
    assert seen.value.args == (([True], ":4096:8") if deterministic else ([], None))
