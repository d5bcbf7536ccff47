"""Object stores: bytes sent and received by one process, against other clients; then latents read for training.

    python benchmarks/stores.py [delay=0.02] [megabytes=256] [small=500] [samples=1500] [shard_megabytes=[2,16]]
        [rounds=2]

The store is moto's S3 server on loopback, in its own process, behind a proxy in another that waits ``delay`` seconds
before it forwards a request. s3fs is measured if it is installed. The store limits all of them.

Latents are as in latents.py: text states (77, 1024) and latents (4, 32, 32), float16. An epoch starts with an empty
cache, and is timed from the creation of the loader to its last batch, each time in a new process. StreamingDataset uses
a DataLoader with no or two workers, of which the faster counts. The limit is the time in which the library alone
downloads all shards, eight at a time. ``samples=0`` skips this part, ``megabytes=0`` the one large object, and
``small=0`` the many small ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from object_stores import BUCKET, Proxy, s3_environment, s3_server  # noqa: E402

from pipeline.stores import Object, Store  # noqa: E402

SHARD = 8 << 20
SMALL = 64 << 10
AT_ONCE = 8


def serve(told: Any, behind: int, delay: float) -> None:
    """Run the store or, given its port, the proxy in front of it, until the process is ended."""
    if behind:
        with Proxy(behind) as proxy:
            proxy.delay = delay
            told.send(proxy.port)
            told.recv()
    else:
        with s3_server() as port:
            told.send(port)
            told.recv()


def started(behind: int, delay: float) -> tuple[int, Any]:
    """The port of a server in its own process, and a connection that ends it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, behind, delay), daemon=True).start()
    return int(ours.recv()), ours


def timed(do: Callable[[], Any]) -> float:
    start = perf_counter()
    do()
    return perf_counter() - start


def clients(place: str, folder: Path, size: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each client, functions that send the file ``folder / "data"`` and receive it again."""
    import boto3
    import obstore

    source, target = folder / "data", folder / "back"
    store = Store(place)
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    made = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def pieces() -> Any:
        with source.open("rb") as file:
            while piece := file.read(4 << 20):
                yield piece

    def parallel_gets() -> None:
        raw, path = store._raw, f"{prefix}/bare"
        starts = range(0, size, SHARD)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda at: obstore.get_range(raw, path, start=at, end=min(at + SHARD, size)), starts))

    def one_get() -> None:
        with target.open("wb") as file:
            for piece in obstore.get(store._raw, f"{prefix}/one").stream():
                file.write(piece)

    def received() -> None:
        target.touch()
        store.download(Object("ours", size, store.head("ours").etag), target)

    found: dict[str, dict[str, Callable[[], Any]]] = {
        "obstore, bare": {
            "send": lambda: obstore.put(store._raw, f"{prefix}/bare", source, chunk_size=SHARD),
            "receive": parallel_gets,
        },
        "obstore, one read": {
            "send": lambda: obstore.put(store._raw, f"{prefix}/one", source, chunk_size=SHARD),
            "receive": one_get,
        },
        "pipeline.stores": {"send": lambda: store.upload("ours", pieces, size, ""), "receive": received},
        "boto3": {
            "send": lambda: made.upload_file(str(source), bucket, f"{prefix}/boto"),
            "receive": lambda: made.download_file(bucket, f"{prefix}/boto", str(target)),
        },
    }
    try:
        import s3fs
    except ImportError:
        return found
    files = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    found["s3fs"] = {
        "send": lambda: files.put_file(str(source), f"{bucket}/{prefix}/s3fs"),
        "receive": lambda: files.get_file(f"{bucket}/{prefix}/s3fs", str(target)),
    }
    return found


def objects(work: Path, megabytes: int, delay: float, rounds: int) -> None:
    """Send and receive one object."""
    size = megabytes << 20
    (work / "data").write_bytes(os.urandom(size))
    print(f"one object of {megabytes} MiB, {delay * 1e3:.0f} ms a request; MB/s, and as a share of the bare client's")
    bare: dict[str, float] = {}
    for name, calls in clients(f"s3://{BUCKET}/{uuid.uuid4().hex}", work, size).items():
        rates = {what: size / 1e6 / min(timed(do) for _ in range(rounds)) for what, do in calls.items()}
        bare = bare or rates
        shown = "  ".join(f"{what} {rate:6.0f} ({rate / bare[what]:.2f})" for what, rate in rates.items())
        print(f"  {name:<18} {shown}", flush=True)


def small_objects(count: int, delay: float, rounds: int) -> None:
    """Many objects, each read whole."""
    import boto3
    import obstore

    place = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    store, names = Store(place), [f"{number:06}" for number in range(count)]
    for name in names:
        store.put(name, os.urandom(SMALL))
    paths = [f"{prefix}/{name}" for name in names]
    made = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def each(read: Callable[[str], Any], of: list[str]) -> Callable[[], Any]:
        def do() -> None:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                assert sum(len(data) for data in pool.map(read, of)) == count * SMALL

        return do

    reads = {
        "obstore, bare": each(lambda path: obstore.get(store._raw, path).bytes(), paths),
        "pipeline.stores": each(store.read, names),
        "boto3": each(lambda path: made.get_object(Bucket=bucket, Key=path)["Body"].read(), paths),
    }
    with suppress(ImportError):
        import s3fs

        files = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        reads["s3fs"] = lambda: files.cat([f"{bucket}/{path}" for path in paths], batch_size=AT_ONCE)
    print(f"{count} objects of {SMALL >> 10} KiB, {AT_ONCE} at a time; reads/s, and as a share of the bare client's")
    bare = 0.0
    for name, do in reads.items():
        rate = count / min(timed(do) for _ in range(rounds))
        bare = bare or rate
        print(f"  {name:<18} {rate:6.0f} ({rate / bare:.2f})", flush=True)


# ---- latents for training


def write_latents(folder: Path, samples: int, shard_bytes: int) -> None:
    """Write latents as micro_diffusion does."""
    import numpy as np
    from streaming import MDSWriter

    random = np.random.default_rng(0)
    columns = {"key": "str", "caption": "str", "caption_latents": "bytes", "latents_256": "bytes"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=shard_bytes) as writer:
        for number in range(samples):
            row = {"caption_latents": random.bytes(2 * 77 * 1024), "latents_256": random.bytes(2 * 4 * 32 * 32)}
            writer.write({"key": f"{number:08}", "caption": "a caption", **row})


def bare_epoch(place: str, cache: str, workers: int) -> float:
    """Seconds in which the library downloads all shards, eight at a time, and discards them."""
    import obstore

    store = Store(place)
    _, prefix = place.removeprefix("s3://").split("/", 1)
    names = [found.path for found in store.objects() if found.path.endswith(".mds")]

    def get(name: str) -> int:
        return len(obstore.get(store._raw, f"{prefix}/{name}").bytes())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return timed(lambda: list(pool.map(get, names)))


def our_epoch(place: str, cache: str, workers: int) -> float:
    from pipeline.loading.latents import build_streaming_latents_dataloader

    start = perf_counter()
    for _ in build_streaming_latents_dataloader(place, 32, 256, cache=cache, drop_last=False):
        pass
    return perf_counter() - start


def their_epoch(place: str, cache: str, workers: int) -> float:
    from latents import Theirs
    from torch.utils.data import DataLoader

    start = perf_counter()
    data = Theirs(remote=place, local=cache, shuffle=True, batch_size=32)
    for _ in DataLoader(data, 32, num_workers=workers):
        pass
    return perf_counter() - start


def fresh(epoch: Callable[[str, str, int], float], place: str, work: Path, workers: int = 0) -> float:
    """Seconds of an epoch in its own process, with an empty cache."""
    cache = work / uuid.uuid4().hex
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        seconds = process.submit(epoch, place, str(cache), workers).result()
    shutil.rmtree(cache, ignore_errors=True)
    return seconds


def latents(work: Path, samples: int, shard_megabytes: list[float], rounds: int, delay: float) -> None:
    for megabytes in shard_megabytes:
        folder = work / f"latents-{megabytes}"
        write_latents(folder, samples, int(megabytes * (1 << 20)))
        place = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        shards = sorted(folder.glob("*.mds"))
        for path in (*shards, folder / "index.json"):
            Store(place).put(path.name, path.read_bytes())
        size = sum(path.stat().st_size for path in shards)
        best = {"limit": 1e9, "ours": 1e9, **{f"StreamingDataset, {workers} workers": 1e9 for workers in (0, 2)}}
        for _ in range(rounds):
            best["limit"] = min(best["limit"], fresh(bare_epoch, place, work))
            best["ours"] = min(best["ours"], fresh(our_epoch, place, work))
            for workers in (0, 2):
                name = f"StreamingDataset, {workers} workers"
                best[name] = min(best[name], fresh(their_epoch, place, work, workers))
        theirs = min(seconds for name, seconds in best.items() if name.startswith("Streaming"))
        print(
            f"an epoch of {samples} latents in {len(shards)} shards of {megabytes} MiB, {delay * 1e3:.0f} ms a request:"
            f" ours {theirs / best['ours']:.1f} times as fast, {best['limit'] / best['ours']:.2f} of the limit"
        )
        for name, seconds in best.items():
            print(f"  {name:<28} {seconds:6.2f} s  {size / 1e6 / seconds:6.0f} MB/s", flush=True)


def main(
    delay: float = 0.02,
    megabytes: int = 256,
    small: int = 500,
    samples: int = 1500,
    shard_megabytes: Sequence[float] = (2, 16),
    rounds: int = 2,
) -> None:
    work = Path(tempfile.mkdtemp(prefix="latentmill-bench-"))
    behind, store_ends = started(0, 0.0)
    port, proxy_ends = started(behind, delay)
    os.environ.update({**s3_environment(port), "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    try:
        if megabytes:
            objects(work, megabytes, delay, rounds)
        if small:
            small_objects(small, delay, rounds)
        if samples:
            latents(work, samples, list(shard_megabytes), rounds, delay)
    finally:
        for ends in (proxy_ends, store_ends):
            ends.send("end")
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(**{name: json.loads(value) for name, value in given.items()})
