"""CPU time per image of a rank's own process in stage=precompute, with encoders that cost nothing.

    python benchmarks/feed.py [images=2048] [edge=256] [resolutions=256] [batch=32] [tokens=77x1024] [rounds=3]

The rank reads rows, hashes them, sends images to one decoding process, makes rows of latents and text states (those of
ViT-H-14, a different caption for each image), writes and hashes them, and commits. Networks, copies to and from a GPU,
and conversion of results on the GPU are replaced by prepared bytes. Prints the CPU time of the rank's process (all its
threads, which share the interpreter's lock) per image after the first batch, and the images per second that this
allows; the decoding process is not counted.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.cli import build
from pipeline.config.schema import STAGES
from pipeline.distributed import Rank
from pipeline.encoders.embedded import EmbeddedTextEncoder
from pipeline.latents.encoding import Batch, Encoded, Encoding
from pipeline.latents.transfers import Transit
from pipeline.partitions import engine
from pipeline.stages import get_stage

PARTITION = 1024


def images(folder: Path, count: int, edge: int) -> None:
    """Write 4:3 JPEGs with shorter edge ``edge``, about as many bytes as photos, and captions."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (edge // 6, edge // 4, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((edge * 4 // 3, edge), Image.Resampling.BICUBIC))
        (folder / f"{number:06}.jpg").write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90))
        (folder / f"{number:06}.txt").write_text(f"caption number {number}")


def run_stage(stage: str, **settings: Any) -> None:
    engine.run(get_stage(stage)(build(STAGES[stage], settings), Rank()))


class Ready:
    """Replaces :meth:`Encoding.encode`: returns prepared bytes of the right shapes; records the first batch's time."""

    def __init__(self, resolutions: list[int], batch: int, size: int) -> None:
        self.columns = {
            f"latents_{r}": torch.zeros((batch, 4 * (r // 8) ** 2 * 2), dtype=torch.uint8) for r in resolutions
        }
        self.texts = torch.zeros((max(512, batch), size), dtype=torch.uint8)
        self.begun: tuple[float, int] | None = None

    def __call__(self, batch: Batch) -> Encoded:
        count, captions = len(batch.slots), len(batch.captions)
        if self.begun is None:
            self.begun = (time.process_time(), count)
        flags = torch.ones((max(count, captions), 2), dtype=torch.bool)
        columns = {name: values[:count] for name, values in self.columns.items()}
        encoded = Encoded(
            columns, flags[:count], {"caption_latents": self.texts[:captions]}, flags[:captions], Transit()
        )
        batch.copied()
        return encoded


def measured(root: Path, resolutions: list[int], batch: int, count: int) -> float:
    """Seconds of this process per image, from the first batch on."""
    size = EmbeddedTextEncoder.length * EmbeddedTextEncoder.width * 2
    ready = Ready(resolutions, batch, size)
    original, Encoding.encode = Encoding.encode, lambda self, given: ready(given)  # type: ignore[method-assign,assignment]
    try:
        settings = {"image_resolutions": resolutions, "batch_size": str(batch), "workers": 1, "latent": "sample"}
        run_stage("precompute", input=str(root / "shards"), output=str(root / "latents"), **settings)
    finally:
        Encoding.encode = original  # type: ignore[method-assign]
    shutil.rmtree(root / "latents")
    assert ready.begun is not None
    begun, first = ready.begun
    return (time.process_time() - begun) / (count - first)


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    count, edge = int(options.get("images", 2048)), int(options.get("edge", 256))
    resolutions = [int(part) for part in options.get("resolutions", "256").split(",")]
    EmbeddedTextEncoder.length, EmbeddedTextEncoder.width = map(int, options.get("tokens", "77x1024").split("x"))
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(dir=options.get("folder")))
    try:
        images(root / "images", count, edge)
        source = {"source": "image_folder", "input": str(root / "images"), "partition_size": PARTITION}
        run_stage("download", **source, output=str(root / "raw"), copy=True)
        run_stage("shard", input=str(root / "raw"), output=str(root / "shards"), partition_size=PARTITION)
        batch = int(options.get("batch", 32))
        rounds = [measured(root, resolutions, batch, count) for _ in range(int(options.get("rounds", 3)))]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seconds = median(rounds)
    print(f"a rank's own process: {1e3 * seconds:.3f} ms an image, so at most {1 / seconds:,.0f} images/s", end="")
    print(f" ({', '.join(f'{1e3 * each:.3f}' for each in rounds)}; {resolutions} px, {count} images of {edge} px)")


if __name__ == "__main__":
    main()
