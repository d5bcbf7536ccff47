"""What all tests share: the SLURM cluster, and how tests are spread over processes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from slurm_cluster import cluster
from slurm_cluster.cluster import Cluster

if TYPE_CHECKING:
    from fake_hub import FakeHub
    from object_stores import Proxy
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


@pytest.fixture(autouse=True)
def _idle_nodes(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test on the cluster finds all nodes idle, whatever the one before it left, and leaves no job behind.

    Modules with a fixture ``late`` have a job that runs while their tests do.
    """
    if "slurm_cluster" not in request.fixturenames or "late" in request.fixturenames:
        yield
        return
    cluster = request.getfixturevalue("slurm_cluster")
    cluster.await_idle()
    yield
    cluster.run("scancel", "--me", "--quiet", check=False)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """A pretended GPU whose copies take their time, see transfer_double."""
    from transfer_double import pretended  # imports torch

    with pretended(monkeypatch) as made:
        yield made
        made.check()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """moto's S3 server on loopback, one for all tests of a process: each uses a prefix of its own."""
    from object_stores import s3_server

    with s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy before the S3 server, which the environment leads to; copies of objects go to ``tmp_path/cache``."""
    from object_stores import Proxy, s3_environment

    from pipeline.stores.bucket_client import forget_clients

    with Proxy(s3_port) as proxy:
        for name, value in s3_environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LATENTMILL_CACHE", str(tmp_path / "cache"))
        forget_clients()
        yield proxy
    forget_clients()


@pytest.fixture(scope="session")
def gcs_port() -> Iterator[int]:
    from fake_gcs import gcs_server
    from object_stores import BUCKET

    with gcs_server(BUCKET) as port:
        yield port


@pytest.fixture(scope="session")
def azure_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Azurite on loopback. Where it is not installed, its tests are skipped, or fail if REQUIRE_AZURITE=1."""
    from object_stores import azure_server, azurite

    if not azurite():
        missing = "Azurite is not installed: make azurite"
        pytest.fail(missing) if os.environ.get("REQUIRE_AZURITE") == "1" else pytest.skip(missing)
    with azure_server(tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture(params=["s3", "gs", "az"])
def any_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A place in a bucket of each store, which the environment leads to."""
    import object_stores

    from pipeline.stores.bucket_client import forget_clients

    server = {"s3": "s3", "gs": "gcs", "az": "azure"}[request.param]
    port = request.getfixturevalue(f"{server}_port")
    for name, value in getattr(object_stores, f"{server}_environment")(port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LATENTMILL_CACHE", str(tmp_path / "cache"))
    forget_clients()
    yield f"{request.param}://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    forget_clients()


@pytest.fixture
def place(tmp_path: Path) -> str:
    """A place in the bucket that no other test uses."""
    from object_stores import BUCKET

    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub on loopback that the environment leads to, with a token that it takes."""
    from fake_hub import TOKEN, FakeHub

    from pipeline.stores.bucket_client import forget_clients

    with FakeHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)  # where it was imported before
        monkeypatch.setenv("LATENTMILL_CACHE", str(tmp_path / "cache"))
        forget_clients()
        yield running
    forget_clients()
