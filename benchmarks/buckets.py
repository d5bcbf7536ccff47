"""Aspect-ratio buckets: what they cost, how fast they load, and what a model learns from them.

    python benchmarks/buckets.py [parts=plan,precompute,loader] [images=600] [rounds=3] [samples=100000000]
    python benchmarks/buckets.py parts=proof [scenes=4000] [steps=6600] [data_dir=...]

- plan: a simulated index of ``samples`` samples (10,000 per partition, 11 buckets): memory, and the time to open it, to
  plan steps, and to look up the samples of a step.
- precompute: aspect=buckets on JPEGs of four shapes against aspect=square on square JPEGs, with encoders of almost no
  cost, so that the cost of the buckets themselves shows. Rates are in pixels of crops; the ratio of pixels in files and
  crops is the same for all shapes, so that equal rates mean equal work. Wall-clock time, and CPU seconds of all
  processes, which are more meaningful on a busy machine.
- loader: batches of buckets against StreamingDataset with two worker processes, which yields single samples in any
  order and leaves it to the user to form batches of one shape.
- proof: a model trained on scenes of 2:3, 1:1 and 3:2 in buckets, and one on square crops of the same scenes: for how
  many of 32 prompts each generates a correct image at all three shapes, as `pipeline/metrics/scene_accuracy.py` judges.
  With ``data_dir=``, existing results are reused, and interrupted training resumes.
"""

from __future__ import annotations

import gc
import resource
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import simplejpeg
import torch
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.cli import build
from pipeline.config.schema import STAGES
from pipeline.distributed import Rank
from pipeline.imaging.buckets import Buckets
from pipeline.latents.loading import build_streaming_latents_dataloader
from pipeline.loading.bucketed import BucketSlots
from pipeline.loading.latent_folder import LatentFolder
from pipeline.partitions import bucket_index, engine
from pipeline.partitions.bucket_index import BucketIndex
from pipeline.stages import get_stage

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"2:3": (96, 64), "1:1": (80, 80), "3:2": (64, 96)}
"""Height and width of drawings: the buckets for 80 pixels in steps of 16."""


def run_stage(stage: str, **settings: object) -> None:
    engine.run(get_stage(stage)(build(STAGES[stage], settings), Rank()))


# ---- plan


def plan(samples: int) -> None:
    """Memory and time that a loader needs for ``samples`` samples."""
    in_partition, sizes = 10_000, Buckets(1024).sizes
    shares = np.random.default_rng(0).dirichlet(np.ones(len(sizes)), samples // in_partition)
    counts = np.floor(shares * in_partition).astype(int)
    counts[:, 0] += in_partition - counts.sum(1)
    records = (
        {"partition": n, "buckets": [[[size], int(c)] for size, c in zip(sizes, own, strict=True) if c]}
        for n, own in enumerate(counts)
    )
    with tempfile.NamedTemporaryFile() as file:
        bucket_index.write(file, ["latents_1024"], records)
        file.flush()
        data = Path(file.name).read_bytes()
    gc.collect()
    tracemalloc.start()
    begin = process_time()
    index = BucketIndex.parse(data, "latents_1024")
    slots = BucketSlots((index,), 0)
    taken, least = np.zeros(len(slots.sizes), np.int64), np.full(len(slots.sizes), 2048)
    slots.choose(0, taken, least)
    opened = process_time() - begin
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    begin, steps = process_time(), 200
    for _ in range(steps):
        bucket = slots.choose(0, taken, least)
        assert bucket is not None
        slots.samples(0, bucket, taken[bucket] + np.arange(256))
        taken[bucket] += 2048
    each = (process_time() - begin) / steps
    print(f"plan: {len(index):,} samples in {samples // in_partition:,} partitions and {len(sizes)} buckets")
    size, seconds = f"{len(data) / 1e6:.1f} MB on disk", f"{opened:.2f} s of CPU"
    print(f"  index {size}, opened and planned in {seconds} with {memory / 1e6:.0f} MB of memory")
    print(f"  a step of 8 x 256 samples: {1000 * each:.2f} ms of CPU for each rank")


# ---- precompute


FILES = {
    "square": [(512, 512)],
    "buckets": [(448, 576), (576, 448), (384, 640), (640, 384)],
}
"""Height and width of JPEGs, twice those of their crops at 256 pixels in steps of 32."""


def write_images(folder: Path, count: int, sizes: list[tuple[int, int]]) -> None:
    """Write JPEGs with detail at all scales."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        image = np.zeros((height, width, 3))
        for scale in (4, 16, 64):
            noise = random.normal(0, 20, (height // scale, width // scale, 3))
            image += noise.repeat(scale, 0).repeat(scale, 1)
        pixels = np.ascontiguousarray(np.clip(127 + image, 0, 255).astype(np.uint8))
        (folder / f"{number:06}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, 90, "RGB", "420"))
        (folder / f"{number:06}.txt").write_text(f"image {number}")


def used() -> float:
    """CPU seconds of this process and of ended child processes."""
    return sum(
        resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def precompute(root: Path, images: int, rounds: int) -> None:
    for aspect, sizes in FILES.items():
        own = root / "files" / aspect
        write_images(own / "images", images, sizes)
        place = {"source": "image_folder", "input": str(own / "images"), "copy": True, "partition_size": images // 2}
        run_stage("download", **place, output=str(own / "download"))
        run_stage("filter", input=str(own / "download"), output=str(own / "filter"), max_image_size=0)
    rates: dict[str, list[tuple[float, float]]] = {"square": [], "buckets": []}
    for turn in range(rounds + 1):
        for aspect in sorted(rates, reverse=bool(turn % 2)):
            output = root / f"{aspect}{turn}"
            settings = {"vae": "embedded16", "image_resolutions": (256,), "aspect": aspect}
            settings |= {"bucket_step": 32} if aspect == "buckets" else {}
            cpu, begin = used(), perf_counter()
            run_stage("precompute", input=str(root / "files" / aspect / "filter"), output=str(output), **settings)
            pixels = images * 256**2
            if aspect == "buckets":
                index = LatentFolder(output).bucket_index("latents_256")
                pixels = int(sum(n * h * w for n, (h, w) in zip(index.counts(), index.sizes, strict=True)))
            if turn:  # the first round starts processes and fills caches
                rates[aspect].append((pixels / (perf_counter() - begin), pixels / (used() - cpu)))
            shutil.rmtree(output)
    print(f"precompute: {images} JPEGs, crops of 256 x 256 pixels, or of four buckets with almost as many")
    for number, what in enumerate(("wall clock", "CPU time")):
        values = {aspect: [rate[number] for rate in found] for aspect, found in rates.items()}
        ratio = median(b / s for b, s in zip(values["buckets"], values["square"], strict=True))
        shown = ", ".join(f"{aspect} {median(found) / 1e6:.2f}" for aspect, found in values.items())
        print(f"  {what}: {shown} million pixels/s; buckets / square: {ratio:.3f}")


# ---- loader


class Theirs(StreamingDataset):
    """Samples as tensors, with shapes from their columns."""

    def __getitem__(self, at: int) -> dict[str, Any]:
        row = super().__getitem__(at)
        shape = (4, row["height_256"] // 8, row["width_256"] // 8)
        return {
            "caption_latents": torch.from_numpy(np.frombuffer(row["caption_latents"], np.float16).copy()),
            "image_latents": torch.from_numpy(np.frombuffer(row["latents_256"], np.float16).copy()).reshape(shape),
        }


def rate(loader: Any, size: Any) -> float:
    """Samples per second of an epoch, from the second batch on, when processes have started."""
    count, begin = 0, 0.0
    for number, batch in enumerate(loader):
        if number:
            count += size(batch)
        else:
            begin = perf_counter()
    return count / (perf_counter() - begin)


def loader(root: Path, samples: int, rounds: int) -> None:
    source = {"source": "shapes", "count": samples, "image_size": 64, "canvases": ("2:3", "1:1", "3:2", "16:9")}
    run_stage("download", **source, partition_size=1000, output=str(root / "scenes"))
    settings = {"vae": "embedded", "image_resolutions": (256,), "aspect": "buckets", "batch_size": "64"}
    run_stage("precompute", input=str(root / "scenes"), output=str(root / "latents"), **settings)
    rates: dict[str, list[float]] = {"ours": [], "StreamingDataset": []}
    given = {"image_size": 256, "cap_seq_size": 16, "cap_emb_dim": 64, "buckets": True}
    for _ in range(rounds):
        ours = build_streaming_latents_dataloader(root / "latents", 64, **given)
        rates["ours"].append(rate(ours, lambda batch: len(batch["image_latents"])))
        clean_stale_shared_memory()
        dataset = Theirs(local=str(root / "latents"), shuffle=True, batch_size=64)
        theirs = torch.utils.data.DataLoader(dataset, 64, num_workers=2, drop_last=True, collate_fn=list)
        rates["StreamingDataset"].append(rate(theirs, len))
    print(f"loader: {samples} samples of latents in buckets of 256")
    for name, values in rates.items():
        print(f"  {name:18}{median(values):10.0f} samples/s")
    print(f"  ours / StreamingDataset: {median(a / b for a, b in zip(*rates.values(), strict=True)):.1f}")


# ---- proof


def command(stage: str, *settings: str) -> None:
    subprocess.run([sys.executable, "-m", f"pipeline.stages.{stage}", *settings], cwd=ROOT, check=True)


def proof(folder: Path, scenes: int, steps: int) -> None:
    from pipeline.metrics.scene_accuracy import matches
    from pipeline.sources.shapes_scene import fixed_prompts
    from pipeline.stages.generate import load_painter, sample_images

    images = folder / "shapes/train/download"
    shapes = [f"canvases=[{','.join(SHAPES)}]", f"count={scenes}", "image_size=96"]
    command("download", "dataset=shapes", f"data_dir={folder}", *shapes)
    kinds = {"buckets": ["aspect=buckets", "bucket_step=16"], "square": []}
    for kind, given in kinds.items():
        latents = ["dataset=shapes", f"input={images}", f"output={folder / kind}", "image_resolutions=[80]"]
        command("precompute", *latents, "vae=embedded16", "batch_size=64", *given)
    for kind in kinds:
        run = ["task=diffuse", "dataset=shapes", f"data_dir={folder}", f"input={folder / kind}", f"name={kind}"]
        training = [f"steps={steps}", "batch_size=64", "lr=0.0045", "threads=1", "evaluate_every=1000"]
        command("train", *run, *training, "checkpoint_every=300")
    prompts = fixed_prompts(32)
    print(f"proof: {scenes} scenes, {steps} steps; drawn right of {len(prompts)} prompts, by shape (width:height)")
    print(f"  {'trained on':12}" + "".join(f"{shape:>8}" for shape in SHAPES))
    for kind in kinds:
        painter = load_painter(folder / "shapes/runs" / kind)
        drawn = {shape: sample_images(painter, prompts, 1000, size=size) for shape, size in SHAPES.items()}
        right = [sum(map(matches, generated, prompts)) for generated in drawn.values()]
        print(f"  {kind:12}" + "".join(f"{count:>8}" for count in right), flush=True)


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    parts = options.get("parts", "plan,precompute,loader").split(",")
    rounds = int(options.get("rounds", 3))
    root = Path(tempfile.mkdtemp(dir=options.get("folder")))
    torch.set_num_threads(1)
    try:
        if "plan" in parts:
            plan(int(options.get("samples", 10**8)))
        if "precompute" in parts:
            precompute(root / "precompute", int(options.get("images", 600)), rounds)
        if "loader" in parts:
            loader(root / "loader", int(options.get("images", 600)) * 5, rounds)
        if "proof" in parts:
            place = Path(options.get("data_dir", root / "proof")).absolute()
            proof(place, int(options.get("scenes", 4000)), int(options.get("steps", 6600)))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
