"""What all tests share: the SLURM cluster, and how tests are spread over processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from slurm_cluster import cluster
from slurm_cluster.cluster import Cluster

if TYPE_CHECKING:
    from transfer_double import Gpus


def pytest_itemcollected(item: pytest.Item) -> None:
    if "slurm_cluster" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.slurm)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2``: all files named ``*slurm*`` go to one process, so that they share a cluster; other tests anywhere.

    (A second cluster would do no harm. ``--dist loadgroup`` is for this, but xdist 3.8 has no effect on pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneClusterScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if "slurm" in nodeid.partition("::")[0] else nodeid

    return OneClusterScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """A real SLURM of four nodes. Where it cannot start, its tests are skipped, or fail if REQUIRE_SLURM=1."""
    reason = cluster.why_not()
    if reason and os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    running = cluster.start()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """A pretended GPU whose copies take their time, see transfer_double."""
    from transfer_double import pretended  # imports torch

    with pretended(monkeypatch) as made:
        yield made
        made.check()
