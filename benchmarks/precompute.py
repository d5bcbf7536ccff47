"""stage=precompute against its limit, the models' own forward pass, and against a plain loop as usually written.

    python benchmarks/precompute.py [models=small] [images=128] [resolutions=64,128] [batch=16] [rounds=3] [folder=...]
    python benchmarks/precompute.py models=sdxl images=8192 resolutions=256,512 batch=32 price=2.5      # on a GPU

`models=sdxl` uses SDXL's autoencoder and ViT-H-14's text tower with random weights. All contestants have one CPU thread
for the models; `workers=` is the number of decoding processes (default: all CPUs but one; the plain loop has as many,
at least two), `compile=true` compiles the stage's models, `price=` is that of a GPU hour.

- bare: autoencoder and text encoder on a batch that is on the device, repeatedly;
- stage: decoding, resizing, encoding, writing MDS, ledgers, hashes, commits and finalizing the dataset;
- plain loop: Pillow and torchvision transforms in a DataLoader, synchronous copies, MDSWriter.

The last two are timed from when their first batch is decoded. All take turns; a ratio is the median over the rounds,
"of bare" relative to the mean of the runs before and after.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import open_clip
import simplejpeg
import torch
from PIL import Image
from streaming import MDSWriter
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.cli import build
from pipeline.config.schema import STAGES
from pipeline.distributed import Rank
from pipeline.encoders.base import autoencoder, text_encoder
from pipeline.latents.encoding import Batch, Encoded, Encoding
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.stages import get_stage

PARTS = 4  # partitions of the stage's input
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bfloat16 FLOP/s, from the vendors' data sheets


def write_images(folder: Path, count: int) -> None:
    """Write JPEGs of 640x512 pixels with detail at all scales, and captions of 5 to 60 words."""
    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]
    folder.mkdir(parents=True)
    for number in range(count):
        image = np.zeros((512, 640, 3))
        for scale in (8, 32, 128):
            noise = Image.fromarray(random.integers(0, 256, (512 // scale, 640 // scale, 3), dtype=np.uint8))
            image += np.asarray(noise.resize((640, 512), Image.Resampling.BICUBIC)) / 3
        (folder / f"{number:06}.jpg").write_bytes(simplejpeg.encode_jpeg(image.astype(np.uint8), 90))
        caption = " ".join(random.choice(words, int(random.integers(5, 60))))
        (folder / f"{number:06}.txt").write_text(caption)


def models(kind: str, folder: Path) -> tuple[str, str]:
    """Settings vae= and text_encoder= of models with random weights, saved below ``folder``."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    widths = (128, 256, 512, 512) if kind == "sdxl" else (32, 32, 64)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    layers = 2 if kind == "sdxl" else 1
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=layers, sample_size=512, **blocks)
    vae.save_pretrained(folder / "vae")
    if kind == "sdxl":
        return str(folder / "vae"), "openclip:ViT-H-14:random"
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    (folder / "small-text.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "small-text.json")
    return str(folder / "vae"), "openclip:small-text:random"


def run_stage(stage: str, **settings: Any) -> Dataset:
    made = get_stage(stage)(build(STAGES[stage], settings), Rank())
    engine.run(made)
    return Dataset.open(settings["output"])


def bare(
    vae: Any, text: Any, images: list[np.ndarray], captions: list[str], resolutions: list[int], batch: int
) -> float:
    """Images per second of the models alone."""
    x = {resolution: vae.preprocess(images[:batch], resolution) for resolution in resolutions}
    count = 0
    begin = 0.0
    with torch.inference_mode():
        for turn in range(1 + len(images) // batch):
            if turn == 1:
                synchronize()
                begin = perf_counter()
            for resolution in resolutions:
                vae.moments(x[resolution])
            text.encode(captions[turn * batch % len(captions) :][:batch] or captions[:batch])
            count += batch if turn else 0
        synchronize()
    return count / (perf_counter() - begin)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stage_rate(upstream: Path, output: Path, **settings: Any) -> tuple[float, dict[str, Any]]:
    """Images per second, from the first batch at the encoder to the end; and the speed noted for the last partition."""
    begin: list[float] = []

    def encode(self: Encoding, batch: Batch) -> Encoded:
        begin.append(perf_counter())
        return original(self, batch)

    original, Encoding.encode = Encoding.encode, encode  # type: ignore[method-assign]
    try:
        dataset = run_stage("precompute", input=str(upstream), output=str(output), **settings)
        seconds = perf_counter() - begin[0]
    finally:
        Encoding.encode = original  # type: ignore[method-assign]
    record = dataset.record(dataset.partitions - 1) or {}
    return dataset.require_success()["counts"]["kept"] / seconds, record["notes"]["speed"]


def operations(vae: Any, text: Any, image: np.ndarray, resolutions: list[int]) -> float:
    """FLOPs of the models for one image and its caption."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for resolution in resolutions:
            vae.moments(vae.preprocess([image], resolution))
        text.encode(["a caption"])
    return float(counter.get_total_flops())


class Plain(torch.utils.data.Dataset[Any]):
    """Files → tensors, as in micro_diffusion's precompute.py."""

    def __init__(self, folder: Path, resolutions: list[int]) -> None:
        self.files = sorted(folder.glob("*.jpg"))
        self.steps = [
            transforms.Compose(
                [
                    transforms.Resize(resolution, transforms.InterpolationMode.BICUBIC),
                    transforms.CenterCrop(resolution),
                    transforms.ToTensor(),
                    transforms.Normalize([0.5] * 3, [0.5] * 3),
                ]
            )
            for resolution in resolutions
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        image = Image.open(self.files[at]).convert("RGB")
        caption = self.files[at].with_suffix(".txt").read_text()
        return {"caption": caption, **{str(n): step(image) for n, step in enumerate(self.steps)}}


def plain(folder: Path, output: Path, vae: Any, text: Any, resolutions: list[int], batch: int, workers: int) -> float:
    """Images per second of the loop, from when its first batch is ready."""
    columns = {"caption": "str", "caption_latents": "bytes", **{f"latents_{r}": "bytes" for r in resolutions}}
    loader = torch.utils.data.DataLoader(Plain(folder, resolutions), batch, num_workers=workers, prefetch_factor=2)
    begin, count = 0.0, 0
    with MDSWriter(out=str(output), columns=columns, size_limit=2**28) as writer, torch.inference_mode():
        for rows in loader:
            begin = begin or perf_counter()
            latents = {
                f"latents_{r}": vae.encode(rows[str(n)].to(vae.device), torch.randn(1, device=vae.device))
                for n, r in enumerate(resolutions)
            }
            latents["caption_latents"] = text.encode(rows["caption"])
            stored = {name: values.cpu().numpy().astype(np.float16) for name, values in latents.items()}
            for at, caption in enumerate(rows["caption"]):
                writer.write({"caption": caption, **{name: values[at].tobytes() for name, values in stored.items()}})
            count += len(rows["caption"])
    return count / (perf_counter() - begin)


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    kind, batch = options.get("models", "small"), int(options.get("batch", 16))
    resolutions = [int(edge) for edge in options.get("resolutions", "64,128").split(",")]
    count = int(options.get("images", 128))
    root = Path(tempfile.mkdtemp(dir=options.get("folder")))
    try:
        write_images(root / "images", count)
        vae_name, text_name = models(kind, root)
        run_stage(
            "download", source="image_folder", input=str(root / "images"), output=str(root / "raw"), copy=True,
            partition_size=-(-count // PARTS),
        )  # fmt: skip
        device = Rank().device
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        vae, text = autoencoder(vae_name, device), text_encoder(text_name, device, dtype)
        files = sorted((root / "images").glob("*.jpg"))[: batch * 8]
        images = [np.asarray(Image.open(file)) for file in files]
        captions = [file.with_suffix(".txt").read_text() for file in files]
        workers = int(options.get("workers", len(os.sched_getaffinity(0)) - 1 or 1))
        cost = float(options.get("price", 0.0))
        rates: dict[str, list[float]] = {"bare": [], "stage": [], "plain loop": []}
        ratios: dict[str, list[float]] = {"stage": [], "plain loop": []}
        notes: dict[str, Any] = {}

        def limit() -> float:
            rates["bare"].append(bare(vae, text, images, captions, resolutions, batch))
            return rates["bare"][-1]

        def contend(name: str, rate: float, before: float) -> float:
            after = limit()
            rates[name].append(rate)
            ratios[name].append(rate / (before + after) * 2)
            return after

        bare(vae, text, images, captions, resolutions, batch)
        now = limit()
        for turn in range(int(options.get("rounds", 3))):
            rate, notes = stage_rate(
                root / "raw", root / f"stage{turn}", vae=vae_name, text_encoder=text_name,
                image_resolutions=resolutions, batch_size=str(batch), workers=workers, max_failed_fraction=0.0,
                gpu_hour_price=cost, compile=options.get("compile", "false"),
            )  # fmt: skip
            now = contend("stage", rate, now)
            rate = plain(root / "images", root / f"plain{turn}", vae, text, resolutions, batch, max(2, workers))
            now = contend("plain loop", rate, now)
        needed = operations(vae, text, images[0], resolutions)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(
        f"{kind} models, {resolutions} pixels and text, batches of {batch}, on {name}: {needed / 1e9:.1f} GFLOP/image"
    )
    peak = next((speed for known, speed in PEAK.items() if known in name), 0.0)
    for contestant, values in rates.items():
        rate = median(values)
        share = f", {median(ratios[contestant]):.2f} of bare" if contestant in ratios else ""
        used = f", {rate * needed / peak:.1%} of the GPU's peak" if peak else ""
        paid = f", {1e6 / rate / 3600 * cost:.2f} for a million images" if cost else ""
        print(f"{contestant:12}{rate:10.1f} images/s{share}{used}{paid}")
    both = [a / b for a, b in zip(rates["stage"], rates["plain loop"], strict=True)]
    print(f"stage / plain loop: {median(both):.2f}")
    print("last partition:", json.dumps(notes))


if __name__ == "__main__":
    main()
