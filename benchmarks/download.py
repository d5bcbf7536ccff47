"""From a list of URLs to resized images in tars: this pipeline against img2dataset, with a server on this machine.

    python benchmarks/download.py [images=20000] [processes=2] [peer=<python with img2dataset>] [rounds=1]
        [photos=<folder> megapixels=1|4|12]

img2dataset needs its own virtual environment, as it pins other versions of many packages:
    python -m venv /tmp/peer && /tmp/peer/bin/pip install img2dataset==1.47.0
    python benchmarks/download.py peer=/tmp/peer/bin/python

Both resize 200 different JPEGs of 640x480 (quality 90), each with many URLs, to a shorter edge of 256, quality 95; with
`photos`, photos of that size, as in benchmarks/images.py, to a shorter edge of 512. The server runs on the same cores,
and ours decodes in the ranks themselves (workers=0), as img2dataset does. Ratios are of one run; memory is the peak of
the sum over all processes of one side.
"""

from __future__ import annotations

import asyncio
import csv
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1]))

from _photos import EDGE, SIZES, photos

KINDS = 200


def image(seed: int) -> bytes:
    """Soft colours with some grain, as in photos; about 60 kB."""
    rng = np.random.default_rng(seed)
    large = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (480, 640, 3))
    pixels = np.clip(np.asarray(large.filter(ImageFilter.GaussianBlur(1))) + grain, 0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def serve(ready: socket.socket, images: list[bytes]) -> None:
    """Answer GET /<number>.jpg, keeping connections open."""
    replies = []
    for data in images:
        replies.append(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            self.buffer = b""

        def data_received(self, data: bytes) -> None:
            self.buffer += data
            while b"\r\n\r\n" in self.buffer:
                head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
                number = int(head.split(b" ", 2)[1].strip(b"/").partition(b".")[0])
                self.transport.write(replies[number % len(replies)])  # type: ignore[attr-defined]
                if b"connection: close" in head.lower():
                    self.transport.close()

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=4096)
        ready.sendall(str(server.sockets[0].getsockname()[1]).encode())
        await server.serve_forever()

    asyncio.run(run())


def measured(command: list[str], folder: Path) -> tuple[float, int]:
    """Seconds that a command takes, and the peak memory of it and its children in bytes."""
    peak = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    begin = time.perf_counter()
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        process = psutil.Process(running.pid)
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.5):
                total = 0
                for one in [process, *_children(process)]:
                    try:
                        total += one.memory_info().rss
                    except psutil.Error:
                        continue
                peak = max(peak, total)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = running.wait()
        seconds = time.perf_counter() - begin
        ended.set()
        watcher.join()
    if code:
        raise SystemExit((folder / "log").read_text()[-3000:])
    return seconds, peak


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def ours(listed: Path, folder: Path, processes: int, edge: int) -> tuple[float, int, int]:
    command = [sys.executable, "launch/submit.py", "stage=filter", "fuse=true", "source=url_list", f"input={listed}"]
    command += [
        f"output={folder / 'out'}",
        f"ranks={processes}",
        "workers=0",
        "min_image_size=0",
        f"max_image_size={edge}",
    ]
    command += ["allow_private_hosts=true", "per_host=64", "connections=64", "partition_size=1000"]
    seconds, peak = measured(command, folder)
    return seconds, peak, int(json.loads((folder / "out/manifest.json").read_text())["counts"]["kept"])


def theirs(python: str, listed: Path, folder: Path, processes: int, edge: int) -> tuple[float, int, int]:
    command = [str(Path(python).with_name("img2dataset")), f"--url_list={listed}", "--input_format=csv"]
    command += [f"--output_folder={folder / 'out'}", "--output_format=webdataset", "--caption_col=caption"]
    command += [
        f"--processes_count={processes}",
        "--thread_count=64",
        f"--image_size={edge}",
        "--resize_mode=keep_ratio",
    ]
    command += ["--resize_only_if_bigger=True", "--encode_quality=95", "--number_sample_per_shard=1000"]
    command += ["--enable_wandb=False"]
    seconds, peak = measured(command, folder)
    return seconds, peak, sum(json.loads(p.read_text())["successes"] for p in (folder / "out").glob("*_stats.json"))


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    images, processes = int(settings.get("images", 20_000)), int(settings.get("processes", 2))
    here, there = socket.socketpair()
    edge, kinds = 256, [image(seed) for seed in range(KINDS)]
    if "photos" in settings:
        edge = EDGE
        kinds = list(photos(settings["photos"], SIZES[f"{settings.get('megapixels', '4')} MP"], 12))
    server = multiprocessing.Process(target=serve, args=(there, kinds), daemon=True)
    server.start()
    port = int(here.recv(16))
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        listed = root / "list.csv"
        with listed.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["url", "caption"])
            writer.writerows([f"http://127.0.0.1:{port}/{n}.jpg", f"image {n}"] for n in range(images))
        for _ in range(int(settings.get("rounds", 1))):
            rates = {}
            for name in ("latentmill", "img2dataset"):
                if name == "img2dataset" and "peer" not in settings:
                    print("img2dataset: give peer=<python of its virtual environment>")
                    continue
                folder = root / name
                folder.mkdir()
                run = (
                    ours(listed, folder, processes, edge)
                    if name == "latentmill"
                    else theirs(settings["peer"], listed, folder, processes, edge)
                )
                rates[name] = images / run[0]
                print(
                    f"{name:<12} {rates[name]:7.0f} images/s   {run[0]:6.1f} s   {run[1] / 2**20:6.0f} MiB   "
                    f"{100 * run[2] / images:.2f} % kept",
                    flush=True,
                )
                shutil.rmtree(folder)
            if len(rates) == 2:
                print(f"ratio: {rates['latentmill'] / rates['img2dataset']:.2f}")
    server.terminate()


if __name__ == "__main__":
    main()
