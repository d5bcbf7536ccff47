"""All figures of a GPU machine in one Markdown file, without network or downloads: weights are random.

    python benchmarks/gpu.py [output=gpu.md] [parts=precompute,cpus,training,scans,generate] [size=full] [device=cuda]
    python benchmarks/gpu.py size=tiny device=cpu       # a test run of the script itself; its figures are meaningless

- precompute: the stage against the networks' own forward pass, at 256 and at 256 and 512 pixels, with SDXL's
  autoencoder and ViT-H-14's text tower; idle fraction of the GPU
- cpus: images per second of the stage by number of decoding processes
- training: MFU of MicroDiT_XL_2, with three quarters of the tokens masked and with all, and of Vision Mamba
- scans: the kernels of mamba_ssm against torch, forward and backward
- generate: images per second of MicroDiT_XL_2 with 20 steps of DPM++ and guidance, decoded by SDXL's autoencoder

Each part runs in its own process; a failure is reported in the file, and the exit code is 1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, strftime
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.schema import TrainConfig
from pipeline.distributed import Rank
from pipeline.encoders.base import autoencoder, text_encoder
from pipeline.models.diffusion_process import Flow
from pipeline.models.dit import DiT, dit_config
from pipeline.models.ssm import Mamba1, Mamba2, backend_of
from pipeline.stages.generate import Manner, Painter, sample_images
from pipeline.storage import Folder
from pipeline.training.loggers import read_log
from pipeline.training.loop import train
from pipeline.training.tasks.diffuse import Diffuse, LatentInfo, Normalisation

ROOT = Path(__file__).resolve().parent.parent
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Size:
    """Amount of work."""

    models: str
    """Models for precompute: sdxl or small."""
    resolutions: tuple[tuple[int, ...], ...]
    photos: int
    """Number of different images, to which ``images`` files are linked."""
    images: int
    batch: int
    rounds: int
    diffusion: str
    """Model for diffusion."""
    latents: tuple[int, int, int]
    captions: tuple[int, int]
    train_batch: int
    train_steps: int
    mamba: str
    mamba_edge: int
    lengths: tuple[int, ...]
    width: int
    prompts: int


SIZES = {
    "full": Size(
        models="sdxl", resolutions=((256,), (256, 512)), photos=512, images=16384, batch=64, rounds=3,
        diffusion="MicroDiT_XL_2", latents=(4, 32, 32), captions=(77, 1024), train_batch=128, train_steps=40,
        mamba="small", mamba_edge=224, lengths=(64, 196, 1024, 4096), width=768, prompts=64,
    ),
    "tiny": Size(
        models="small", resolutions=((32,), (32, 64)), photos=4, images=12, batch=4, rounds=1,
        diffusion="nano_mixer", latents=(4, 8, 8), captions=(4, 16), train_batch=2, train_steps=2,
        mamba="nano", mamba_edge=16, lengths=(8,), width=32, prompts=1,
    ),
}  # fmt: skip


def sibling(name: str) -> ModuleType:
    """Import another benchmark by path, as one of them has the name of one of our packages."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- parts


class Photos:
    """The input of precompute, and the networks that encode it."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.bench = sibling("precompute")
        self.bench.write_images(folder / "images", size.photos)
        for number in range(size.photos, size.images):
            for ending in ("jpg", "txt"):
                source = folder / "images" / f"{number % size.photos:06}.{ending}"
                os.link(source, folder / "images" / f"{number:06}.{ending}")
        self.vae, self.text = self.bench.models(size.models, folder)
        parts = -(-size.images // 8)
        self.upstream = folder / "raw"
        self.bench.run_stage(
            "download", source="image_folder", input=str(folder / "images"), output=str(self.upstream), copy=True,
            partition_size=parts,
        )  # fmt: skip
        self.folder = folder

    def stage(self, size: Size, resolutions: tuple[int, ...], workers: int) -> tuple[float, dict[str, Any]]:
        """Images per second of the stage, and its notes on its speed."""
        output = self.folder / f"latents-{os.urandom(4).hex()}"
        rate, notes = self.bench.stage_rate(
            self.upstream, output, vae=self.vae, text_encoder=self.text, image_resolutions=list(resolutions),
            batch_size=str(size.batch), workers=workers, max_failed_fraction=0.0,
        )  # fmt: skip
        shutil.rmtree(output, ignore_errors=True)
        return float(rate), notes

    def bare(self, size: Size, resolutions: tuple[int, ...], device: torch.device) -> float:
        """Images per second of the networks alone, on a batch that is on the device."""
        import numpy as np
        from PIL import Image

        dtype = "bfloat16" if device.type == "cuda" else "float32"
        vae, text = autoencoder(self.vae, device, dtype), text_encoder(self.text, device, dtype)
        files = sorted((self.folder / "images").glob("*.jpg"))[: size.batch * 8]
        images = [np.asarray(Image.open(file)) for file in files]
        captions = [file.with_suffix(".txt").read_text() for file in files]
        self.bench.bare(vae, text, images, captions, list(resolutions), size.batch)
        return float(self.bench.bare(vae, text, images, captions, list(resolutions), size.batch))


def precompute(size: Size, device: torch.device, folder: Path) -> Rows:
    photos = Photos(size, folder)
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    rows = []
    for resolutions in size.resolutions:
        bare, stage, ratios, idle = [photos.bare(size, resolutions, device)], [], [], []
        for _ in range(size.rounds):
            rate, notes = photos.stage(size, resolutions, workers)
            bare.append(photos.bare(size, resolutions, device))
            stage.append(rate)
            ratios.append(2 * rate / (bare[-2] + bare[-1]))
            idle.append(float(notes.get("idle", 0.0)))
        rows.append(
            {
                "resolutions": "+".join(map(str, resolutions)),
                "decoding processes": str(workers),
                "bare forward, img/s": f"{median(bare):.1f}",
                "stage, img/s": f"{median(stage):.1f}",
                "stage / bare": f"{median(ratios):.3f}",
                "GPU idle": f"{median(idle):.1%}",
            }
        )
    return rows


def cpus(size: Size, device: torch.device, folder: Path) -> Rows:
    photos = Photos(size, folder)
    usable = len(os.sched_getaffinity(0))
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count <= usable]
    rows = []
    for count in counts if size.rounds > 1 else counts[:1]:
        rate, notes = photos.stage(size, size.resolutions[0], count)
        idle = float(notes.get("idle", 0.0))
        rows.append({"decoding processes": str(count), "img/s": f"{rate:.1f}", "GPU idle": f"{idle:.1%}"})
    return rows


class Noise:
    """Random latents, as ``count`` samples of one batch."""

    def __init__(self, info: LatentInfo, count: int) -> None:
        torch.manual_seed(0)
        self._image, self._text = torch.randn(count, *info.image_shape), torch.randn(count, *info.caption_shape)

    def __len__(self) -> int:
        return len(self._image)

    def batch(self, positions: Any, epochs: Any = None) -> dict[str, torch.Tensor]:
        return {"image_latents": self._image[positions], "caption_latents": self._text[positions]}


def training(size: Size, device: torch.device, folder: Path) -> Rows:
    info = LatentInfo("embedded", "embedded", 8 * size.latents[1], size.latents, size.captions)
    rows = []
    for mask in (0.75, 0.0):
        config = train_config(size, device, task="diffuse", model=size.diffusion, mask_ratio=mask, show=0)
        data = Noise(info, 4 * size.train_batch)
        line = run(Diffuse(config, data, info), data, config, folder / f"diffuse-{mask}")
        rows.append(training_row(f"{size.diffusion}, {mask:.0%} masked", config, line))
    bench = sibling("training")
    config = train_config(size, device, task="classify", model=size.mamba, resolution=size.mamba_edge)
    images = bench.ImageDataset(bench.Digits(), config.resolution)
    task = bench.Classify(config, images)
    line = run(task, images, config, folder / "classify")
    backend = backend_of("auto", device, config.mixer or "mamba2")
    rows.append(training_row(f"Vision Mamba {size.mamba}, {size.mamba_edge} px, scans by {backend}", config, line))
    return rows


def train_config(size: Size, device: torch.device, **settings: Any) -> TrainConfig:
    steps = size.train_steps
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return TrainConfig(
        batch_size=size.train_batch, steps=steps, log_every=max(1, steps // 4), checkpoint_every=10 * steps,
        precision=precision, **settings,
    )  # fmt: skip


def run(task: Any, data: Any, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The last line of a run's log, with speeds after the first quarter, which is a warm-up."""
    folder.mkdir()
    with Folder.open(folder) as place:
        train(task, data, config, Rank(), place)
    return [line for line in read_log(folder) if "samples_per_second" in line][-1]


def training_row(name: str, config: TrainConfig, line: dict[str, Any]) -> dict[str, str]:
    mfu = line.get("mfu")
    return {
        "model": name,
        "batch": str(config.batch_size),
        "precision": config.precision,
        "img/s": f"{line['samples_per_second']:.1f}",
        "MFU": f"{mfu:.1%}" if mfu else "peak unknown",
        "waits for data": f"{line.get('data_wait', 0.0):.1%}",
        "peak memory, MB": f"{line.get('memory_mb', 0):,.0f}",
    }


def scans(size: Size, device: torch.device, folder: Path) -> Rows:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for kind in (Mamba1, Mamba2):
        backends = ["torch"] + ["mamba_ssm"] * (backend_of("auto", device, kind.__name__.lower()) == "mamba_ssm")
        for length in size.lengths:
            torch.manual_seed(0)
            mixer: Any = kind(size.width, d_state=16 if kind is Mamba1 else 64).to(device)
            tokens = torch.randn(16, length, size.width, device=device)
            times = {
                name: scan_milliseconds(mixer, name, tokens, dtype, 3 if size.rounds == 1 else 30) for name in backends
            }
            row = {"mixer": kind.__name__, "length": str(length)}
            row |= {
                f"{name}, ms": f"{times[name]:.2f}" if name in times else "not installed"
                for name in ("torch", "mamba_ssm")
            }
            row["torch / mamba_ssm"] = f"{times['torch'] / times['mamba_ssm']:.2f}" if "mamba_ssm" in times else "-"
            rows.append(row)
    return rows


def scan_milliseconds(mixer: Any, backend: str, tokens: torch.Tensor, dtype: torch.dtype, turns: int) -> float:
    """Median time of a mixer's forward and backward pass in milliseconds."""
    mixer.backend = backend
    times = []
    for _ in range(turns):
        synchronize(tokens.device)
        begin = perf_counter()
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            output = mixer(tokens)
        output.float().square().mean().backward()
        synchronize(tokens.device)
        times.append(1000 * (perf_counter() - begin))
    return median(times[len(times) // 3 :])


def generate(size: Size, device: torch.device, folder: Path) -> Rows:
    vae_name, text_name = sibling("precompute").models(size.models, folder)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    text, vae = text_encoder(text_name, device, dtype), autoencoder(vae_name, device, dtype)
    # shape of this autoencoder's latents for images of this size
    shape = (vae.channels, size.latents[1], size.latents[2])
    model = DiT(dit_config(size.diffusion, shape, (text.length, text.width))).to(device).eval().requires_grad_(False)
    painter = Painter(model, Flow(), Normalisation((0.0,) * vae.channels, 1.0), vae, text, 0)
    prompts = [f"a photograph of {number} red houses next to a lake" for number in range(size.prompts)]
    manner = Manner(steps=20 if size.rounds > 1 else 2, guidance=4.0, sampler="dpm++")
    speeds = []
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for _ in range(1 + size.rounds):
            begin = perf_counter()
            sample_images(painter, prompts, 0, manner)
            speeds.append(len(prompts) / (perf_counter() - begin))
    return [
        {
            "model": size.diffusion,
            "sampler": f"{manner.sampler}, {manner.steps} steps, guidance {manner.guidance:g}",
            "edge": f"{size.latents[1] * vae.downsample} px",
            "img/s": f"{median(speeds[1:]):.2f}",
        }
    ]


PARTS: dict[str, Callable[[Size, torch.device, Path], Rows]] = {
    "precompute": precompute,
    "cpus": cpus,
    "training": training,
    "scans": scans,
    "generate": generate,
}


# ---- output file


def table(rows: Rows) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row.get(name, "") for name in columns) + " |" for row in rows])


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    count = f"{torch.cuda.device_count()} x {name}" if device.type == "cuda" else f"no GPU, {name}"
    build = f"torch {torch.__version__}" + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    cores = len(os.sched_getaffinity(0))
    when = f"commit {commit.stdout.strip() or 'unknown'}, {strftime('%Y-%m-%d %H:%M')}"
    return f"{count}; {cores} CPU cores; {build}; {when}"


def run_part(name: str, size: str, device: str) -> tuple[Rows, str]:
    """Run a part in its own process; returns its rows, or why there are none."""
    command = [sys.executable, __file__, f"part={name}", f"size={size}", f"device={device}"]
    begin = perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{name}: {'done' if not ended.returncode else 'failed'} in {perf_counter() - begin:.0f} s", flush=True)
    if ended.returncode:
        return [], "\n".join((ended.stderr or ended.stdout).strip().splitlines()[-15:])
    return json.loads(ended.stdout.strip().splitlines()[-1]), ""


def main() -> int:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if unknown := set(options) - {"output", "parts", "part", "size", "device"}:
        print(f"unknown: {', '.join(sorted(unknown))}; see the head of {__file__}", file=sys.stderr)
        return 2
    size, device_name = options.get("size", "full"), options.get("device", "cuda")
    if device_name == "cuda" and not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        print(f"{reason}: there is nothing to measure (python launch/doctor.py says more)", file=sys.stderr)
        return 1
    device = torch.device(device_name)
    if "part" in options:
        with tempfile.TemporaryDirectory(prefix="latentmill-gpu-") as folder:
            print(json.dumps(PARTS[options["part"]](SIZES[size], device, Path(folder))))
        return 0
    chosen = options.get("parts", ",".join(PARTS)).split(",")
    if wrong := [name for name in chosen if name not in PARTS]:
        print(f"parts={','.join(wrong)}: known: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    text, failed = [f"# Latentmill on a GPU\n\n{machine(device)}\n"], 0
    rehearsal = size != "full" or device.type != "cuda"
    if rehearsal:
        text.append("**A rehearsal of the script: it shows what would be measured, and no figures.**\n")
    for name in chosen:
        rows, error = run_part(name, size, device_name)
        failed += bool(error)
        if rehearsal:
            rows = [dict.fromkeys(row, "") for row in rows[:1]]
        text.append(
            f"## {name}\n\n{table(rows) if rows else f'failed:{chr(10)}{chr(10)}```{chr(10)}{error}{chr(10)}```'}\n"
        )
    output = Path(options.get("output", "gpu.md"))
    output.write_text("\n".join(text))
    print(f"{'a rehearsal, without figures' if rehearsal else 'figures'}: {output.absolute()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
